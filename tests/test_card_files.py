"""Card files: PNG, zip and JSON that are broken, huge or hostile, and writing that leaves nothing half done."""

import base64
import dataclasses
import io
import json
import os
import random
import struct
import time
import tracemalloc
import zipfile
import zlib

import pytest
from cards import SIGNATURE, V1, V3, charx, png, png_chunk, put, refused, text_chunk, text_keywords

from persona_pruner.card_files import MAX_CARD, MAX_FILE, MAX_ZIP_ENTRIES
from persona_pruner.errors import InputError, PersonaPrunerError, RunError
from persona_pruner.persona import Persona


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iTXt compressed"])
def test_each_kind_of_text_chunk(tmp_path, kind):
    assert Persona.load(put(tmp_path, "c.png", png(text_chunk(b"chara", V1, kind)))) == Persona.from_card(V1)


@pytest.mark.parametrize("swap", [False, True])
def test_ccv3_wins_over_chara_in_either_order(tmp_path, swap):
    chunks = [text_chunk(b"chara", {**V1, "name": "Old"}), text_chunk(b"ccv3", V3)]
    assert Persona.load(put(tmp_path, "c.png", png(*(chunks[::-1] if swap else chunks)))).name == "Mira"


def test_the_first_of_two_cards_with_one_keyword_counts(tmp_path):
    chunks = text_chunk(b"chara", V1), text_chunk(b"chara", {**V1, "name": "Second"})
    assert Persona.load(put(tmp_path, "c.png", png(*chunks))).name == "Mira"


def test_base64_may_be_wrapped_unpadded_and_the_keyword_capitalised(tmp_path):
    text = base64.encodebytes(json.dumps(V1).encode()).rstrip(b"=\n")
    assert b"\n" in text
    assert Persona.load(put(tmp_path, "c.png", png(png_chunk(b"tEXt", b"Chara\0" + text)))).name == "Mira"


def test_other_chunks_and_trailing_bytes_are_ignored(tmp_path):
    blob = png(png_chunk(b"tEXt", b"Comment\0hello"), png_chunk(b"prVt", b"\0" * 9), text_chunk(b"chara", V1))
    assert Persona.load(put(tmp_path, "c.png", blob + b"trailing")).name == "Mira"


def test_broken_pngs(tmp_path):
    good = text_chunk(b"chara", V1)
    flipped = good[:40] + bytes([good[40] ^ 1]) + good[41:]
    long = struct.pack(">I", 1 << 31) + good[4:]
    bad_zlib = png_chunk(b"zTXt", b"chara\0\0" + b"not zlib")
    short_zlib = png_chunk(b"zTXt", b"chara\0\0" + zlib.compress(b"A" * 999)[:-6])
    for blob, problem in [
        (b"", "not a PNG"),
        (b"\xff\xd8\xff\xe0 a JPEG", "not a PNG"),
        (png(), "holds no character card"),
        (png(flipped), "checksum"),
        (png(long), "cut short"),
        (png(png_chunk(b"tEXt", b"chara\0!!!!")), "not base64"),
        (png(png_chunk(b"tEXt", b"chara\0caf\xe9")), "not base64"),
        (png(png_chunk(b"tEXt", b"chara\0abcde")), "not base64"),
        (png(png_chunk(b"tEXt", b"chara")), "not valid UTF-8 JSON"),
        (png(png_chunk(b"iTXt", b"chara\0\1")), "cut short"),
        (png(bad_zlib), "does not decompress"),
        (png(short_zlib), "cut short"),
    ]:
        refused(put(tmp_path, "c.png", blob), problem)


def test_png_cut_anywhere_near_a_chunk_boundary_is_refused(tmp_path):
    blob = png(text_chunk(b"chara", V1), text_chunk(b"ccv3", V3, b"zTXt"), text_chunk(b"x", V1, b"iTXt"))
    boundaries, start = {0, 8}, 8
    while start < len(blob):
        start += 12 + int.from_bytes(blob[start : start + 4], "big")
        boundaries.add(start)
    cuts = {at + shift for at in boundaries for shift in (-5, -4, -1, 0, 1, 4, 8)} | set(range(0, len(blob), 37))
    for cut in sorted(cut for cut in cuts if 0 <= cut < len(blob)):
        with pytest.raises(InputError):
            Persona.load(put(tmp_path, "c.png", blob[:cut]))
    assert Persona.load(put(tmp_path, "c.png", blob)).name == "Mira"


@pytest.mark.parametrize("suffix", [".json", ".png", ".charx"])
def test_random_and_mutated_bytes_raise_nothing_but_input_error(tmp_path, suffix):
    rng = random.Random(7)
    good = {".json": json.dumps(V3).encode(), ".charx": charx(V3)}
    good[".png"] = png(text_chunk(b"chara", V1), text_chunk(b"ccv3", V3, b"zTXt"))
    refusals = 0
    for turn in range(400):
        blob = bytearray(good[suffix])
        if turn % 4 == 0:
            blob = bytearray(SIGNATURE * (turn % 8 == 0) + rng.randbytes(rng.randrange(300)))
        elif turn % 4 == 1:
            at = rng.randrange(len(blob))
            del blob[at : at + rng.randrange(1, 40)]
        else:
            # The last bytes of a zip are its directory, which steers the reader.
            first = len(blob) - 90 if turn % 4 == 2 else 0
            for _ in range(rng.randrange(1, 6)):
                blob[rng.randrange(first, len(blob))] = rng.randrange(256)
        try:
            assert isinstance(Persona.load(put(tmp_path, "c" + suffix, bytes(blob))), Persona)
        except InputError:
            refusals += 1
    assert refusals > 100


def peak_memory(work):
    """Most bytes held at once while `work` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_compressed_cards_are_bounded_while_they_are_read(tmp_path):
    stream = zlib.compressobj(1)
    deflated = b"".join([stream.compress(bytes(1 << 20)) for _ in range(100)]) + stream.flush()
    for name, blob, problem in [
        ("z.png", png(png_chunk(b"zTXt", b"chara\0\0" + deflated)), "decompresses to more than"),
        ("i.png", png(png_chunk(b"iTXt", b"ccv3\0\1\0\0\0" + deflated)), "decompresses to more than"),
        ("z.charx", charx(bytes(100 << 20)), "larger than 8 MiB"),
    ]:
        path = put(tmp_path, name, blob)
        assert peak_memory(lambda path=path, problem=problem: refused(path, problem)) < 50 << 20


def test_a_long_comment_takes_no_memory_for_each_of_its_braces():
    persona = Persona.from_card(V1)
    assert persona.resolve("{{// " + "{{a}}" * 50 + "}}") == ""
    text = "{{// " + "{{a}}" * 100_000
    assert peak_memory(lambda: persona.resolve(text)) < 4 * len(text)


def test_sizes_are_bounded(tmp_path):
    spaces = b'{"description": "a b"}' + b" " * MAX_CARD
    refused(put(tmp_path, "c.charx", charx(spaces)), "larger than 8 MiB")
    refused(put(tmp_path, "c.png", png(png_chunk(b"tEXt", b"chara\0" + base64.b64encode(spaces)))), "larger than 8 MiB")
    refused(put(tmp_path, "n.charx", charx(V1) + b"PK\1\2" * (MAX_ZIP_ENTRIES + 1)), "entries")
    for name, size, problem in [
        ("big.json", 1 << 36, "larger than 8 MiB"),
        ("big.png", MAX_FILE + 1, "larger than 64 MiB"),
        ("big.charx", MAX_FILE + 1, "larger than 64 MiB"),
    ]:
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)  # sparse: takes no disk
        refused(tmp_path / name, problem)


@pytest.mark.parametrize(
    "piece", ["{{//", "{{// {{char}} ", "{{//{{a}}", "{{//a} ", "{{ ", "{{comment: }", "<START>", "<char"]
)
def test_macros_take_linear_time(piece):
    text = piece * (200_000 // len(piece))
    started = time.perf_counter()
    persona = Persona("Mira", text, example_dialogue=text)
    assert "Mira" in persona.system_prompt()
    assert time.perf_counter() - started < 2


def test_broken_archives(tmp_path):
    assert Persona.load(put(tmp_path, "s.charx", charx(V3, compression=zipfile.ZIP_STORED))) == Persona.from_card(V3)
    encrypted = bytearray(charx(V1))
    encrypted[6] |= 1
    encrypted[encrypted.rindex(b"PK\1\2") + 8] |= 1
    wrong_crc = charx(V1, compression=zipfile.ZIP_STORED).replace(b"blacksmith", b"blackbirds")
    for blob, problem in [
        (b"", "no card.json can be read"),
        (b"PK\3\4 and nothing more", "no card.json can be read"),
        (charx(V1, name="assets/card.json"), "no card.json can be read"),
        (charx(V1, compression=zipfile.ZIP_LZMA), "unusual"),
        (bytes(encrypted), "encrypted"),
        (wrong_crc, "CRC"),
    ]:
        refused(put(tmp_path, "c.charx", blob), problem)


@pytest.mark.parametrize("suffix", [".json", ".png", ".charx", ".PNG"])
@pytest.mark.parametrize("card", [V1, V3, {"spec": "chara_card_v2", "spec_version": "2.0", "data": {**V1, "x": 1}}])
def test_save_and_load_keep_every_field(tmp_path, suffix, card):
    persona = Persona.from_card({**card, "description": V1["description"]})
    path = tmp_path / f"c{suffix}"
    persona.save(path)
    again = Persona.load(path)
    assert again == persona and again.fingerprint == persona.fingerprint
    assert (again.raw["spec"], again.raw["spec_version"]) == ("chara_card_v3", "3.0")
    assert again.raw["data"].items() >= card.get("data", card).items()
    assert again.raw.get("unknown_top") == card.get("unknown_top")
    assert again.to_card() == again.raw
    assert os.listdir(tmp_path) == [path.name]


def test_to_card_of_a_text_is_a_complete_v3_card():
    card = Persona.from_text("Mira is a blacksmith.").to_card()
    assert card["spec"] == "chara_card_v3" and card["spec_version"] == "3.0"
    required = {"name", "description", "tags", "creator", "character_version", "mes_example", "extensions"}
    required |= {"system_prompt", "post_history_instructions", "first_mes", "alternate_greetings", "personality"}
    required |= {"scenario", "creator_notes", "group_only_greetings"}
    assert required <= set(card["data"])
    assert Persona.from_card(card) == Persona.from_text("Mira is a blacksmith.")


def test_edits_are_saved_over_the_card_as_read():
    hybrid = {**V1, **V3}  # V1 fields repeated beside data, as some front ends write
    edited = dataclasses.replace(Persona.from_card(hybrid), description="Mira is retired.", tags=("old",)).to_card()
    assert edited["description"] == edited["data"]["description"] == "Mira is retired."
    assert edited["data"]["tags"] == ["old"] and edited["data"]["from_the_future"] == V3["data"]["from_the_future"]


def test_png_save_replaces_old_cards_and_keeps_the_picture(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow draws the picture")
    buffer = io.BytesIO()
    picture = image.effect_noise((16, 12), 60)
    picture.save(buffer, "PNG")
    old = {**V1, "name": "Old"}
    blob = buffer.getvalue()
    stale = [text_chunk(b"ccv3", old), text_chunk(b"chara", old, b"zTXt"), text_chunk(b"Chara", old, b"iTXt")]
    blob = blob[:33] + b"".join([*stale, png_chunk(b"tEXt", b"Comment\0kept")]) + blob[33:]
    path = tmp_path / "c.png"
    Persona.from_card(V3).save(path, image=blob)
    written = path.read_bytes()
    assert text_keywords(written) == [b"chara", b"ccv3", b"Comment"]
    assert Persona.load(path).name == "Mira"
    with image.open(path) as reopened:
        assert reopened.tobytes() == picture.tobytes()
        v2 = json.loads(base64.b64decode(reopened.text["chara"]))
        v3 = json.loads(base64.b64decode(reopened.text["ccv3"]))
    assert (v2["spec"], v2["spec_version"], v3["spec"]) == ("chara_card_v2", "2.0", "chara_card_v3")
    assert v3["data"]["creator_notes"] == "notes"
    assert v2["data"]["creator_notes"].endswith("\nnotes") and v2["data"]["description"] == V1["description"]
    for _ in range(2):  # saving again must not pile up cards
        Persona.load(path).save(path, image=path.read_bytes())
    assert path.read_bytes() == written


def test_the_default_picture_is_a_valid_png(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow checks the picture")
    Persona.from_card(V1).save(tmp_path / "c.png")
    with image.open(tmp_path / "c.png") as picture:
        assert picture.size == (1, 1) and picture.getpixel((0, 0)) == 128


def test_save_refuses(tmp_path):
    persona = Persona.from_card(V1)
    for name, image, problem in [
        ("c.webp", None, "saved as"),
        ("c.json", png(), "only a .png"),
        ("c.png", b"GIF89a", "not a PNG"),
        ("c.png", b"", "not a PNG"),
        ("c.png", png()[:-3], "cut short"),
        ("c.png", SIGNATURE + png_chunk(b"IEND", b""), "IHDR"),
    ]:
        with pytest.raises(InputError, match=problem):
            persona.save(tmp_path / name, image=image)
    huge = dataclasses.replace(persona, scenario="x" * MAX_CARD)
    for name in ("c.json", "c.png", "c.charx"):
        with pytest.raises(InputError, match="larger than 8 MiB"):
            huge.save(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("suffix", [".json", ".png", ".charx"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, suffix):
    path = tmp_path / f"c{suffix}"
    path.write_bytes(b"the old file")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(RunError, match="No space left on device") as caught:
        Persona.from_card(V1).save(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"the old file" and os.listdir(tmp_path) == [path.name]


def test_an_interrupted_save_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Persona.from_card(V1).save(tmp_path / "c.json")
    assert os.listdir(tmp_path) == []


def test_save_makes_the_folder_and_refuses_to_go_below_a_file(tmp_path):
    Persona.from_card(V1).save(tmp_path / "new" / "c.json")
    assert Persona.load(tmp_path / "new" / "c.json") == Persona.from_card(V1)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError, match="could not write"):
        Persona.from_card(V1).save(tmp_path / "file" / "c.json")
    assert issubclass(RunError, PersonaPrunerError) and not issubclass(RunError, InputError)
