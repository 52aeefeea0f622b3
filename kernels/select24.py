"""select24 in Triton: the best two of each four weights by abs(weight) * col_scale, packed in one pass.

Weights come as integers of their own width, so that the kept ones are copied bit for bit. One row of the tile is one
group of four; a row of W counts an even number of groups (the last one is padding when K % 8 == 4), so two neighbours
always share a byte of meta.
"""

import triton
import triton.language as tl

# 512 groups of four: 16 bytes a lane and load in 16-bit with four warps, and nothing but registers is shared.
BLOCK = 512
WARPS = 4


@triton.jit
def _four(x, BLOCK: tl.constexpr):
    """The four columns of x [BLOCK, 4]."""
    even, odd = tl.split(tl.reshape(x, (BLOCK, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _score(bits, FLOAT: tl.constexpr):
    return tl.abs(bits.to(FLOAT, bitcast=True).to(tl.float32))


@triton.jit
def _select(
    weight, col_scale, values, meta, nan, groups, units,
    FLOAT: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight int [N, K], col_scale float32 [K], values int [N, K/2], meta uint8 [N, ceil(K/8)], nan int32 [1].

    groups = K / 4; units = N * (groups rounded up to even); FLOAT: the type whose bits weight holds.
    """
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    even = (groups + 1) // 2 * 2
    row, group = unit // even, unit % even
    real = (unit < units) & (group < groups)
    slot = tl.arange(0, 4)
    at = (row.to(tl.int64) * groups + group)[:, None]
    w0, w1, w2, w3 = _four(tl.load(weight + at * 4 + slot[None, :], mask=real[:, None], other=0), BLOCK)
    s0, s1, s2, s3 = _score(w0, FLOAT), _score(w1, FLOAT), _score(w2, FLOAT), _score(w3, FLOAT)
    if SCALED:
        scale = tl.load(col_scale + group[:, None] * 4 + slot[None, :], mask=real[:, None], other=0.0)
        c0, c1, c2, c3 = _four(scale, BLOCK)
        s0, s1, s2, s3 = s0 * c0, s1 * c1, s2 * c2, s3 * c3
    is_nan = (s0 != s0) | (s1 != s1) | (s2 != s2) | (s3 != s3)
    if tl.max((is_nan & real).to(tl.int32), axis=0) != 0:
        tl.store(nan, 1)
    # kept if fewer than two go before: higher scores, and equal ones further left
    a, b, c = (s1 > s0).to(tl.int32), (s2 > s0).to(tl.int32), (s3 > s0).to(tl.int32)
    d, e, f = (s2 > s1).to(tl.int32), (s3 > s1).to(tl.int32), (s3 > s2).to(tl.int32)
    keep0, keep1 = a + b + c < 2, 1 - a + d + e < 2
    keep2, keep3 = 2 - b - d + f < 2, 3 - c - e - f < 2
    first = tl.where(keep0, 0, tl.where(keep1, 1, 2))
    second = tl.where(keep3, 3, tl.where(keep2, 2, 1))
    pair = tl.join(tl.where(keep0, w0, tl.where(keep1, w1, w2)), tl.where(keep3, w3, tl.where(keep2, w2, w1)))
    tl.store(values + at * 2 + tl.arange(0, 2)[None, :], pair, mask=real[:, None])
    nibble = tl.where(real, first | second << 2, 4)
    low, high = tl.split(tl.reshape(nibble, (BLOCK // 2, 2)))
    index = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    tl.store(meta + index, (low | high << 4).to(tl.uint8), mask=index < units // 2)


FLOATS = {"f32": tl.float32, "bf16": tl.bfloat16, "f16": tl.float16}


def select24(weight, kind, col_scale, values, meta, nan) -> None:
    """weight [N, K] to values [N, K/2] and meta uint8 [N, ceil(K/8)]; nan int32 [1] becomes 1 if a score is NaN.

    weight and values are integers with the bits of `kind`; col_scale float32 [K] or None.
    """
    rows, cols = weight.shape
    units = rows * ((cols // 4 + 1) // 2 * 2)
    _select[(triton.cdiv(units, BLOCK),)](
        weight, col_scale, values, meta, nan, cols // 4, units,
        FLOAT=FLOATS[kind], SCALED=col_scale is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
