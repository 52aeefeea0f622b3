"""Makes `ptxsim` (tests/ptxsim, the PTX simulator) importable; nothing else belongs here."""

import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.append(HERE)
