"""A run of the suite ends by counting what did not run for want of a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "reasons, line",
    [
        (["no CUDA device", "it runs on GPU tensors, not cpu", "nvcc is not installed"], "2 tests did not run"),
        (["it takes CUDA tensors", "triton is not installed"], "1 test did not run"),
        ([], "0 tests did not run"),
    ],
)
def test_the_count(tmp_path, reasons, line):
    (tmp_path / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    tests = [f"def test_{number}(): pytest.skip({why!r})" for number, why in enumerate(reasons)]
    (tmp_path / "test_it.py").write_text("\n".join(["import pytest", "def test_else(): pass", *tests]))
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"\n{line} for want of a GPU\n" in done.stdout
