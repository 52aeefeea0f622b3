"""subset_ffn in Triton: a gated FFN over listed channels, read where they lie in the dense weights.

A program has up to BM rows of one segment. `_hidden` makes their activations of BC channels, whose rows of W_gate and
W_up it gathers; `_down` multiplies them with BH columns of the same rows of W_down^T. Few rows fill a GPU only if the
channels are split as well: `_down` writes one sum for each part, and who calls adds them up in their order.
"""

import triton
import triton.language as tl

FEW, MANY = 16, 32  # rows of a program: the least of tl.dot, and twice that where some segment has more
# With these no type spills registers on sm_80 to sm_100 and gfx942; twice the STEP does in float32.
CHANNELS, STEP = 32, 32  # of `_hidden`
COLUMNS, LISTED = 64, 32  # of `_down`
WARPS, STAGES = 4, 3


@triton.jit
def _place(tiles, BM: tl.constexpr):
    """This program's rows, which of them are real, and its segment's list: where it begins, how long it is."""
    tile = tiles + 4 * tl.program_id(0)
    row, first, count = tl.load(tile), tl.load(tile + 2), tl.load(tile + 3)
    at = tl.arange(0, BM)
    return (row + at).to(tl.int64), at < tl.load(tile + 1), first, count


@triton.jit
def _dot(a, b, acc, DOT: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), acc, input_precision="ieee")


@triton.jit
def _hidden(
    x, gate, up, gate_scale, up_scale, down_scale, gate_bias, up_bias, channels, tiles, h, H, pitch, width,
    GELU: tl.constexpr, SCALED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """h [T, width]: act(gate) * up (times the scale of the channel's row of W_down) of the listed channels."""
    row, live_row, first, count = _place(tiles, BM)
    place = tl.program_id(1) * BC + tl.arange(0, BC)
    live = place < count
    channel = tl.load(channels + first + place, mask=live, other=0)
    line = channel.to(tl.int64)[:, None] * pitch
    a, b = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    for start in range(0, H, BK):
        k = start + tl.arange(0, BK)
        n = tl.load(x + row[:, None] * H + k[None, :], mask=live_row[:, None] & (k < H)[None, :], other=0.0)
        read = live[:, None] & (k < H)[None, :]
        a = _dot(n, tl.trans(tl.load(gate + line + k[None, :], mask=read, other=0).to(DOT)), a, DOT)
        b = _dot(n, tl.trans(tl.load(up + line + k[None, :], mask=read, other=0).to(DOT)), b, DOT)
    if SCALED:
        a *= tl.load(gate_scale + channel)[None, :]
        b *= tl.load(up_scale + channel)[None, :]
    if GATE_BIAS:
        a += tl.load(gate_bias + channel)[None, :]
    if UP_BIAS:
        b += tl.load(up_bias + channel)[None, :]
    z = a * (1.5957691216 + 0.07135481283 * (a * a)) if GELU else a
    v = a / (1.0 + tl.exp(-z)) * b
    if SCALED:
        v *= tl.load(down_scale + channel)[None, :]
    tl.store(
        h + row[:, None] * width + place[None, :], v.to(h.dtype.element_ty), mask=live_row[:, None] & live[None, :]
    )


@triton.jit
def _down(
    h, down, channels, tiles, partial, T, H, pitch, width,
    DOT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """partial [splits, T, H]: the sum over this part of the segment's channels of h times their rows of W_down^T."""
    row, live_row, first, count = _place(tiles, BM)
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    steps, parts, part = tl.cdiv(count, BC), tl.num_programs(2), tl.program_id(2)
    acc = tl.zeros((BM, BH), tl.float32)
    for step in range(steps * part // parts, steps * (part + 1) // parts):
        place = step * BC + tl.arange(0, BC)
        live = place < count
        channel = tl.load(channels + first + place, mask=live, other=0)
        a = tl.load(h + row[:, None] * width + place[None, :], mask=live_row[:, None] & live[None, :], other=0.0)
        read = live[:, None] & (column < H)[None, :]
        w = tl.load(down + channel.to(tl.int64)[:, None] * pitch + column[None, :], mask=read, other=0)
        acc = _dot(a, w, acc, DOT)
    at = part.to(tl.int64) * T * H + row[:, None] * H + column[None, :]
    tl.store(partial + at, acc, mask=live_row[:, None] & (column < H)[None, :])


INTERPRETED = not isinstance(_hidden, triton.JITFunction)


def rows_of(longest: int) -> int:
    """Rows of a program, where the longest segment has so many."""
    return FEW if longest <= FEW else MANY


def splits(tiles: int, hidden: int, width: int, processors: int) -> int:
    """Parts of the channels that fill the device, each of four steps or more, so that adding them up costs little."""
    return max(1, min(processors // (tiles * triton.cdiv(hidden, COLUMNS)), triton.cdiv(width, LISTED) // 4))


def subset_ffn(x, weights, scales, biases, channels, tiles, h, partial, gelu: bool, rows: int) -> None:
    """x [T, H], weights three times [C, H] with rows one pitch apart, tiles int32 [P, 4]: row, rows, first, count.

    h [T, width] in the dtype of x, for the longest list; partial float32 [splits, T, H]; `rows` at most in a tile.
    scales and biases of the channels may be None.
    """
    (tokens, hidden), width, pitch = x.shape, h.shape[1], weights[0].stride(0)
    names = {"torch.float32": tl.float32, "torch.bfloat16": tl.bfloat16, "torch.float16": tl.float16}
    kind = names[str(x.dtype)]
    dot = tl.float32 if INTERPRETED else kind  # the interpreter multiplies bfloat16 as the integers it keeps them in
    gate, up, down = weights
    _hidden[(len(tiles), triton.cdiv(width, CHANNELS))](
        x, gate, up, *scales, *biases, channels, tiles, h, hidden, pitch, width,
        GELU=gelu, SCALED=scales[0] is not None, GATE_BIAS=biases[0] is not None, UP_BIAS=biases[1] is not None,
        DOT=dot, BM=rows, BC=CHANNELS, BK=STEP, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    _down[(len(tiles), triton.cdiv(hidden, COLUMNS), len(partial))](
        h, down, channels, tiles, partial, tokens, hidden, pitch, width,
        DOT=dot, BM=rows, BC=LISTED, BH=COLUMNS, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
