"""Benchmarks from the command: small, real runs; no time is asserted."""

import csv
import json

import pytest
import torch

from persona_pruner.cli import main
from persona_pruner.ops import _native


@pytest.mark.parametrize("threads", [1, 2])
def test_multiply_adds_are_done(threads):
    """The loop once had no result and was compiled to nothing: its peak was nine times the unit's."""
    total = torch.empty(1)
    lanes = _native.cpu_module().multiply_add(total.data_ptr(), 20_000, threads)
    assert total.item() == pytest.approx(10 * lanes * threads, rel=1e-3)  # every lane tends to 1
    lanes = _native.cpu_module().multiply_add(total.data_ptr(), 0, threads)
    assert total.item() == pytest.approx(45 * lanes * threads)


def test_bench_writes_what_it_measured(tmp_path, capsys):
    files = ["--csv", str(tmp_path / "a.csv"), "--json", str(tmp_path / "a.json")]
    before = torch.get_num_threads()
    try:
        main(["bench", "linear24", "--short", "--tokens", "1", "--budget", "0.01", "--threads", "1",
              "--plot", str(tmp_path / "a.png"), *files])  # fmt: skip
    except SystemExit as end:
        assert not end.code
    finally:
        torch.set_num_threads(before)
    assert "goal" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    written = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == len(written["rows"]) > 0 and written["machine"]["isa"] == _native.cpu_isa()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "nothing"])
    assert end.value.code == 2 and "linear24" in capsys.readouterr().err
