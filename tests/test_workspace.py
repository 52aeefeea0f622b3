"""Stage artefacts: read for the same key only, damage counts as absence."""

import json

import pytest
import torch
from limits import files_up_to

from persona_pruner.errors import RunError
from persona_pruner.workspace import Workspace, stored_held_out


def test_values(tmp_path):
    work, made = Workspace(tmp_path / "stages"), []

    def make():
        made.append(1)
        return {"answers": [[1, 2], []], "text": "żółć\u2028"}

    assert work.read("a", "k") is None and not (tmp_path / "stages").exists()
    first = work.value("a", "k", make)
    assert Workspace(tmp_path / "stages").value("a", "k", make) == first and len(made) == 1
    assert work.read("a", "other") is None
    work.value("a", "other", make)
    assert len(made) == 2 and work.read("a", "k") is None  # one value a name
    work.forget("a")
    work.forget("a")
    assert work.read("a", "other") is None


@pytest.mark.parametrize("empty", [[], {}, 0, False, ""])
def test_empty_values_are_values(tmp_path, empty):
    work = Workspace(tmp_path)
    work.write("a", "k", empty)
    assert work.value("a", "k", lambda: 1 / 0) == empty


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"key": "k"', '{"value": 1}', "\xff"])
def test_damaged_values_count_as_absent(tmp_path, text):
    work = Workspace(tmp_path)
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    assert work.read("a", "k") is None and work.value("a", "k", lambda: 3) == 3 == work.read("a", "k")


def test_tensors(tmp_path):
    work = Workspace(tmp_path)
    assert work.read_tensors("s", "k") is None
    wide = torch.randn(6, 4)
    tensors = {"a": wide.T, "b": torch.arange(3), "empty": torch.zeros(0), "leaf": torch.ones(2, requires_grad=True)}
    work.write_tensors("s", "k", tensors)
    stored = work.read_tensors("s", "k")
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in tensors)
    assert work.read_tensors("s", "other") is None
    whole = (tmp_path / "s.safetensors").read_bytes()
    for part in (b"", whole[:5], whole[:-1], b"x" * len(whole)):
        (tmp_path / "s.safetensors").write_bytes(part)
        assert work.read_tensors("s", "k") is None


def test_without_a_folder_everything_is_computed():
    work, made = Workspace(None), []
    for _ in range(2):
        assert work.value("a", "k", lambda: made.append(1) or 5) == 5
    work.write_tensors("s", "k", {"a": torch.ones(1)})
    work.forget("a")
    assert len(made) == 2 and work.read_tensors("s", "k") is None


def test_a_full_disk_leaves_the_old_value(tmp_path):
    work = Workspace(tmp_path)
    work.write("a", "k", "short")
    work.write_tensors("s", "k", {"a": torch.ones(2)})
    with files_up_to(1000), pytest.raises(RunError, match=r"could not write .*a\.json"):
        work.write("a", "k", "long" * 1000)
    with files_up_to(1000), pytest.raises(RunError, match=r"could not write .*s\.safetensors"):
        work.write_tensors("s", "k", {"a": torch.ones(2000)})
    assert work.read("a", "k") == "short" and len(work.read_tensors("s", "k")["a"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "s.safetensors"]


def test_stored_held_out(tmp_path):
    assert stored_held_out(tmp_path) is None is stored_held_out(tmp_path / "persona.persona.safetensors")
    held_out = {"questions": ["Who?"], "answers": [[1]]}
    Workspace(tmp_path / "stages").write("held_out", "k", held_out)
    assert json.loads((tmp_path / "stages" / "held_out.json").read_text())["key"] == "k"
    (tmp_path / "persona.persona.safetensors").touch()
    assert stored_held_out(tmp_path) == held_out == stored_held_out(tmp_path / "persona.persona.safetensors")
    (tmp_path / "stages" / "held_out.json").write_text("{")
    assert stored_held_out(tmp_path) is None  # a damaged one counts as absent
