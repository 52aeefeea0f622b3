"""The persona file: round trip, refusals, and what a stranger's bytes may do (nothing)."""

import json
import random
import struct

import pytest
import torch

from persona_pruner import models
from persona_pruner.errors import InputError, RunError
from persona_pruner.formats.persona_file import SUFFIX, PersonaFile, pack_bits, unpack_bits
from persona_pruner.testing import FAMILIES, tiny_model


def masks_of(widths, share=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(width, generator=generator) < share for width in widths]


def a_file(**changes):
    values = {
        "name": "Mira", "system": "You are Mira, kovářka.\nBe brief.", "base": "smollm2-135m", "fingerprint": "f" * 64,
        "masks": masks_of([64, 64, 63]), "ratio": 0.25, "greeting": "Mind the sparks.",
        "metrics": {"kl": 0.5, "nll": {"dense": 1.7}, "steps": 24},
    }  # fmt: skip
    return PersonaFile(**{**values, **changes})


def equal(a, b):
    left, right = ({**vars(x), "masks": [m.tolist() for m in x.masks]} for x in (a, b))
    return left == right


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64, 1536])
def test_bits(width):
    (mask,) = masks_of([width])
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-width // 8),)
    assert torch.equal(unpack_bits(packed, width), mask)
    assert all(bool(packed[c // 8] >> (c % 8) & 1) == bool(mask[c]) for c in range(width))


def test_round_trip(tmp_path):
    path = a_file().save(tmp_path / f"mira{SUFFIX}")
    again = PersonaFile.load(path)
    assert equal(again, a_file()) and again.widths == [int(m.sum()) for m in again.masks]
    assert all(mask.dtype == torch.bool for mask in again.masks)
    a_file().save(tmp_path / "run" / f"persona{SUFFIX}")
    assert equal(PersonaFile.load(tmp_path / "run"), a_file())  # a run's folder will do
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [path.name]


def test_size_for_a_model_of_30_layers(tmp_path):
    path = a_file(masks=masks_of([1536] * 30), system="x" * 4000).save(tmp_path / f"x{SUFFIX}")
    assert path.stat().st_size < 16_000
    assert b"pickle" not in path.read_bytes() and not path.read_bytes().startswith((b"PK", b"\x80"))


@pytest.mark.parametrize("family", FAMILIES)
def test_apply(tmp_path, family):
    model, ids = tiny_model(family), torch.arange(3, 20)[None]
    masks = masks_of(models.widths(model))
    PersonaFile.of(model, "Mira", "You are Mira.", masks, base="tiny", ratio=0.3).save(tmp_path / f"x{SUFFIX}")
    loaded = PersonaFile.load(tmp_path / f"x{SUFFIX}")
    assert loaded.base == "tiny" and loaded.fingerprint == models.fingerprint(model)
    slimmed = loaded.apply(tiny_model(family))
    for layer, mask in zip(model.model.layers, masks, strict=True):
        layer.mlp.down_proj.weight[:, ~mask] = 0
    torch.testing.assert_close(slimmed(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert models.widths(slimmed) == loaded.widths
    with pytest.raises(InputError, match="does not fit"):
        loaded.apply(slimmed)  # pruned already


@pytest.mark.parametrize("other", ["qwen3", "mistral"])
def test_another_base_is_refused_with_a_sentence(other):
    file = PersonaFile.of(tiny_model(), "Mira", "s", masks_of([64] * 3), base="smollm2-135m")
    for model in (tiny_model(other), tiny_model(intermediate_size=96)):
        before = models.widths(model)
        with pytest.raises(InputError, match="persona 'Mira' was made for smollm2-135m and does not fit "):
            file.apply(model)
        assert models.widths(model) == before


def test_masks_that_lie(tmp_path):
    model = tiny_model()
    for masks in (masks_of([64] * 2), masks_of([64, 64, 72]), [torch.zeros(64, dtype=torch.bool)] * 3):
        with pytest.raises(InputError, match=r"the model has|keeps no channel"):
            PersonaFile.of(model, "Mira", "s", masks).apply(model)
    assert models.widths(model) == [64] * 3


def test_missing_and_foreign_files(tmp_path):
    from safetensors.torch import save_file

    for path in (tmp_path / "no", tmp_path):
        with pytest.raises(InputError, match="no persona file"):
            PersonaFile.load(path)
    save_file({"layer.0": torch.zeros(8, dtype=torch.uint8)}, tmp_path / "plain")
    save_file({"x": torch.zeros(1)}, tmp_path / "next", {"format": "persona-pruner/2"})
    for name in ("plain", "next"):
        with pytest.raises(InputError, match=f"{name} is not a persona file of format persona-pruner/1"):
            PersonaFile.load(tmp_path / name)
    (tmp_path / "pickle").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("pickle", "empty"):
        with pytest.raises(InputError, match=f"{name} is damaged"):
            PersonaFile.load(tmp_path / name)


def rewrite(path, change):
    """The file with its header's metadata changed."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + size])
    change(head)
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return path


@pytest.mark.parametrize(
    "field, value",
    [
        ("widths", "[64, 64]"),
        ("widths", "[64, 64, 63, 64]"),
        ("widths", "[64, 64, 90]"),
        ("widths", "[64, 64, -1]"),
        ("widths", "[64, 64, 63.5]"),
        ("widths", "[64, 64, true]"),
        ("widths", "7"),
        ("widths", "{}"),
        ("widths", "[]"),
        ("widths", "[" * 100_000),
        ("widths", "[1000000000000000000000, 64, 64]"),
        ("ratio", '"much"'),
        ("ratio", ""),
        ("metrics", "[1]"),
        ("metrics", "[" * 100_000),
        ("metrics", "1" * 5000),
    ],
)
def test_headers_that_lie(tmp_path, field, value):
    path = rewrite(a_file().save(tmp_path / "x"), lambda head: head["__metadata__"].update({field: value}))
    with pytest.raises(InputError, match="x is damaged") as caught:
        PersonaFile.load(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("field", ["name", "system", "base", "fingerprint", "method", "greeting", "ratio", "metrics"])
def test_headers_that_lack_a_field(tmp_path, field):
    path = rewrite(a_file().save(tmp_path / "x"), lambda head: head["__metadata__"].pop(field))
    with pytest.raises(InputError, match=f"x is damaged.*{field}"):
        PersonaFile.load(path)


def test_cut_short_or_changed_anywhere(tmp_path):
    path = a_file().save(tmp_path / "x")
    data, rng = path.read_bytes(), random.Random(0)

    def load(blob):
        path.write_bytes(blob)
        try:
            found = PersonaFile.load(path)
        except InputError as error:
            assert "\n" not in str(error)
            return False
        assert len(found.masks) == len(found.widths) and all(mask.dtype == torch.bool for mask in found.masks)
        return True

    assert load(data)
    assert not any(load(data[:length]) for length in range(0, len(data), 7))
    assert not load(data + b"\0")
    for _ in range(400):
        at = rng.randrange(len(data))
        load(data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :])
    for _ in range(100):
        load(data[:8] + rng.randbytes(rng.randrange(200)))


def test_a_full_disk(tmp_path, monkeypatch):
    import safetensors.torch

    def full(tensors, path, *rest):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    a_file().save(tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(RunError, match="No space left on device"):
        a_file(name="Other").save(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == before
