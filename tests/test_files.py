"""Files are whole or not there, and a full disk is one sentence."""

import json
import os

import pytest
import torch
from limits import files_up_to
from safetensors.torch import save_file

from persona_pruner import files
from persona_pruner.errors import InputError, RunError


def old(folder):
    (folder / "x").mkdir()
    (folder / "x" / "old").write_text("old")
    return folder / "x"


def test_json_round_trips(tmp_path):
    value = {"ż": [1, 2.5, None, "a\u2028b\x85c"]}
    assert files.read_json(files.write_json(tmp_path / "new" / "a.json", value)) == value
    rows = [value, "text\u2028", 3]
    assert files.read_jsonl(files.write_jsonl(tmp_path / "a.jsonl", rows)) == rows
    assert os.stat(tmp_path / "a.jsonl").st_mode & 0o777 == 0o644
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "new"]


def test_bad_json_is_named(tmp_path):
    for name, read in (("a.json", files.read_json), ("a.jsonl", files.read_jsonl)):
        for data in (b"{", b"\xff", b"[" * 100_000):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(InputError, match=name):
                read(tmp_path / name)
        with pytest.raises(InputError, match=r"cannot read .*No such file"):
            read(tmp_path / f"no-{name}")


@pytest.mark.parametrize("kind", ["text", "tensors"])
def test_full_disk(tmp_path, kind):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        if kind == "text":
            temporary.write_text("x" * 10_000)
        else:
            save_file({"x": torch.zeros(10_000)}, temporary)

    with pytest.raises(RunError, match=r"could not write .*file: .*File too large"), files_up_to(4096):
        files.write_file(path, write)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(RunError, match=r"could not write .*folder: .*File too large"), files_up_to(4096):
        files.write_folder(tmp_path / "folder", lambda folder: write(folder / "inside"))
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_is_replaced(tmp_path):
    path = old(tmp_path)
    assert files.write_folder(path, lambda folder: files.write_text(folder / "new", "new")) == path
    assert os.listdir(path) == ["new"] and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_folder_survives_a_failed_exchange(tmp_path, monkeypatch, error, fails_at):
    path, rename, calls = old(tmp_path), os.rename, []

    def fail(*where):
        calls.append(where)
        if len(calls) == fails_at:
            raise error
        rename(*where)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt):
        files.write_folder(path, lambda folder: None)
    assert os.listdir(path) == ["old"] and os.listdir(tmp_path) == ["x"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupt(path):
        (path / "half" if path.is_dir() else path).write_text("half")
        raise KeyboardInterrupt

    for write in (files.write_file, files.write_folder):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "x", interrupt)
    assert os.listdir(tmp_path) == []


def test_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (files.write_file, files.write_folder):
        with pytest.raises(RunError, match="could not write"):
            write(tmp_path / "file" / "x", lambda path: None)


def test_digests(tmp_path):
    assert files.digest({"a": 1, "b": 2}) == files.digest({"b": 2, "a": 1}) != files.digest({"a": 1, "b": 3})
    (tmp_path / "x").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.file_digest(tmp_path / "x") == known and json.dumps(files.digest("x"))
