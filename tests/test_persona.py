"""Persona: every format round trip, macros, and cards that are broken, huge or hostile."""

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
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_pruner.errors import InputError, PersonaPrunerError, RunError
from persona_pruner.persona import MAX_CARD, MAX_DEPTH, MAX_FILE, MAX_ZIP_ENTRIES, Persona

CARDS = Path(__file__).parents[1] / "examples" / "cards"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
V1 = {
    "name": "Mira",
    "description": "{{char}} is a blacksmith who owes {{user}} a sword.",
    "personality": "gruff",
    "scenario": "A forge at dusk.",
    "first_mes": "Mind the sparks, {{user}}.",
    "mes_example": "<START>\n{{user}}: hi\n{{char}}: Hm.\n<start>\n{{user}}: bye\n{{char}}: Shut the door.",
}
V3 = {
    "spec": "chara_card_v3",
    "spec_version": "3.0",
    "unknown_top": {"kept": [1, None]},
    "data": {
        **V1,
        "nickname": "Smith",
        "system_prompt": "",
        "post_history_instructions": "Stay {{char}}.",
        "alternate_greetings": ["You again, <USER>."],
        "tags": ["fantasy"],
        "creator_notes": "notes",
        "extensions": {"other/app": {"x": 1}},
        "assets": [{"type": "icon", "uri": "ccdefault:", "name": "main", "ext": "png"}],
        "character_book": {"entries": [{"keys": ["sword"], "content": "It broke.", "extensions": {}}]},
        "from_the_future": "ünïcode 剣 🔥",
    },
}


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return SIGNATURE + header + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(b"\0\0")) + png_chunk(b"IEND", b"")


def text_chunk(keyword, card, kind=b"tEXt"):
    text = base64.b64encode(json.dumps(card).encode())
    if kind == b"zTXt":
        return png_chunk(kind, keyword + b"\0\0" + zlib.compress(text))
    if kind == b"iTXt":
        return png_chunk(kind, keyword + b"\0\0\0en\0Karte\0" + text)
    if kind == b"iTXt compressed":
        return png_chunk(b"iTXt", keyword + b"\0\1\0\0\0" + zlib.compress(text))
    return png_chunk(kind, keyword + b"\0" + text)


def text_keywords(blob):
    """Keywords of the text chunks in order, by an independent walk that checks every checksum."""
    found, start = [], 8
    while start < len(blob):
        end = start + 8 + int.from_bytes(blob[start : start + 4], "big")
        kind, body = blob[start + 4 : start + 8], blob[start + 8 : end]
        assert zlib.crc32(kind + body) == int.from_bytes(blob[end : end + 4], "big")
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            found.append(body.split(b"\0")[0])
        start = end + 4
    return found


def charx(card, name="card.json", compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(name, card if isinstance(card, bytes) else json.dumps(card))
    return buffer.getvalue()


def put(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def refused(path, problem):
    """Loading fails with one line that names the file and the problem."""
    with pytest.raises(InputError) as caught:
        Persona.load(path)
    message = str(caught.value)
    assert str(path) in message and problem in message and "\n" not in message
    assert message.count(str(path)) == 1


# Text


@pytest.mark.parametrize("text", ["", "  \n\t ", "blacksmith", " blacksmith\n", "剣", None, 7, "bad \ud800 text"])
def test_from_text_refuses_what_describes_nobody(text):
    with pytest.raises(InputError):
        Persona.from_text(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Mira is a blacksmith.", "Mira"),
        ("  Mira Venn, a blacksmith, works late.", "Mira Venn"),
        ("Ludwig van Beethoven is a composer.", "Ludwig van Beethoven"),
        ("You are Captain Orrin, who flies.", "Captain Orrin"),
        ("Élodie is a baker.", "Élodie"),
        ("He is a baker.", "Character"),
        ("A baker is up early.", "Character"),
        ("As the queen bee, I, Blair, rule.", "Character"),
        ("Quiet, thoughtful man.", "Character"),
        ("a grumpy old blacksmith", "Character"),
        ("疲れた灯台守の男である。", "Character"),
    ],
)
def test_name_is_guessed_from_the_opening_words(text, name):
    assert Persona.from_text(text).name == name
    assert Persona.from_text(text, name="Zed").name == "Zed"
    assert Persona.from_text(text).description == text.strip()


def test_default_system_prompt_of_a_text():
    assert Persona.from_text("Mira is a blacksmith.").system_prompt() == (
        "You are roleplaying as Mira, a character with this persona: Mira is a blacksmith.\n"
        "Answer as Mira would, in the first person and in character."
    )


def test_load_tells_descriptions_from_files(tmp_path):
    assert Persona.load("Mira is a blacksmith.") == Persona.from_text("Mira is a blacksmith.")
    assert Persona.load("Mira is a blacksmith.\n" * 500).name == "Mira"  # longer than any file name may be
    for name in ("m.txt", "m.MD"):
        assert Persona.load(put(tmp_path, name, b"\xef\xbb\xbfMira is a blacksmith.\n")).name == "Mira"
        assert Persona.load(str(tmp_path / name)).description == "Mira is a blacksmith."
    for name in ("gone.json", "gone.png", "gone.charx", "gone.txt", "two words.PNG"):
        with pytest.raises(InputError, match="no such file"):
            Persona.load(name)
    refused(tmp_path / "gone", "no such file")
    refused(put(tmp_path, "m.webp", b"RIFF"), "a persona file ends in")
    refused(put(tmp_path, "latin.txt", b"caf\xe9 owner"), "utf-8")
    refused(put(tmp_path, "one.txt", b"blacksmith"), "at least two words")
    refused(put(tmp_path, "big.txt", b"a b" * MAX_CARD), "larger than 8 MiB")
    (tmp_path / "folder.json").mkdir()
    refused(tmp_path / "folder.json", "no such file")
    with pytest.raises(InputError, match="cannot be read"):
        Persona.from_card(tmp_path / "folder.json")
    with pytest.raises(InputError, match="card is a"):
        Persona.from_card("m.yaml")


# Reading cards


def test_v1_v2_and_v3_say_the_same(tmp_path):
    v2 = {"spec": "chara_card_v2", "spec_version": "2.0", "data": V1}
    v3 = {"spec": "chara_card_v3", "spec_version": "3.0", "data": V1}
    personas = [Persona.load(put(tmp_path, f"{i}.json", card)) for i, card in enumerate([V1, v2, v3])]
    assert personas[0] == personas[1] == personas[2]
    assert hash(personas[0]) == hash(personas[2])
    persona = personas[0]
    assert (persona.name, persona.personality, persona.scenario) == ("Mira", "gruff", "A forge at dusk.")
    assert persona.first_message == V1["first_mes"] and persona.example_dialogue == V1["mes_example"]
    assert [p.raw for p in personas] == [V1, v2, v3]


def test_v3_fields():
    persona = Persona.from_card(V3)
    assert persona.nickname == "Smith" and persona.tags == ("fantasy",)
    assert persona.alternate_greetings == ("You again, <USER>.",)
    assert persona.post_history_instructions == "Stay {{char}}."
    assert persona.raw == V3 and persona.raw is not V3


def test_the_dict_given_is_not_shared():
    card = json.loads(json.dumps(V3))
    persona = Persona.from_card(card)
    card["data"]["tags"].append("later")
    persona.to_card()["data"]["extensions"].clear()
    assert persona.raw == V3


@pytest.mark.parametrize("version", ["3.0", "3.7", "4", 9.5, "newest", None, [], "1e999"])
def test_any_spec_version_is_read_and_a_newer_one_is_kept(version):
    persona = Persona.from_card({**V3, "spec_version": version})
    assert persona == Persona.from_card(V3)
    expected = {"3.7": "3.7", "4": "4", 9.5: "9.5"}.get(version, "3.0") if not isinstance(version, list) else "3.0"
    assert persona.to_card()["spec_version"] == expected


def test_missing_and_null_fields_are_empty():
    persona = Persona.from_card({"description": "Orrin is a keeper.", "scenario": None, "tags": None})
    assert (persona.name, persona.scenario, persona.tags) == ("Orrin", "", ())
    only = Persona.from_card({"name": "Orrin", "personality": "weary"})
    assert only.system_prompt().count("weary") == 1


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        ({"name": "Mira"}, "neither a description nor a personality"),
        ({"name": "Mira", "description": " ", "personality": "\n"}, "neither a description nor a personality"),
        ({**V1, "description": ["a"]}, "description must be text"),
        ({**V1, "name": 3}, "name must be text"),
        ({**V1, "mes_example": {}}, "mes_example must be text"),
        ({**V1, "tags": "fantasy"}, "tags must be a list of texts"),
        ({**V1, "alternate_greetings": ["a", 1]}, "alternate_greetings must be a list of texts"),
        ({"spec": "chara_card_v2"}, "not a character card"),
        ({"spec": "chara_card_v2", "data": [V1]}, "not a character card"),
        ({"spec": "lorebook_v3", "data": V1}, "not a character card"),
        ({"spec": 5, "data": V1}, "not a character card"),
        ([V1], "must be a JSON object, not list"),
        ("Mira", "must be a JSON object, not str"),
        (b"", "not valid UTF-8 JSON"),
        (b"{'name': 1}", "not valid UTF-8 JSON"),
        (b'{"description": "\xff\xfe x"}', "not valid UTF-8 JSON"),
        (b'{"description": "half \\ud800 pair"}', "not valid UTF-8 JSON"),
        (b'{"description": "a b", "extensions": NaN}', "not valid UTF-8 JSON"),
        (b'{"description": ' + b"9" * 5000 + b"}", "not valid UTF-8 JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"x":' + b"[" * MAX_DEPTH + b"1" + b"]" * MAX_DEPTH + b"}", "nested more than"),
    ],
)
def test_bad_cards_are_refused_in_every_wrapping(tmp_path, card, problem):
    blob = card if isinstance(card, bytes) else json.dumps(card).encode()
    refused(put(tmp_path, "c.json", blob), problem)
    refused(put(tmp_path, "c.png", png(png_chunk(b"tEXt", b"chara\0" + base64.b64encode(blob)))), problem)
    refused(put(tmp_path, "c.charx", charx(blob)), problem)


def test_nesting_up_to_the_limit_is_read():
    inner = 1
    for _ in range(MAX_DEPTH - 1):
        inner = [inner]
    assert Persona.from_card({**V1, "deep": inner}).raw["deep"] == inner
    with pytest.raises(InputError, match="nested more than"):
        Persona.from_card({**V1, "deep": [inner]})


def test_bad_dicts():
    loop = dict(V1)
    loop["self"] = loop
    for card in ({**V1, "x": {1, 2}}, loop, {**V1, "x": float("nan")}, {**V1, "description": "half \udc00 pair"}):
        with pytest.raises(InputError, match="card dict"):
            Persona.from_card(card)


@pytest.mark.parametrize("path", sorted(CARDS.glob("*.*")), ids=lambda path: path.name)
def test_example_cards_load(path, tmp_path):
    persona = Persona.load(path)
    assert persona.name != "Character"
    assert "{{" not in persona.system_prompt() + persona.greeting()
    persona.save(tmp_path / "again.png")
    assert Persona.load(tmp_path / "again.png").fingerprint == persona.fingerprint


def test_there_are_example_cards():
    assert list(CARDS.glob("*.json")) and list(CARDS.glob("*.png"))


# PNG


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


# Bombs


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


# Zip


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


# The published question sets


def question_set(description, prefix=""):
    task = "Answer the question, roleplay as the given persona."
    prompt = f"{prefix}You are roleplaying as a user with this persona: {description}\n{task}{prefix}"
    return {"instruction": [{"pos": prompt, "neg": ""}], "eval_prompt": "{question} {answer}", "questions": ["Why?"]}


@pytest.mark.parametrize("prefix", ["", "\n"])
def test_question_set(tmp_path, prefix):
    card = question_set("Orrin Vale is a keeper, weary of ships.\nHe drinks tea.", prefix)
    persona = Persona.load(put(tmp_path, "specific_user_0.json", card))
    assert persona.name == "Orrin Vale"
    assert persona.description == "Orrin Vale is a keeper, weary of ships.\nHe drinks tea."
    assert persona.system_prompt() == card["instruction"][0]["pos"]
    persona.save(tmp_path / "as_card.png")
    again = Persona.load(tmp_path / "as_card.png")
    assert again == persona and again.fingerprint == persona.fingerprint
    assert again.raw["questions"] == ["Why?"]


@pytest.mark.parametrize("instruction", [[], {}, None, [1], [{}], [{"pos": 3}], [{"pos": " "}]])
def test_broken_question_set(tmp_path, instruction):
    refused(put(tmp_path, "q.json", {"instruction": instruction, "questions": []}), "instruction[0].pos")


# Prompts and macros


def test_system_prompt_of_a_card():
    persona = Persona.from_card(V1)
    assert persona.system_prompt(user="Ann") == (
        "You are roleplaying as Mira, a character with this persona: Mira is a blacksmith who owes Ann a sword.\n"
        "Personality: gruff\nScenario: A forge at dusk.\nExample dialogue:\n"
        "Ann: hi\nMira: Hm.\nAnn: bye\nMira: Shut the door.\n"
        "Answer as Mira would, in the first person and in character."
    )
    assert persona.example_dialogues == (
        "{{user}}: hi\n{{char}}: Hm.",
        "{{user}}: bye\n{{char}}: Shut the door.",
    )


def test_original_stands_for_the_default_prompt():
    plain = Persona.from_card(V1)
    own = dataclasses.replace(plain, system_prompt_template="Be {{char}}.")
    assert own.system_prompt() == "Be Mira."
    around = dataclasses.replace(plain, system_prompt_template="[{{ORIGINAL}}] \\1 {{original}}")
    assert around.system_prompt() == f"[{plain.system_prompt()}] \\1 {plain.system_prompt()}"
    blank = dataclasses.replace(plain, system_prompt_template=" \n")
    assert blank.system_prompt() == plain.system_prompt()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{char}} {{CHAR}} {{Char}} {{ char }}", "Smith Smith Smith Smith"),
        ("<BOT> <bot> <Bot> <char>", "Smith Smith Smith Smith"),
        ("{{user}} {{USER}} <USER> <user>", "Ann Ann Ann Ann"),
        ("a{{// hidden}}b{{comment: seen}}c{{COMMENT:x}}d", "abcd"),
        ("a{{// for {{user}} and {a} brace\nnext line }}b", "ab"),
        *[(text, text) for text in ("{{random:a,b}} {{roll:6}} {{original}} {char} {{chars}}", "{{// never closed")],
    ],
)
def test_macros(text, expected):
    persona = Persona.from_card(V3)
    assert persona.resolve(text, user="Ann") == expected
    assert dataclasses.replace(persona, first_message=text).greeting(user="Ann") == expected


def test_a_replaced_value_is_not_resolved_again():
    assert Persona.from_card(V1).resolve("{{user}} and {{char}}", user="{{char}}") == "{{char}} and Mira"


def test_greetings():
    persona = Persona.from_card(V3)
    assert persona.greeting() == "Mind the sparks, User."
    assert persona.greeting(1, user="Ann") == "You again, Ann."
    for index in (2, -1):
        with pytest.raises(InputError, match="greetings 0 to 1"):
            persona.greeting(index)


def test_fingerprint_follows_the_prompt_only():
    persona = Persona.from_card(V3)
    assert len(persona.fingerprint) == 64 and int(persona.fingerprint, 16)
    assert dataclasses.replace(persona, tags=(), first_message="Hi.").fingerprint == persona.fingerprint
    assert dataclasses.replace(persona, scenario="A ship.").fingerprint != persona.fingerprint


# Writing


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


def test_save_into_a_missing_folder_or_below_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "gone" / "c.json", tmp_path / "file" / "c.json"):
        with pytest.raises(RunError, match="cannot be written"):
            Persona.from_card(V1).save(path)
    assert issubclass(RunError, PersonaPrunerError) and not issubclass(RunError, InputError)


words = st.text(max_size=40)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
known = {key: words for key in (*V1, "system_prompt", "nickname") if key != "description"}
known |= {key: st.lists(words, max_size=3) for key in ("alternate_greetings", "tags")}
some_keys = st.sampled_from(["spec", "data", "instruction", "description", "name", "tags"])


@settings(max_examples=40, deadline=None)
@given(
    data=st.fixed_dictionaries({"description": words.map(lambda text: f"Mira {text}")}, optional=known),
    extra=st.dictionaries(words.map(lambda key: f"x_{key}"), json_values, max_size=3),
    wrapped=st.booleans(),
)
def test_any_card_survives_to_card(data, extra, wrapped):
    card = {"spec": "chara_card_v2", "data": {**data, **extra}, **extra} if wrapped else {**data, **extra}
    persona = Persona.from_card(card)
    written = persona.to_card()
    again = Persona.from_card(written)
    assert again == persona and again.fingerprint == persona.fingerprint and again.to_card() == written
    assert written["data"].items() >= extra.items()


@settings(max_examples=150, deadline=None)
@given(card=st.dictionaries(some_keys, json_values))
def test_any_json_object_is_a_persona_or_an_input_error(card):
    try:
        persona = Persona.from_card(card)
    except InputError as error:
        assert str(error).startswith("card dict: ")
    else:
        assert persona.name and persona.system_prompt() and persona.to_card()
