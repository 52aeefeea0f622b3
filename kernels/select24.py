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
    bits = tl.load(weight + at * 4 + slot[None, :], mask=real[:, None], other=0)
    score = tl.abs(bits.to(FLOAT, bitcast=True).to(tl.float32))
    if SCALED:
        score *= tl.load(col_scale + group[:, None] * 4 + slot[None, :], mask=real[:, None], other=0.0)
    is_nan = score != score
    if tl.max(tl.max(is_nan.to(tl.int32), axis=1), axis=0) != 0:
        tl.store(nan, 1)
    # Rank by counting who goes before: a higher score, or an equal one further left. NaN never gets here unreported.
    mine, other = score[:, :, None], score[:, None, :]
    left = slot[None, None, :] < slot[None, :, None]
    before = tl.sum(((other > mine) | ((other == mine) & left)).to(tl.int32), axis=2)
    kept = before < 2
    first = tl.min(tl.where(kept, slot[None, :], 4), axis=1)
    second = tl.max(tl.where(kept, slot[None, :], -1), axis=1)
    v0 = tl.sum(tl.where(slot[None, :] == first[:, None], bits, 0), axis=1).to(bits.dtype)
    v1 = tl.sum(tl.where(slot[None, :] == second[:, None], bits, 0), axis=1).to(bits.dtype)
    pair = tl.arange(0, 2)
    both = tl.where(pair[None, :] == 0, v0[:, None], v1[:, None])
    tl.store(values + at * 2 + pair[None, :], both, mask=real[:, None])
    nibble = tl.where(real, first | second << 2, 4).to(tl.int32)
    byte = tl.sum(tl.reshape(nibble, (BLOCK // 2, 2)) << (4 * pair[None, :]), axis=1)
    index = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    tl.store(meta + index, byte.to(tl.uint8), mask=index < units // 2)


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
