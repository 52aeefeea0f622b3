"""linear24: y = x W^T + bias with W packed 2:4 (see select24 for the packing).

    y[m, n] = bias[n] + sum over groups g, slots s = 0, 1 of  values[n, 2g + s] * x[m, 4g + idx_s(n, g)]

Only kept columns are multiplied: an Inf or NaN of x in a column that row n has pruned does not reach y[m, n].
int8 values carry one float32 scale a row, and then x is quantized token by token as well:

    sx[m] = max over k of abs(x[m, k]) / 127,  q = round(x / sx),  y[m, n] = sx[m] * scales[n] * (integer sum) + bias[n]

so a token that holds an Inf or NaN anywhere becomes NaN. Metadata is taken as it is: any nibble means two positions,
and equal positions add up, so corrupt bytes give a defined number and never an access out of bounds; `check24` refuses
them, and everything that reads packed weights from outside calls it once. On a GPU, backend 'cuda' refuses them as well
and 'triton' lets the first of two equal positions stand.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from persona_pruner.errors import InputError
from persona_pruner.ops import _linear24_cuda, _native
from persona_pruner.ops._dispatch import Backend, Op

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
MAX_INT8_COLS = 131072  # K/2 products of 255 * 128 stay below 2^31


@dataclass
class Packed24:
    """A packed weight [N, K] as linear24 reads it. The CUDA backend makes an order of its own, once for the tensors."""

    values: torch.Tensor
    meta: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], 2 * self.values.shape[1]


def pack_linear24(values: torch.Tensor, meta: torch.Tensor, scales: torch.Tensor | None = None) -> Packed24:
    """A handle that linear24 takes in place of `values` (with meta None). Refuses corrupt metadata."""
    check24(values, meta, scales)
    return Packed24(values, meta, scales)


def linear24(
    x: torch.Tensor,
    values: torch.Tensor | Packed24,
    meta: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
    *,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., N] = x [..., K] W^T + bias for W packed as values [N, K/2] and meta uint8 [N, ceil(K/8)].

    x and values: the same dtype of float32, bfloat16, float16 (float64 in plain PyTorch only); or int8 values with
    scales float32 [N] and any of these for x. bias [N] in x's dtype. Differentiable with respect to x and bias.
    `backend`: 'cpu', 'triton', 'cuda', 'reference', or None for the best one. Raises InputError naming the limit.
    """
    weight = values if isinstance(values, Packed24) else Packed24(values, meta, scales)
    _check(x, weight, bias)
    if torch.compiler.is_compiling():
        return _op(x, weight.values, weight.meta, bias, weight.scales, backend)
    if torch.is_grad_enabled():
        if weight.values.requires_grad:
            raise InputError("linear24: values has no gradient; train the dense weight and pack it again")
        if x.requires_grad or (bias is not None and bias.requires_grad):
            return _Linear24.apply(x, weight, bias, backend)
    return _forward(x, weight, bias, backend)


def bind24(weight: Packed24, bias: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """linear24 for this weight and bias as a function of x alone, for a layer that calls it at every step.

    On the CPU the weight's checks are made here and not again, as long as x asks for nothing special (a plain
    contiguous tensor, no gradients): 3.4 us a call instead of 10.5 (16 x 64, one thread, Zen 4, 2026-11-23).
    Everything else goes to linear24. The tensors must keep their shapes, dtypes and devices.
    """
    rows, cols = weight.shape

    def checked(x: torch.Tensor) -> torch.Tensor:
        return linear24(x, weight, None, bias)

    values, meta, scales = weight.values, weight.meta, weight.scales
    tensors = [tensor for tensor in (values, meta, scales, bias) if tensor is not None]
    dtypes = [torch.float32, torch.bfloat16, torch.float16] if scales is not None else [values.dtype]
    if bias is not None:
        dtypes = [dtype for dtype in dtypes if dtype == bias.dtype]
    kernels = {dtype: _cpu_kernel(scales is not None, dtype) for dtype in dtypes if dtype in NATIVE}
    plain = all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors) and _cpu_unavailable("cpu") is None
    if not (plain and kernels and rows and cols) or (scales is not None and cols > MAX_INT8_COLS):
        return checked
    _check_weight(values, meta, scales)
    if bias is not None and bias.shape != (rows,):
        return checked
    threads, graded = torch.get_num_threads, torch.is_grad_enabled

    def run(x: torch.Tensor) -> torch.Tensor:
        kernel, shape = kernels.get(x.dtype), x.shape
        if (
            kernel is None
            or type(x) is not torch.Tensor
            or not (shape and shape[-1] == cols and x.is_cpu and x.is_contiguous())
            or graded()
            or not (tokens := x.numel() // cols)
        ):
            return checked(x)
        y = x.new_empty((*shape[:-1], rows))
        b = 0 if bias is None else bias.data_ptr()
        if scales is None:
            kernel(x.data_ptr(), values.data_ptr(), meta.data_ptr(), b, y.data_ptr(), tokens, rows, cols, threads())
        else:
            w = values.data_ptr(), meta.data_ptr(), scales.data_ptr()
            kernel(x.data_ptr(), *w, b, y.data_ptr(), tokens, rows, cols, threads())
        return y

    return run


def unpack24(values: torch.Tensor, meta: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """The dense weight [N, K] with zeros, K = 2 * values.shape[1]; with scales, int8 values times their row's scale."""
    rows, half = values.shape
    if scales is not None:
        values = values.to(scales.dtype) * scales[:, None]
    kept = positions24(meta, half // 2)
    dense = values.new_zeros(rows, half // 2, 4)
    # index_add, not scatter: equal positions of corrupt metadata add up, as in the formula
    dense.scatter_add_(-1, kept, values.reshape(rows, half // 2, 2))
    return dense.view(rows, 2 * half)


def positions24(meta: torch.Tensor, groups: int) -> torch.Tensor:
    """Kept positions int64 [N, groups, 2], 0..3 within each group."""
    nibble = torch.stack([meta & 15, meta >> 4], dim=-1).view(meta.shape[0], -1)[:, :groups]
    return torch.stack([nibble & 3, nibble >> 2], dim=-1).long()


def quantize24(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values and float32 scales [N] of kept values [N, K/2]: symmetric, one scale a row, max -> 127.

    A row of zeros has scale 0. Refuses Inf and NaN.
    """
    exact = values.detach().float()
    peak = exact.abs().amax(dim=1) if exact.shape[1] else exact.new_zeros(exact.shape[0])
    if not peak.isfinite().all():
        raise InputError("quantize24: values hold Inf or NaN")
    scales = peak / 127
    quantized = (exact / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
    return quantized.to(torch.int8), scales


def check24(values: torch.Tensor, meta: torch.Tensor, scales: torch.Tensor | None = None) -> None:
    """Raise InputError unless shapes and dtypes fit and every nibble of meta is one of the six patterns idx0 < idx1.

    One pass over meta; on a GPU it waits for the device. Call it on weights that come from outside.
    """
    _check_weight(values, meta, scales)
    legal = torch.zeros(256, dtype=torch.bool)
    nibbles = [i | j << 2 for j in range(4) for i in range(j)]
    legal[[low | high << 4 for low in nibbles for high in nibbles]] = True
    if not legal.to(meta.device)[meta.long()].all():
        raise InputError("2:4 metadata is corrupt: a group does not name two positions in ascending order")
    if values.shape[1] % 4 and not (meta[:, -1] >> 4 == 4).all():
        raise InputError("2:4 metadata is corrupt: with K % 8 == 4 the last nibble of every row must be 4")


def reference(x: torch.Tensor, weight: Packed24, bias: torch.Tensor | None) -> torch.Tensor:
    """The formula in plain PyTorch for x [M, K]: a dense matmul, or gathers where x is not finite."""
    if weight.scales is not None:
        q, sx = quantize_tokens(x)
        total = q.double() @ unpack24(weight.values, weight.meta).double().T
        y = (total * (sx.double()[:, None] * weight.scales.double())).float()
        return (y if bias is None else y + bias.float()).to(x.dtype)
    if x.isfinite().all():
        return F.linear(x, unpack24(weight.values, weight.meta), bias)
    rows, cols = weight.shape
    column = (positions24(weight.meta, cols // 4) + 4 * torch.arange(cols // 4, device=x.device)[:, None]).flatten(1)
    exact = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty(x.shape[0], rows, dtype=exact, device=x.device)
    for n in range(rows):
        y[:, n] = x[:, column[n]].to(exact) @ weight.values[n].to(exact)
    return (y if bias is None else y + bias).to(x.dtype)


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] as integers -127..127 (float32) and sx float32 [M]; a token that is not finite gives sx = NaN."""
    x = x.float()
    peak = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    peak = torch.where(peak < 1e-36, 0.0, peak)  # its inverse would not be finite
    sx = torch.where(peak.isfinite(), peak / 127, torch.nan)
    inverse = torch.where(peak > 0, torch.full_like(peak, 127) / peak, 0.0)  # 127 / peak would round twice
    return torch.nan_to_num((x * inverse[:, None]).round()).clamp(-127, 127), sx


def _check(x, weight, bias):
    _check_weight(weight.values, weight.meta, weight.scales)
    rows, cols = weight.shape
    if x.dim() == 0 or x.shape[-1] != cols:
        raise InputError(f"linear24: x must be [..., {cols}] for this weight, got {list(x.shape)}")
    if (weight.scales is None and x.dtype != weight.values.dtype) or x.dtype not in FLOATS:
        raise InputError(f"linear24: x is {x.dtype} and values are {weight.values.dtype}; convert one of them")
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
        raise InputError(f"linear24: bias must be {x.dtype} [{rows}], got {bias.dtype} {list(bias.shape)}")
    for tensor in (weight.values, weight.meta, weight.scales, bias):
        if tensor is not None and tensor.device != x.device:
            raise InputError(f"linear24: x is on {x.device} but the weight or bias is on {tensor.device}")


def _check_weight(values, meta, scales):
    if meta is None or values.dim() != 2 or values.shape[1] % 2:
        raise InputError("linear24: values must be [N, K/2] with K a multiple of 4, together with meta")
    if meta.dtype != torch.uint8 or meta.shape != (values.shape[0], (values.shape[1] + 3) // 4):
        raise InputError(
            f"linear24: meta must be uint8 [{values.shape[0]}, {(values.shape[1] + 3) // 4}], "
            f"got {meta.dtype} {list(meta.shape)}"
        )
    if scales is None:
        if values.dtype not in FLOATS:
            raise InputError(f"linear24: values are {values.dtype}; without scales they must be floating point")
    elif values.dtype != torch.int8 or scales.dtype != torch.float32 or scales.shape != (values.shape[0],):
        raise InputError(f"linear24: scales must be float32 [{values.shape[0]}] and values int8")


def _forward(x, weight, bias, backend):
    if x.device.type not in ("cpu", "cuda"):
        raise InputError(f"linear24 runs on CPU and CUDA tensors, not on {x.device.type}")
    rows, cols = weight.shape
    tokens = x.detach().reshape(-1, cols).contiguous()
    if tokens.shape[0] == 0 or rows == 0:
        return x.new_empty(*x.shape[:-1], rows)
    bias = None if bias is None else bias.detach().contiguous()
    y = OP.pick(x.device, backend, tokens, weight, bias).run(tokens, weight, bias)
    return y.view(*x.shape[:-1], rows)


def _grad_x(grad, weight):
    """dx = dy W: zero in columns that no row keeps."""
    dense = unpack24(weight.values, weight.meta, weight.scales)
    return (grad.to(dense.dtype) @ dense).to(grad.dtype)


class _Linear24(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        ctx.weight = weight
        return _forward(x, weight, bias, backend)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dx = _grad_x(grad, ctx.weight) if ctx.needs_input_grad[0] else None
        db = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db, None


@torch.library.custom_op("persona_pruner::linear24", mutates_args=())
def _op(
    x: torch.Tensor,
    values: torch.Tensor,
    meta: torch.Tensor,
    bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """linear24 as torch.compile sees it; eager calls go past it: the dispatcher costs more than a small GEMV."""
    return _forward(x, Packed24(values, meta, scales), bias, backend)


@_op.register_fake
def _(x, values, meta, bias=None, scales=None, backend=None):
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _setup_context(ctx, inputs, output):
    _, values, meta, _, scales, _ = inputs
    ctx.save_for_backward(values, meta, scales)


def _backward(ctx, grad):
    values, meta, scales = ctx.saved_tensors
    dx = _grad_x(grad, Packed24(values, meta, scales)) if ctx.needs_input_grad[0] else None
    wanted = ctx.needs_input_grad  # one entry for each argument given: defaults that were left out are missing
    db = grad.flatten(0, -2).sum(0) if len(wanted) > 3 and wanted[3] else None
    return (dx, None, None, db, None, None)[: len(wanted)]


_op.register_autograd(_backward, setup_context=_setup_context)


def _cpu_kernel(int8, dtype):
    return getattr(_native.cpu_module(), f"linear24_{'i8_' if int8 else ''}{NATIVE[dtype]}", None)


def _cpu_run(x, weight, bias):
    rows, cols = weight.shape
    lent = [t.contiguous() for t in (weight.values, weight.meta, weight.scales) if t is not None]
    y = x.new_empty(x.shape[0], rows)
    pointers = [tensor.data_ptr() for tensor in lent]
    b = 0 if bias is None else bias.data_ptr()
    kernel = _cpu_kernel(weight.scales is not None, x.dtype)
    kernel(x.data_ptr(), *pointers, b, y.data_ptr(), x.shape[0], rows, cols, torch.get_num_threads())
    return y


def _cpu_unavailable(device_type):
    if device_type != "cpu":
        return "it takes CPU tensors"
    module = _native.cpu_module()
    return module if isinstance(module, str) else None


def _refuses(x, weight, bias):
    if x.dtype not in NATIVE:
        return f"it has no {x.dtype} kernel"
    if weight.scales is not None and weight.shape[1] > MAX_INT8_COLS:
        return f"int8 sums overflow beyond K = {MAX_INT8_COLS}"
    return None


def _cuda_run(x, weight, bias):
    # the instructions are undefined on corrupt metadata
    blocks = _linear24_cuda.blocks_of(
        weight.values, weight.meta, lambda: check24(weight.values, weight.meta, weight.scales)
    )
    return _linear24_cuda.run(x, blocks, weight, bias)


def _triton_run(x, weight, bias):
    """Lends the plain tensors in the integers that the kernel loads: a group's two values, and 8 groups' metadata."""
    kernels = _native.triton_kernels("linear24")
    rows, cols = weight.shape
    values, meta, scales, sx = weight.values.contiguous(), weight.meta.contiguous(), weight.scales, None
    y = x.new_empty(x.shape[0], rows)
    if scales is not None:
        (x, sx), scales = quantize_tokens(x), scales.contiguous()
        x = x.to(torch.int8)
    pair = {1: torch.int16, 2: torch.int32, 4: torch.int64}[values.element_size()]
    if values.data_ptr() % pair.itemsize:
        values = values.clone()
    if meta.shape[1] % 4 or meta.data_ptr() % 4:
        meta = F.pad(meta, (0, -meta.shape[1] % 4)).clone()
    processors = _native.processors(x)
    splits = kernels.splits(x.shape[0], rows, cols, x.element_size(), processors)
    kind = torch.float32 if sx is None else torch.int32
    partial = None if splits == 1 else x.new_empty(splits, x.shape[0], rows, dtype=kind)
    with _native.on_device(x):
        kernels.linear24(x, values.view(pair), meta.view(torch.int32), bias, scales, sx, y, partial)
    return y


def _gpu_refuses(x, weight, bias):
    if max(weight.values.numel(), x.numel(), x.shape[0] * weight.shape[0]) >= 2**31:
        return "a tensor has 2^31 elements or more"
    return _refuses(x, weight, bias)


def _cuda_refuses(x, weight, bias):
    return _gpu_refuses(x, weight, bias) or _linear24_cuda.refuses(x, weight)


OP = Op(
    "linear24",
    [
        Backend("cpu", _cpu_run, _cpu_unavailable, _refuses),
        Backend("cuda", _cuda_run, _linear24_cuda.unavailable, _cuda_refuses),
        Backend("triton", _triton_run, _native.triton_unavailable("linear24"), _gpu_refuses),
        Backend("reference", reference),
    ],
)
