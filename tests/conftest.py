"""Makes `ptxsim` (tests/ptxsim, the PTX simulator) importable, and counts what was skipped because there is no GPU."""

import re
import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.append(HERE)

WANTS_GPU = re.compile(r"\bGPU|CUDA device|CUDA tensors|_cuda is not built")


def pytest_terminal_summary(terminalreporter):
    reasons = [str(report.longrepr[-1]) for report in terminalreporter.stats.get("skipped", ())]
    count = sum(bool(WANTS_GPU.search(reason)) for reason in reasons)
    terminalreporter.write_line(f"{count} test{'' if count == 1 else 's'} did not run for want of a GPU")
