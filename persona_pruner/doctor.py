"""What this machine and this installation can do: versions, processor, threads, backends of every op."""

import importlib.metadata
import platform

import torch

from persona_pruner import __version__, models, ops
from persona_pruner.ops import _native

PACKAGES = ("torch", "transformers", "triton", "safetensors", "numpy", "gguf", "openai", "peft", "ray")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cusparselt() -> str:
    """What torch has of the vendor's 2:4 library, which the packed layers could be given to and are not."""
    library = torch.backends.cusparselt
    found = f"torch has {library.version()}" if library.is_available() else "not in this torch"
    return f"{found}; linear24 never calls it, `bench linear24 --device cuda` times it"


def report() -> dict:
    """Plain values: versions, processor, devices, and for every op and device each backend's state or the reason."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    cuda = _native.cuda_module()
    return {
        "persona_pruner": __version__,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "cpu": {
            "machine": platform.machine(),
            "isa": _native.cpu_isa(),
            "fast_bf16": bool(models.fast_dtype("cpu") == torch.bfloat16),
            "threads": torch.get_num_threads(),
        },
        "cuda": {
            "module": cuda if isinstance(cuda, str) else "built",
            "cusparselt": _cusparselt(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "ops": {device: {op.name: op.explain(device) for op in ops.OPS} for device in devices},
    }
