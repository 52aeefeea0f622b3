"""Triton kernels of masked_swiglu and column_sqnorm_; the formulas are in persona_pruner/ops/importance.py.

A program takes BLOCK tokens of TILE channels, ROWS tokens at a time, keeps the sums over its tokens in registers and
writes one row of partial sums. `_add_blocks` adds up those rows. No atomics: the same bits on every run.
"""

import triton
import triton.language as tl

TILE = 128  # 16 threads of 8 sixteen-bit elements, 16 bytes each
ROWS = 8
WARPS = 4


@triton.jit
def _act(x, GELU: tl.constexpr):
    """act(x) = x * s(z): returns x, s(z) and act'(x).

    Beyond +-1e4 act is 0 or x, with slope 0 or 1, in every bit: exp(-87), where the exponential stops, times 1e4
    vanishes, but times 1e38 it would not.
    """
    x = tl.where(x < -1e4, -1e4, x)  # NaN stays
    near = tl.where(x > 1e4, 1e4, x)
    if GELU:
        square = near * near
        z = near * (1.5957691216 + 0.07135481283 * square)
        dz = 1.5957691216 + 0.21406443849 * square
    else:
        z = near
        dz = 1.0
    e = tl.exp(tl.minimum(-z, 87.0))  # finite, and so is e*s = 1 - s; a NaN in x comes back through x*s
    s = 1.0 / (1.0 + e)
    return x, s, s + near * s * (e * s) * dz


@triton.jit
def _place(tokens, channels, BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """This program's block, the tokens of its first step, its channels, and which of those exist."""
    tiles = tl.cdiv(channels, TILE)
    block = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    token = block.to(tl.int64) * BLOCK + tl.arange(0, ROWS)
    return block, token, channel, channel < channels


@triton.jit
def _forward(
    gate, up, mask, h, tokens, channels, gate_stride, up_stride,
    GELU: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    _, token, channel, real = _place(tokens, channels, BLOCK, TILE, ROWS)
    m = tl.load(mask + channel, mask=real, other=0.0)
    for _ in range(BLOCK // ROWS):
        live = (token < tokens)[:, None] & real[None, :]
        x = tl.load(gate + token[:, None] * gate_stride + channel[None, :], mask=live, other=0.0).to(tl.float32)
        y = tl.load(up + token[:, None] * up_stride + channel[None, :], mask=live, other=0.0).to(tl.float32)
        x, s, _ = _act(x, GELU)
        out = x * s * y * m[None, :]
        tl.store(h + token[:, None] * channels + channel[None, :], out.to(h.dtype.element_ty), mask=live)
        token += ROWS


@triton.jit
def _backward(
    dh, gate, up, mask, d_gate, d_up, partial, tokens, channels, dh_stride, gate_stride, up_stride,
    GELU: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, SCORES: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block, token, channel, real = _place(tokens, channels, BLOCK, TILE, ROWS)
    m = tl.load(mask + channel, mask=real, other=0.0)
    first = tl.zeros((ROWS, TILE), tl.float32)
    second = tl.zeros((ROWS, TILE), tl.float32)
    for _ in range(BLOCK // ROWS):
        live = (token < tokens)[:, None] & real[None, :]
        x = tl.load(gate + token[:, None] * gate_stride + channel[None, :], mask=live, other=0.0).to(tl.float32)
        y = tl.load(up + token[:, None] * up_stride + channel[None, :], mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dh + token[:, None] * dh_stride + channel[None, :], mask=live, other=0.0).to(tl.float32)
        x, s, slope = _act(x, GELU)
        value = x * s
        here = token[:, None] * channels + channel[None, :]
        if GATE:
            out = slope * y * m[None, :] * dy
            tl.store(d_gate + here, out.to(d_gate.dtype.element_ty), mask=live)
        if UP:
            out = value * m[None, :] * dy
            tl.store(d_up + here, out.to(d_up.dtype.element_ty), mask=live)
        if SCORES:
            score = value * y * dy
            first += score
            second += score * score
        token += ROWS
    if SCORES:
        row = partial + block.to(tl.int64) * 2 * channels + channel
        tl.store(row, tl.sum(first, 0), mask=real)
        tl.store(row + channels, tl.sum(second, 0), mask=real)


@triton.jit
def _sqnorm(
    x, partial, tokens, channels, stride,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block, token, channel, real = _place(tokens, channels, BLOCK, TILE, ROWS)
    sums = tl.zeros((ROWS, TILE), tl.float32)
    for _ in range(BLOCK // ROWS):
        live = (token < tokens)[:, None] & real[None, :]
        v = tl.load(x + token[:, None] * stride + channel[None, :], mask=live, other=0.0).to(tl.float32)
        sums += v * v
        token += ROWS
    tl.store(partial + block.to(tl.int64) * channels + channel, tl.sum(sums, 0), mask=real)


@triton.jit
def _add_blocks(
    partial, target, add, blocks, channels, row_stride,
    SET: tl.constexpr, ADD: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums [blocks, channels] over its rows; sets `target` and adds to `add`."""
    channel = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.arange(0, ROWS).to(tl.int64)
    sums = tl.zeros((ROWS, TILE), tl.float32)
    for start in range(0, blocks, ROWS):
        live = (start + row < blocks)[:, None] & (channel < channels)[None, :]
        sums += tl.load(partial + (start + row)[:, None] * row_stride + channel[None, :], mask=live, other=0.0)
    total = tl.sum(sums, 0)
    real = channel < channels
    if SET:
        tl.store(target + channel, total, mask=real)
    if ADD:
        tl.store(add + channel, tl.load(add + channel, mask=real) + total, mask=real)


def _grid(tokens, channels, block):
    return (triton.cdiv(channels, TILE) * triton.cdiv(tokens, block),)


def _reduce(partial, row, target, add):
    """Second stage for row `row` of partial sums [blocks, rows, C]; target and add are [C] or None."""
    if target is None and add is None:
        return
    blocks, rows, channels = partial.shape
    _add_blocks[(triton.cdiv(channels, TILE),)](
        partial[:, row], target, add, blocks, channels, rows * channels,
        SET=target is not None, ADD=add is not None, TILE=TILE, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip


def masked_swiglu_forward(gate, up, mask, h, gelu, block) -> None:
    """gate, up [T, C] with unit stride along C, h [T, C] contiguous, mask [C] float32."""
    tokens, channels = gate.shape
    _forward[_grid(tokens, channels, block)](
        gate, up, mask, h, tokens, channels, gate.stride(0), up.stride(0),
        GELU=gelu, BLOCK=block, TILE=TILE, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip


def masked_swiglu_backward(dh, gate, up, mask, d_gate, d_up, d_mask, partial, taylor, fisher, gelu, block) -> None:
    """As the forward; partial [blocks, 2, C] float32 scratch; d_gate, d_up, d_mask, partial, scores may be None."""
    tokens, channels = gate.shape
    _backward[_grid(tokens, channels, block)](
        dh, gate, up, mask, d_gate, d_up, partial, tokens, channels, dh.stride(0), gate.stride(0), up.stride(0),
        GELU=gelu, GATE=d_gate is not None, UP=d_up is not None, SCORES=partial is not None,
        BLOCK=block, TILE=TILE, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
    if partial is not None:
        _reduce(partial, 0, d_mask, taylor)
        _reduce(partial, 1, None, fisher)


def column_sqnorm(x, partial, acc, block) -> None:
    """x [T, C] with unit stride along C; partial [blocks, 1, C] float32 scratch; adds to acc [C]."""
    tokens, channels = x.shape
    _sqnorm[_grid(tokens, channels, block)](
        x, partial, tokens, channels, x.stride(0), BLOCK=block, TILE=TILE, ROWS=ROWS, num_warps=WARPS
    )
    _reduce(partial, 0, None, acc)
