"""ptxsim: run NVIDIA PTX on the CPU to check kernels for correctness (see README.md)."""

from .build import TritonKernel, compile_cuda, compile_triton
from .errors import PtxError, SimError, Unsupported
from .fp import from_bf16, to_bf16
from .launch import Module, Stats
from .traffic import Traffic

__all__ = [
    "Module",
    "PtxError",
    "SimError",
    "Stats",
    "Traffic",
    "TritonKernel",
    "Unsupported",
    "compile_cuda",
    "compile_triton",
    "from_bf16",
    "to_bf16",
]
