"""benchmarks/gpu_check.py --short finds nothing to complain about, and does complain when there is something."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gpusim
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.py"
pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(gpusim.NVCC is None, reason="nvcc is not installed")


def test_short_check_passes(tmp_path):
    command = [sys.executable, "-P", SCRIPT, "--short", "--json", tmp_path / "check.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "check.json").read_text())
    assert not result["problems"] and {row["op"] for row in result["code"]} >= {"linear24", "select24"}
    assert any("decode" in row["kernel"] for row in result["traffic"])


def test_each_limit_is_applied():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    check = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = check
    spec.loader.exec_module(check)
    code = {"op": "linear24", "kernel": "linear24_decode_f16_1", "target": "sm_80", "spills": 0}
    code |= {"sparse mma": 8, "LDG.128": 9}
    traffic = {"kernel": "decode_f16_1", "case": "", "bank conflicts": 1.0, "DRAM / least": 1.0}
    assert not check.problems([code], [traffic])
    for row, change in ((code, {"spills": 1}), (code, {"sparse mma": 0}), (traffic, {"bank conflicts": 1.5}),
                        (traffic, {"DRAM / least": 1.06})):  # fmt: skip
        changed = row | change
        assert len(check.problems([changed] if row is code else [], [changed] if row is traffic else [])) == 1
