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
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from persona_pruner.errors import InputError
from persona_pruner.ops import _native
from persona_pruner.ops._dispatch import Backend, Op

ACTS = ("silu", "gelu_tanh")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the native kernels take the position as code
BLOCK = 64  # tokens a row of partial sums stands for: kBlock in csrc/cpu/importance.cpp and csrc/cuda/importance.cuh

_GELU = math.sqrt(2 / math.pi), 0.044715


def _rows(x: Tensor) -> Tensor:
    """x as [tokens, C] with unit stride along C; a view unless the strides forbid it."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _activation(gate: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """act(gate) = gate * s(z) with the logistic function s, and its derivative. Finite for every finite gate."""
    near = gate.clamp(-1e4, 1e4)
    if act == "silu":
        z, dz = near, 1.0
    else:
        k, cubic = _GELU
        z, dz = 2 * k * (near + cubic * near**3), 2 * k * (1 + 3 * cubic * near**2)
    s, rest = torch.sigmoid(z), torch.sigmoid(-z)
    return gate.clamp(min=-1e4) * s, s + near * s * rest * dz


def activation(gate: Tensor, act: str) -> Tensor:
    """act(gate), finite for every finite gate."""
    return _activation(gate, act)[0]


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
    acc += _rows(x.detach()).to(torch.promote_types(x.dtype, torch.float32)).square().sum(0)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _scratch(rows: Tensor, sums: int) -> Tensor:
    """Space for the partial sums of [tokens, C]: [blocks, sums, C] float32."""
    return rows.new_empty(-(-rows.shape[0] // BLOCK), sums, rows.shape[1], dtype=torch.float32)


def _module(x: Tensor):
    """The native module for x, and its last argument: a stream on a GPU, the number of threads on a CPU."""
    if x.is_cuda:
        return _native.cuda_module(), torch.cuda.current_stream(x.device).cuda_stream
    return _native.cpu_module(), torch.get_num_threads()


def _outputs(gate, mask, needs, taylor, fisher):
    """Empty d_gate, d_up, d_mask and partial sums, None where not needed."""
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if n else None for n in needs[:2])
    d_mask = torch.empty_like(mask) if needs[2] else None
    scores = needs[2] or taylor is not None or fisher is not None
    return d_gate, d_up, d_mask, _scratch(_rows(gate), 2) if scores else None


def _native_forward(gate, up, mask, act):
    g, u = _rows(gate), _rows(up)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    module, last = _module(gate)
    with _native.on_device(gate):
        module.masked_swiglu_forward(
            g.data_ptr(), g.stride(0), u.data_ptr(), u.stride(0), mask.data_ptr(), h.data_ptr(),
            *g.shape, DTYPES.index(gate.dtype), ACTS.index(act), last,
        )  # fmt: skip
    return h


def _native_backward(dh, gate, up, mask, act, needs, taylor, fisher):
    d, g, u = _rows(dh), _rows(gate), _rows(up)
    d_gate, d_up, d_mask, partial = _outputs(gate, mask, needs, taylor, fisher)
    module, last = _module(gate)
    with _native.on_device(gate):
        module.masked_swiglu_backward(
            d.data_ptr(), d.stride(0), g.data_ptr(), g.stride(0), u.data_ptr(), u.stride(0), mask.data_ptr(),
            _address(d_gate), _address(d_up), _address(partial), _address(d_mask), _address(taylor), _address(fisher),
            *g.shape, DTYPES.index(gate.dtype), ACTS.index(act), last,
        )  # fmt: skip
    return d_gate, d_up, d_mask


def _cpu_sqnorm(x, acc):
    # Few calls: 2048 rows of 1536 channels take 0.3 ms, and the call 0.05 where its code has been swept out.
    rows = _rows(x)
    _native.cpu_module().column_sqnorm(
        rows.data_ptr(), rows.stride(0), 0, acc.data_ptr(), *rows.shape, DTYPES.index(x.dtype), torch.get_num_threads()
    )


def _cuda_sqnorm(x, acc):
    rows = _rows(x)
    partial = _scratch(rows, 1)
    module, last = _module(x)
    with _native.on_device(x):
        module.column_sqnorm(
            rows.data_ptr(), rows.stride(0), partial.data_ptr(), acc.data_ptr(),
            *rows.shape, DTYPES.index(x.dtype), last,
        )  # fmt: skip


def _triton_forward(gate, up, mask, act):
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if h.numel():
        with _native.on_device(gate):
            _native.triton_kernels("importance").masked_swiglu_forward(
                _rows(gate), _rows(up), mask, _rows(h), act == "gelu_tanh", BLOCK
            )
    return h


def _triton_backward(dh, gate, up, mask, act, needs, taylor, fisher):
    d_gate, d_up, d_mask, partial = _outputs(gate, mask, needs, taylor, fisher)
    if gate.numel():
        with _native.on_device(gate):
            _native.triton_kernels("importance").masked_swiglu_backward(
                _rows(dh), _rows(gate), _rows(up), mask, d_gate, d_up, d_mask, partial, taylor, fisher,
                act == "gelu_tanh", BLOCK,
            )  # fmt: skip
    elif d_mask is not None:
        d_mask.zero_()
    return d_gate, d_up, d_mask


def _triton_sqnorm(x, acc):
    rows = _rows(x)
    if rows.numel():
        with _native.on_device(x):
            _native.triton_kernels("importance").column_sqnorm(rows, _scratch(rows, 1), acc, BLOCK)


def _cpu_unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it runs on CPU tensors, not {device_type}"
    module = _native.cpu_module()
    return module if isinstance(module, str) else None


def _cuda_unavailable(device_type: str) -> str | None:
    if device_type != "cuda" or torch.version.hip:
        return f"it runs on NVIDIA GPU tensors, not {'ROCm' if torch.version.hip else device_type}"
    module = _native.cuda_module()
    return module if isinstance(module, str) else None


_triton_unavailable = _native.triton_unavailable("importance")


def _refuses_dtype(x: Tensor) -> str | None:
    return None if x.dtype in DTYPES else f"it takes float32, bfloat16 and float16, not {x.dtype}"


def _cuda_refuses(x: Tensor) -> str | None:
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs compute capability 8.0 or more"
    return _refuses_dtype(x)


class _Passes(NamedTuple):
    """What a backend of masked_swiglu runs. `needs` says which of d_gate, d_up, d_mask to return; the rest is None."""

    forward: Callable  # (gate, up, mask, act) -> h
    backward: Callable  # (dh, gate, up, mask, act, needs, taylor, fisher) -> d_gate, d_up, d_mask


_swiglu = Op(
    "masked_swiglu",
    [
        Backend("cpu", _Passes(_native_forward, _native_backward), _cpu_unavailable, _refuses_dtype),
        Backend("cuda", _Passes(_native_forward, _native_backward), _cuda_unavailable, _cuda_refuses),
        Backend("triton", _Passes(_triton_forward, _triton_backward), _triton_unavailable, _refuses_dtype),
        Backend("reference", _Passes(_reference_forward, _reference_backward)),
    ],
)
_sqnorm = Op(
    "column_sqnorm_",
    [
        Backend("cpu", _cpu_sqnorm, _cpu_unavailable, _refuses_dtype),
        Backend("cuda", _cuda_sqnorm, _cuda_unavailable, _cuda_refuses),
        Backend("triton", _triton_sqnorm, _triton_unavailable, _refuses_dtype),
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
    def forward(ctx, gate, up, mask, act, taylor, fisher, passes, ticket):
        ctx.save_for_backward(gate, up, mask)
        ctx.rest = act, taylor, fisher, passes
        return passes.forward(gate, up, mask, act)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):
        act, taylor, fisher, passes = ctx.rest
        grads = passes.backward(dh, *ctx.saved_tensors, act, ctx.needs_input_grad[:3], taylor, fisher)
        return *grads, None, None, None, None, None


# The same for torch.compile, which must see opaque operators (an eager call would pay 20 us for them).


@torch.library.custom_op("persona_pruner::masked_swiglu", mutates_args=())
def _compiled_swiglu(
    gate: Tensor, up: Tensor, mask: Tensor, act: str, taylor: Tensor | None, fisher: Tensor | None,
    ticket: Tensor | None, backend: str | None,
) -> Tensor:  # fmt: skip
    return _swiglu.pick(gate.device, backend, gate).run.forward(gate, up, mask, act)


@_compiled_swiglu.register_fake
def _(gate, up, mask, act, taylor, fisher, ticket, backend):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op("persona_pruner::masked_swiglu_backward", mutates_args=("taylor", "fisher"))
def _compiled_swiglu_backward(
    dh: Tensor, gate: Tensor, up: Tensor, mask: Tensor, act: str, needs_gate: bool, needs_up: bool, needs_mask: bool,
    taylor: Tensor | None, fisher: Tensor | None, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    passes = _swiglu.pick(gate.device, backend, gate).run
    grads = passes.backward(dh, gate, up, mask, act, (needs_gate, needs_up, needs_mask), taylor, fisher)
    return tuple(gate.new_empty(0) if g is None else g for g in grads)


@_compiled_swiglu_backward.register_fake
def _(dh, gate, up, mask, act, needs_gate, needs_up, needs_mask, taylor, fisher, backend):
    grads = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)]
    grads.append(torch.empty_like(mask))
    return tuple(g if n else gate.new_empty(0) for g, n in zip(grads, (needs_gate, needs_up, needs_mask), strict=True))


def _setup(ctx, inputs, output):
    gate, up, mask, ctx.act, taylor, fisher, _, ctx.backend = inputs
    ctx.save_for_backward(gate, up, mask, taylor, fisher)


def _backward(ctx, dh):
    gate, up, mask, taylor, fisher = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = _compiled_swiglu_backward(dh, gate, up, mask, ctx.act, *needs, taylor, fisher, ctx.backend)
    return *(g if n else None for g, n in zip(grads, needs, strict=True)), None, None, None, None, None


_compiled_swiglu.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("persona_pruner::column_sqnorm_", mutates_args=("acc",))
def _compiled_sqnorm(x: Tensor, acc: Tensor, backend: str | None) -> None:
    _sqnorm.pick(x.device, backend, x).run(x, acc)


def _check_scores(name: str, acc: Tensor, x: Tensor, op: str) -> None:
    if acc.shape != x.shape[-1:] or acc.device != x.device or not acc.is_contiguous() or acc.requires_grad:
        raise InputError(f"{op}: {name} must be contiguous [{x.shape[-1]}] on {x.device} and need no gradient")
    if acc.dtype != torch.promote_types(x.dtype, torch.float32):
        raise InputError(f"{op}: {name} must be float32 (float64 for float64 input), not {acc.dtype}")


def masked_swiglu(
    gate: Tensor,
    up: Tensor,
    mask: Tensor,
    act: str = "silu",
    taylor: Tensor | None = None,
    fisher: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """act(gate) * up * mask, differentiable in all three, with channel scores gathered on the way back.

    Args:
        gate, up: [..., C] float32, bfloat16 or float16, the same shape and dtype; any strides, without a copy if C has
            stride 1 (the two halves of one fused product). float64 runs on the reference.
        mask: [C] float32 or bool. Its gradient is float32 and covers masked channels too.
        act: "silu" or "gelu_tanh".
        taylor, fisher: [C] float32, or None. The backward pass adds its scores to them in place.
        backend: None chooses; "cpu", "cuda", "triton" or "reference" insists.

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
    scores = taylor is not None or fisher is not None
    ticket = _ticket if scores and torch.is_grad_enabled() else None
    if torch.compiler.is_compiling():
        return _compiled_swiglu(gate, up, mask, act, taylor, fisher, ticket, backend)
    passes = _swiglu.pick(gate.device, backend, gate).run
    if ticket is not None or (torch.is_grad_enabled() and any(x.requires_grad for x in (gate, up, mask))):
        return _MaskedSwiGLU.apply(gate, up, mask, act, taylor, fisher, passes, ticket)
    return passes.forward(gate, up, mask, act)


def column_sqnorm_(x: Tensor, acc: Tensor, backend: str | None = None) -> Tensor:
    """Adds the sum over tokens of x^2 to acc in place and returns acc.

    Args:
        x: [..., C] float32, bfloat16 or float16; any strides, without a copy if C has stride 1.
        acc: [C] float32, contiguous, on the same device.
        backend: None chooses; "cpu", "cuda", "triton" or "reference" insists.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or a backend that cannot run here.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise InputError(f"column_sqnorm_: x must be a floating point tensor [..., C], got {tuple(x.shape)} {x.dtype}")
    _check_scores("acc", acc, x, "column_sqnorm_")
    if torch.compiler.is_compiling():
        _compiled_sqnorm(x.detach(), acc, backend)
    else:
        _sqnorm.pick(x.device, backend, x).run(x, acc)
    return acc
