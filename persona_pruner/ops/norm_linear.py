"""norm_linear: a linear layer for the few rows of a decode step, with what surrounds it.

    y = n W^T + bias + residual,    n = x                                                      without a norm
                                    n[t] = x[t] / sqrt(mean of x[t]^2 + eps) * norm            with one (RMSNorm)

x, y and residual are float32 and W is read once in its own type: float32, bfloat16, float16, or int8 with one float32
scale a row. Products and sums are float32. A row of y depends on that row of x alone, in every bit: not on the other
rows of the batch and not on the number of threads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from persona_pruner.errors import InputError
from persona_pruner.ops._dispatch import Backend, Op

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
    return OP.pick(x.device, backend, *args).run(*args)


def check_scales(op: str, weight: Tensor, scales: Tensor | None) -> None:
    """Raises InputError unless int8 weights come with scales float32 [N] and others without."""
    if (weight.dtype == torch.int8) != (scales is not None):
        raise InputError(f"{op}: int8 weights, and only these, need scales")
    if scales is not None and (scales.shape != weight.shape[:1] or scales.dtype != torch.float32):
        raise InputError(f"{op}: scales must be float32 [{len(weight)}], got {scales.dtype} {list(scales.shape)}")


def reference(x, weight, bias, scales, norm, eps, residual):
    y = product(x if norm is None else rms_norm(x, norm, eps), weight, scales, bias)
    return y if residual is None else y + residual


OP = Op("norm_linear", [Backend("reference", reference)])
