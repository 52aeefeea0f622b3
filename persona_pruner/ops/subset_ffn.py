"""subset_ffn: the gated FFN restricted to some channels, straight from the shared dense weights.

    y[t] = sum over the channels c of t's segment of  act(n[t] . W_gate[c]) * (n[t] . W_up[c]) * W_down^T[c]

Every channel is three rows, one of each weight, so that a subset of channels is read without a copy and costs what its
rows cost. A batch is cut into segments of consecutive rows, one for each persona, with channels of their own. n is x,
or RMSNorm of it (see norm_linear); biases of the three layers and a residual are added where they are given. int8
weights have one float32 scale a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from persona_pruner.errors import InputError
from persona_pruner.ops import _native
from persona_pruner.ops._dispatch import Backend, Op
from persona_pruner.ops.importance import ACTS, activation
from persona_pruner.ops.norm_linear import (
    WEIGHTS,
    address,
    bits,
    check_scales,
    cpu_kernel,
    cpu_unavailable,
    product,
    rms_norm,
)
from persona_pruner.ops.plan import Call

NONE = (None, None, None)


def subset_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    channels: Tensor | None = None,
    segments: Tensor | None = None,
    act: str = "silu",
    *,
    scales: tuple = NONE,
    biases: tuple = NONE,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y [T, H] for x [T, H] and weights [C, H] (W_down transposed), restricted to channels int32 [n].

    segments: int64 [S, 3] on the CPU, (rows, first, count) a segment: the next `rows` rows of x use
    channels[first : first + count], ascending. None: all rows use all of `channels`; channels None: all channels.
    x: float32, or the weights' float dtype; y has its dtype. scales: float32 [C] three times, with int8 weights.
    biases: float32 (gate [C], up [C], down [H]), each may be None; norm float32 [H]; residual like x. act: 'silu',
    'gelu_tanh'. No gradients. `backend`: 'cpu', 'triton', 'reference', or None for the best one. Raises InputError
    naming the limit.

    A row of y does not depend, in any bit, on the other rows and segments as long as W_down^T is finite: on the CPU
    short segments go through the channels of their neighbours with zeros.

    Weights may be views whose rows lie apart, all three alike, as those of one [C, 3, H]: there a channel is one
    stretch of memory, which reads faster (docs/fleet.md).
    """
    weights, scales, biases = [w_gate, w_up, w_down_t], list(scales), list(biases)
    _check(x, weights, act, scales, biases, norm, residual)
    args = x, weights, channels, segments, act, scales, biases, norm, eps, residual, backend
    return _op(*args) if torch.compiler.is_compiling() else _forward(*args)


def _forward(x, weights, channels, segments, act, scales, biases, norm, eps, residual, backend):
    channels, segments = _check_lists(x, len(weights[0]), channels, segments)
    args = x, weights, channels, segments, act, scales, biases, norm, eps, residual
    return OP.pick(x.device, backend, *args).run(*args)


# What torch.compile sees; eager calls go past it, see norm_linear.
@torch.library.custom_op("persona_pruner::subset_ffn", mutates_args=())
def _op(
    x: Tensor, weights: Sequence[Tensor], channels: Tensor | None, segments: Tensor | None, act: str,
    scales: Sequence[Tensor | None], biases: Sequence[Tensor | None], norm: Tensor | None, eps: float,
    residual: Tensor | None, backend: str | None,
) -> Tensor:  # fmt: skip
    return _forward(x, weights, channels, segments, act, scales, biases, norm, eps, residual, backend)


@_op.register_fake
def _(x, *rest):
    return x.new_empty(x.shape)


def _check(x, weights, act, scales, biases, norm, residual):
    width, hidden = weights[0].shape if weights[0].dim() == 2 else (0, 0)
    kind = weights[0].dtype
    if x.dim() != 2 or any(w.shape != (width, hidden) or w.dtype != kind for w in weights) or x.shape[1] != hidden:
        shapes = [list(t.shape) for t in (x, *weights)]
        raise InputError(f"subset_ffn: x must be [T, H] and the weights alike [C, H], got {shapes}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if (kind not in WEIGHTS and kind != wide) or x.dtype not in (wide, kind):
        raise InputError(f"subset_ffn: x is {x.dtype} and the weights are {kind}; x must be float32 or their dtype")
    if act not in ACTS:
        raise InputError(f"subset_ffn: act {act!r} is not one of {', '.join(ACTS)}")
    for weight, scale in zip(weights, scales, strict=True):
        check_scales("subset_ffn", weight, scale)
    expected = [("gate bias", biases[0], width), ("up bias", biases[1], width), ("down bias", biases[2], hidden)]
    for name, tensor, length in [*expected, ("norm", norm, hidden)]:
        if tensor is not None and (tensor.shape != (length,) or tensor.dtype != wide):
            raise InputError(f"subset_ffn: {name} must be {wide} [{length}]")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise InputError("subset_ffn: residual must have the shape and dtype of x")


def _check_lists(x, width, channels, segments):
    """What torch.compile cannot check, for it depends on numbers: the lists, made where they are None."""
    if channels is None:
        channels = torch.arange(width, dtype=torch.int32, device=x.device)
    elif channels.dim() != 1 or channels.dtype != torch.int32:
        raise InputError("subset_ffn: channels must be int32 [n]")
    elif channels.numel() and not 0 <= int(channels.min()) <= int(channels.max()) < width:
        raise InputError(f"subset_ffn: a channel is outside 0 .. {width - 1}")
    if segments is None:
        segments = torch.tensor([[len(x), 0, len(channels)]])
    if segments.dim() != 2 or segments.shape[1] != 3 or segments.dtype != torch.int64 or segments.is_cuda:
        raise InputError("subset_ffn: segments must be int64 [S, 3] on the CPU")
    for start, length in segments[:, 1:].tolist() if channels.numel() > 1 else ():
        if not bool((channels[start : start + length].diff() > 0).all()):
            raise InputError("subset_ffn: the channels of a segment must ascend")
    rows, first, count = segments.T
    if bool((segments < 0).any()) or int(rows.sum()) != len(x) or bool((first + count > len(channels)).any()):
        raise InputError(f"subset_ffn: the segments must cover {len(x)} rows and lie in {len(channels)} channels")
    return channels, segments


def reference(x, weights, channels, segments, act, scales, biases, norm, eps, residual):
    wide = torch.promote_types(x.dtype, torch.float32)
    n = x.to(wide) if norm is None else rms_norm(x.to(wide), norm, eps)
    y, row = torch.empty_like(n), 0
    for rows, first, count in segments.tolist():
        kept, part = channels[first : first + count].long(), slice(row, row + rows)
        gate, up, down = (w[kept].to(wide) for w in weights)
        sg, su, sd = (None if s is None else s[kept] for s in scales)
        bg, bu = (None if b is None else b[kept] for b in biases[:2])
        h = activation(product(n[part], gate, sg, bg), act) * product(n[part], up, su, bu)
        y[part] = (h if sd is None else h * sd.to(wide)) @ down
        row += rows
    if biases[2] is not None:
        y += biases[2]
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


def _alike(weights):
    """The weights with rows one pitch apart, the same for all three: as they are, or copies."""
    if weights[0].stride(1) == 1 and len({w.stride() for w in weights}) == 1:
        return weights
    return [w.contiguous() for w in weights]


def _cpu_call(x, weights, channels, segments, act, scales, biases, norm, eps, residual):
    """y of this call is float32, whatever x is."""
    wide = x.float().contiguous()
    weights = _alike(weights)
    rest = (*scales, *biases, norm)
    *rest, residual = (None if t is None else t.contiguous() for t in (*rest, residual))
    residual = None if residual is None else residual.float()
    channels, segments = channels.contiguous(), segments.contiguous()
    y = torch.empty_like(wide)
    numbers = (
        wide.data_ptr(), *wide.shape, weights[0].stride(0), *map(Tensor.data_ptr, weights), *map(address, rest),
        bits(eps), address(residual), y.data_ptr(), channels.data_ptr(), segments.data_ptr(), len(segments),
        weights[0].shape[0], act == "gelu_tanh", torch.get_num_threads(),
    )  # fmt: skip
    reads = (wide, *weights, *rest, residual, channels, segments)
    return Call(cpu_kernel("subset_ffn", weights[0].dtype), numbers, y, reads)


def _cpu_run(x, *rest):
    return _cpu_call(x, *rest).run().to(x.dtype)


def _triton_run(x, weights, channels, segments, act, scales, biases, norm, eps, residual):
    """RMSNorm, bias and residual are PyTorch's; the kernels see rows of at most one tile of one segment."""
    kernels = _native.triton_kernels("subset_ffn")
    n = x.contiguous() if norm is None else rms_norm(x.float(), norm, eps).to(x.dtype)
    weights = _alike(weights)
    rows = kernels.rows_of(max((r for r, _, _ in segments.tolist()), default=0))
    tiles, width = _tiles(segments, rows), int(segments[:, 2].max()) if len(segments) else 0
    y = n.new_zeros(n.shape, dtype=torch.float32)
    if n.numel() and width:
        processors = _native.processors(x)
        parts = kernels.splits(len(tiles), n.shape[1], width, processors)
        h, partial = n.new_empty(len(n), width), y.new_empty(parts, *n.shape)
        scales, biases = ([None if t is None else t.contiguous() for t in ts] for ts in (scales, biases))
        tiles = tiles.to(x.device)
        with _native.on_device(x):
            kernels.subset_ffn(
                n, weights, scales, biases[:2], channels.contiguous(), tiles, h, partial, act == "gelu_tanh", rows
            )
        y = partial.sum(0)
    for term in (biases[2], residual):
        if term is not None:
            y += term
    return y.to(x.dtype)


def _tiles(segments, rows):
    """int32 [P, 4]: the segments cut into pieces of at most `rows` rows, as (row, rows, first, count)."""
    tiles, begin = [], 0
    for length, first, count in segments.tolist():
        tiles += [(begin + at, min(rows, length - at), first, count) for at in range(0, length, rows)]
        begin += length
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 4)


def _refuses(x, *rest):
    return f"it has no kernel for x of {x.dtype}" if x.dtype == torch.float64 else None


OP = Op(
    "subset_ffn",
    [
        Backend("cpu", _cpu_run, cpu_unavailable, _refuses, _cpu_call),
        Backend("triton", _triton_run, _native.triton_unavailable("subset_ffn"), _refuses),
        Backend("reference", reference),
    ],
)
