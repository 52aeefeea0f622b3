"""Channel importance: the masked gated activation with its scores, and column square sums.

    h = act(gate) * up * mask                                     masked_swiglu, [..., C]

With a = act(gate) * up *without* the mask, the backward pass gives d_gate, d_up and
d_mask[c] = sum over tokens of a*dh, for kept and masked channels alike: a masked channel has a
gradient, so that a search can bring it back. The same pass adds to the channel scores

    taylor[c] += sum over tokens of a*dh         (first-order Taylor score, equal to d_mask)
    fisher[c] += sum over tokens of (a*dh)^2     (empirical Fisher information of the mask)

`column_sqnorm_` adds sum over tokens of x^2, the input norms that Wanda needs. All sums are taken in
float32 over fixed blocks of tokens and then over the blocks, in order: the same bits on every run
and for every number of threads.
"""

import math

import torch

from persona_pruner.errors import InputError
from persona_pruner.ops import _native
from persona_pruner.ops._dispatch import Backend, Op

ACTS = ("silu", "gelu_tanh")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the native kernels take the position as code
BLOCK = 64  # tokens a row of partial sums stands for: kBlock in csrc/cpu/importance.cpp

_GELU = math.sqrt(2 / math.pi), 0.044715


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [tokens, C] with unit stride along C; a view unless the strides forbid it."""
    channels = x.shape[-1]
    x = x.reshape(math.prod(x.shape[:-1]), channels)
    return x if x.stride(1) == 1 or channels == 1 else x.contiguous()


# ---- reference -------------------------------------------------------------------------------------------------------


def _activation(gate: torch.Tensor, act: str) -> tuple[torch.Tensor, torch.Tensor]:
    """act(gate) = gate * s(z) with the logistic function s, and its derivative."""
    if act == "silu":
        z, dz = gate, 1.0
    else:
        k, cubic = _GELU
        z, dz = 2 * k * (gate + cubic * gate**3), 2 * k * (1 + 3 * cubic * gate**2)
    s, rest = torch.sigmoid(z), torch.sigmoid(-z)
    return gate * s, s + gate * s * rest * dz


def _reference_forward(gate, up, mask, act):
    wide = torch.promote_types(gate.dtype, torch.float32)
    value, _ = _activation(gate.to(wide), act)
    return (value * up.to(wide) * mask.to(wide)).to(gate.dtype)


def _reference_backward(dh, gate, up, mask, act, needs, taylor, fisher):
    wide = torch.promote_types(gate.dtype, torch.float32)
    value, slope = _activation(gate.to(wide), act)
    dy, y, m = dh.to(wide), up.to(wide), mask.to(wide)
    d_gate = (slope * y * m * dy).to(gate.dtype) if needs[0] else None
    d_up = (value * m * dy).to(gate.dtype) if needs[1] else None
    d_mask = None
    if needs[2] or taylor is not None or fisher is not None:
        score = (value * y * dy).reshape(-1, mask.shape[0]) if mask.shape[0] else mask.new_empty(0, 0)
        d_mask = score.sum(0).to(mask.dtype)
        if taylor is not None:
            taylor += d_mask
        if fisher is not None:
            fisher += score.square().sum(0)
    return d_gate, d_up, d_mask if needs[2] else None


def _reference_sqnorm(x, acc):
    acc += _rows(x).to(torch.promote_types(x.dtype, torch.float32)).square().sum(0)


# ---- native modules --------------------------------------------------------------------------------------------------


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _scratch(tokens: int, width: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(-(-tokens // BLOCK), width, dtype=torch.float32, device=like.device)


def _cpu_forward(gate, up, mask, act):
    g, u = _rows(gate), _rows(up)
    h = torch.empty(gate.shape, dtype=gate.dtype)
    _native.cpu_module().masked_swiglu_forward(
        g.data_ptr(), g.stride(0), u.data_ptr(), u.stride(0), mask.data_ptr(), h.data_ptr(),
        *g.shape, DTYPES.index(gate.dtype), ACTS.index(act), torch.get_num_threads(),
    )  # fmt: skip
    return h


def _cpu_backward(dh, gate, up, mask, act, needs, taylor, fisher):
    d, g, u = _rows(dh), _rows(gate), _rows(up)
    d_gate = torch.empty(gate.shape, dtype=gate.dtype) if needs[0] else None
    d_up = torch.empty(gate.shape, dtype=gate.dtype) if needs[1] else None
    d_mask = torch.empty_like(mask) if needs[2] else None
    scores = needs[2] or taylor is not None or fisher is not None
    partial = _scratch(g.shape[0], 2 * g.shape[1], g) if scores else None
    _native.cpu_module().masked_swiglu_backward(
        d.data_ptr(), d.stride(0), g.data_ptr(), g.stride(0), u.data_ptr(), u.stride(0), mask.data_ptr(),
        _address(d_gate), _address(d_up), _address(partial), _address(d_mask), _address(taylor), _address(fisher),
        *g.shape, DTYPES.index(gate.dtype), ACTS.index(act), torch.get_num_threads(),
    )  # fmt: skip
    return d_gate, d_up, d_mask


def _cpu_sqnorm(x, acc):
    rows = _rows(x)
    partial = _scratch(*rows.shape, rows)
    _native.cpu_module().column_sqnorm(
        rows.data_ptr(), rows.stride(0), partial.data_ptr(), acc.data_ptr(),
        *rows.shape, DTYPES.index(x.dtype), torch.get_num_threads(),
    )  # fmt: skip


# ---- choice of backend -----------------------------------------------------------------------------------------------


def _cpu_unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it runs on CPU tensors, not {device_type}"
    module = _native.cpu_module()
    return module if isinstance(module, str) else None


def _refuses_dtype(x: torch.Tensor, *args) -> str | None:
    return None if x.dtype in DTYPES else f"it takes float32, bfloat16 and float16, not {x.dtype}"


_swiglu = Op(
    "masked_swiglu",
    [
        Backend("cpu", (_cpu_forward, _cpu_backward), _cpu_unavailable, _refuses_dtype),
        Backend("reference", (_reference_forward, _reference_backward)),
    ],
)
_sqnorm = Op(
    "column_sqnorm_",
    [
        Backend("cpu", _cpu_sqnorm, _cpu_unavailable, _refuses_dtype),
        Backend("reference", _reference_sqnorm),
    ],
)
OPS = (_swiglu, _sqnorm)


# ---- autograd --------------------------------------------------------------------------------------------------------

# Scores are added in a backward pass, so autograd must run one even if neither gate, up nor mask wants a gradient
# (a frozen model's first layer): this empty leaf asks for it.
_ticket = torch.zeros(0, requires_grad=True)


class _MaskedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, mask, act, taylor, fisher, backend, ticket):
        ctx.save_for_backward(gate, up, mask)
        ctx.rest = act, taylor, fisher, backend
        return backend.run[0](gate, up, mask, act)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):
        act, taylor, fisher, backend = ctx.rest
        needs = ctx.needs_input_grad[:3]
        grads = backend.run[1](dh, *ctx.saved_tensors, act, needs, taylor, fisher)
        return *grads, None, None, None, None, None


def _check_scores(name: str, acc: torch.Tensor, x: torch.Tensor, op: str) -> None:
    if acc.shape != x.shape[-1:] or acc.device != x.device or not acc.is_contiguous() or acc.requires_grad:
        raise InputError(f"{op}: {name} must be contiguous [{x.shape[-1]}] on {x.device} and need no gradient")
    if acc.dtype != torch.promote_types(x.dtype, torch.float32):
        raise InputError(f"{op}: {name} must be float32 (float64 for float64 input), not {acc.dtype}")


def masked_swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor,
    act: str = "silu",
    taylor: torch.Tensor | None = None,
    fisher: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """act(gate) * up * mask, differentiable in all three, with channel scores gathered on the way back.

    Args:
        gate, up: [..., C] float32, bfloat16 or float16, the same shape and dtype; any strides, without a copy if C has
            stride 1 (the two halves of one fused product). float64 runs on the reference.
        mask: [C] float32 or bool. Its gradient is float32 and covers masked channels too.
        act: "silu" or "gelu_tanh".
        taylor, fisher: [C] float32, or None. The backward pass adds its scores to them in place.
        backend: None chooses; "cpu" or "reference" insists.

    Returns:
        [..., C], contiguous, in the dtype of gate.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or a backend that cannot run here.
    """
    if act not in ACTS:
        raise InputError(f"masked_swiglu: act must be one of {', '.join(ACTS)}, not {act!r}")
    if gate.dim() == 0 or gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise InputError(
            f"masked_swiglu: gate and up must agree, got {tuple(gate.shape)} {gate.dtype} {gate.device} and "
            f"{tuple(up.shape)} {up.dtype} {up.device}"
        )
    wide = torch.promote_types(gate.dtype, torch.float32)
    if mask.shape != gate.shape[-1:] or mask.device != gate.device or mask.dtype not in (torch.bool, wide):
        raise InputError(
            f"masked_swiglu: mask must be [{gate.shape[-1]}] {wide} or bool on {gate.device}, "
            f"got {tuple(mask.shape)} {mask.dtype} {mask.device}"
        )
    for name, acc in (("taylor", taylor), ("fisher", fisher)):
        if acc is not None:
            _check_scores(name, acc, gate, "masked_swiglu")
    mask = mask.to(wide).contiguous()
    chosen = _swiglu.pick(gate.device, backend, gate)
    scores = taylor is not None or fisher is not None
    if torch.is_grad_enabled() and (scores or gate.requires_grad or up.requires_grad or mask.requires_grad):
        return _MaskedSwiGLU.apply(gate, up, mask, act, taylor, fisher, chosen, _ticket if scores else None)
    return chosen.run[0](gate, up, mask, act)


def column_sqnorm_(x: torch.Tensor, acc: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """Adds the sum over tokens of x^2 to acc in place and returns acc.

    Args:
        x: [..., C] float32, bfloat16 or float16; any strides, without a copy if C has stride 1.
        acc: [C] float32, contiguous, on the same device.
        backend: None chooses; "cpu" or "reference" insists.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or a backend that cannot run here.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise InputError(f"column_sqnorm_: x must be a floating point tensor [..., C], got {tuple(x.shape)} {x.dtype}")
    _check_scores("acc", acc, x, "column_sqnorm_")
    chosen = _sqnorm.pick(x.device, backend, x)
    with torch.no_grad():
        chosen.run(x, acc)
    return acc
