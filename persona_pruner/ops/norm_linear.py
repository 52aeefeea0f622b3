"""norm_linear: a linear layer for the few rows of a decode step, with what surrounds it.

    y = n W^T + bias + residual,    n = x                                                      without a norm
                                    n[t] = x[t] / sqrt(mean of x[t]^2 + eps) * norm            with one (RMSNorm)

x, y and residual are float32 and W is read once in its own type: float32, bfloat16, float16, or int8 with one float32
scale a row. Products and sums are float32. A row of y depends on that row of x alone, in every bit: not on the other
rows of the batch and not on the number of threads.
"""

import struct
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from persona_pruner.errors import InputError
from persona_pruner.ops import _native
from persona_pruner.ops._dispatch import Backend, Op
from persona_pruner.ops.plan import Call

WEIGHTS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "i8"}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of x^2 + eps) * weight over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def product(x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in the dtype of x, for a weight of any type of WEIGHTS (int8: times the scale of its row)."""
    y = F.linear(x, weight.to(x.dtype))
    if scales is not None:
        y = y * scales.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y float32 [T, N] for x float32 [T, K], weight [N, K], bias float32 [N], norm float32 [K], residual like y.

    weight: float32, bfloat16, float16, or int8 with scales float32 [N]. No gradients. float64 tensors throughout run in
    plain PyTorch. `backend`: 'cpu', 'reference', or None for the best one. Raises InputError naming the limit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise InputError(f"norm_linear: x {list(x.shape)} does not fit a weight {list(weight.shape)}")
    wide = x.dtype
    if wide not in (torch.float32, torch.float64) or (weight.dtype not in WEIGHTS and weight.dtype != wide):
        raise InputError(f"norm_linear: x must be float32, got {wide} and a weight of {weight.dtype}")
    check_scales("norm_linear", weight, scales)
    rows, cols = weight.shape
    given = {"bias": (bias, (rows,)), "norm": (norm, (cols,)), "residual": (residual, (len(x), rows))}
    for name, (tensor, shape) in given.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != wide):
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise InputError(f"norm_linear: {name} must be {wide} {list(shape)}, got {got}")
    args = x, weight, bias, scales, norm, eps, residual
    if torch.compiler.is_compiling():
        return _op(*args, backend)
    return OP.pick(x.device, backend, *args).run(*args)


# What torch.compile sees. Eager calls go past it, and the fleet past the checks as well: the dispatcher adds 11 to
# 26 us to a call of this op or subset_ffn (one thread of a Xeon, 2026-11-25), and a product of 64x64 takes 6.
@torch.library.custom_op("persona_pruner::norm_linear", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, norm: Tensor | None, eps: float,
    residual: Tensor | None, backend: str | None,
) -> Tensor:  # fmt: skip
    args = x, weight, bias, scales, norm, eps, residual
    return OP.pick(x.device, backend, *args).run(*args)


@_op.register_fake
def _(x, weight, *rest):
    return x.new_empty(len(x), len(weight))


def check_scales(op: str, weight: Tensor, scales: Tensor | None) -> None:
    """Raises InputError unless int8 weights come with scales float32 [N] and others without."""
    if (weight.dtype == torch.int8) != (scales is not None):
        raise InputError(f"{op}: int8 weights, and only these, need scales")
    if scales is not None and (scales.shape != weight.shape[:1] or scales.dtype != torch.float32):
        raise InputError(f"{op}: scales must be float32 [{len(weight)}], got {scales.dtype} {list(scales.shape)}")


def reference(x, weight, bias, scales, norm, eps, residual):
    y = product(x if norm is None else rms_norm(x, norm, eps), weight, scales, bias)
    return y if residual is None else y + residual


@cache
def bits(value: float) -> int:
    """The bits of a float32: native functions take integers."""
    return struct.unpack("I", struct.pack("f", value))[0]


def address(tensor: Tensor | None) -> int:
    """A tensor's data_ptr, 0 for None; the tensor is contiguous."""
    return 0 if tensor is None else tensor.data_ptr()


@cache
def cpu_kernel(op: str, dtype: torch.dtype):
    """The native function of an op for weights (or a cache) of this type."""
    return getattr(_native.cpu_module(), f"{op}_{WEIGHTS[dtype]}")


def cpu_unavailable(device_type: str) -> str | None:
    """Why native CPU code cannot run on tensors of this kind of device, or None."""
    if device_type != "cpu":
        return "it takes CPU tensors"
    module = _native.cpu_module()
    return module if isinstance(module, str) else None


def _cpu_call(x, weight, bias, scales, norm, eps, residual):
    x, weight = x.contiguous(), weight.contiguous()
    bias, scales, norm, residual = (None if t is None else t.contiguous() for t in (bias, scales, norm, residual))
    (tokens, cols), rows = x.shape, weight.shape[0]
    y = x.new_empty(tokens, rows)
    numbers = (
        x.data_ptr(), tokens, cols, weight.data_ptr(), rows, address(scales), address(bias), address(norm), bits(eps),
        address(residual), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    kernel = cpu_kernel("norm_linear", weight.dtype)
    return Call(kernel, numbers, y, (x, weight, bias, scales, norm, residual))


def _cpu_run(*args):
    return _cpu_call(*args).run()


def _refuses(x, weight, *rest):
    return None if x.dtype == torch.float32 else f"it has no kernel for x of {x.dtype}"


OP = Op(
    "norm_linear", [Backend("cpu", _cpu_run, cpu_unavailable, _refuses, _cpu_call), Backend("reference", reference)]
)
