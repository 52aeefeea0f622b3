"""Finds the native modules: which were built, and which this processor can run."""

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType

import torch  # loaded first, so that the modules bind to torch's libgomp and share its thread pool

from persona_pruner.errors import InputError
from persona_pruner.processor import ISAS, cpu_flags


@cache
def cpu_isa() -> str:
    """Instruction set in use; PERSONA_PRUNER_ISA forces a lower one (for tests and bug reports)."""
    wish = os.environ.get("PERSONA_PRUNER_ISA")
    if wish and wish not in ISAS:
        raise InputError(f"PERSONA_PRUNER_ISA={wish} is not one of {', '.join(ISAS)}")
    for isa, needs in ISAS.items():
        if (wish or isa) == isa and needs - ({"AuthenticAMD"} if wish else set()) <= cpu_flags():
            return isa
    raise InputError(f"PERSONA_PRUNER_ISA={wish}: this processor lacks {', '.join(sorted(ISAS[wish] - cpu_flags()))}")


@cache
def cpu_module() -> ModuleType | str:
    """The CPU module for this processor, or a sentence that says why there is none."""
    name = f"persona_pruner._cpu_{cpu_isa()}"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"{name} is not built ({error})"


@cache
def cuda_module() -> ModuleType | str:
    """The CUDA module, or a sentence that says why there is none."""
    try:
        return importlib.import_module("persona_pruner._cuda")
    except ImportError as error:
        return f"persona_pruner._cuda is not built: nvcc was missing or PERSONA_PRUNER_CUDA=0 ({error})"


@cache
def triton_kernels(stem: str) -> ModuleType | str:
    """`persona_pruner.kernels.<stem>`, or a sentence that says why Triton cannot be used."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return "triton is not installed"
    return importlib.import_module(f"persona_pruner.kernels.{stem}")


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, and so on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_unavailable(stem: str) -> Callable[[str], str | None]:
    """For a Backend: why kernels/<stem>.py cannot run on tensors of a kind of device, or None."""

    def unavailable(device_type: str) -> str | None:
        if device_type != "cuda" and not interpreting():
            return f"it runs on GPU tensors, not {device_type} (TRITON_INTERPRET=1 interprets it on a CPU)"
        module = triton_kernels(stem)
        return module if isinstance(module, str) else None

    return unavailable


def processors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's GPU; a few for a CPU tensor, which is being interpreted or simulated."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """A context in which kernels are launched on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
