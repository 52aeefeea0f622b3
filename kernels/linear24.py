"""linear24 in Triton: y = x W^T with W packed 2:4, for GPUs and types that the CUDA kernels do not serve.

Triton has no sparse product, so the packed weights are spread out in registers and multiplied densely: memory traffic
is that of the packed weight, the arithmetic that of the dense one. Both values of a group of four come as one integer
(16-bit types as int32) and the metadata of eight groups as one int32: single values or bytes would not merge into wide
loads.
"""

import triton
import triton.language as tl

# Tiles by bytes of a value: rows, columns, warps of a tile of 16 tokens; tokens and warps of the larger. They spill
# no registers on sm_80 to sm_100 and gfx942 (32 tokens do), and a lane loads values 16 bytes at a time. float32 has no
# tensor core that keeps its precision, and its loop unrolls.
TILES = {1: (64, 128, 4, 64, 4), 2: (64, 128, 4, 64, 8), 4: (32, 32, 8, 16, 8)}
MIN_TOKENS = 16  # of tl.dot
STAGES = 3


@triton.jit
def _dense(values, meta, row, step, half, words, live_row, FLOAT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """W[row, step * BK : (step + 1) * BK], zeros included, and the same shape of bits that says which are kept."""
    BITS: tl.constexpr = FLOAT.primitive_bitwidth
    NARROW: tl.constexpr = tl.int8 if BITS == 8 else tl.int16 if BITS == 16 else tl.int32
    group = step * (BK // 4) + tl.arange(0, BK // 4)
    word = step * (BK // 32) + tl.arange(0, BK // 32)
    live = live_row[:, None] & (group < half)[None, :]
    pair = tl.load(values + row[:, None] * half + group[None, :], mask=live, other=0)
    v0 = pair.to(NARROW).to(FLOAT, bitcast=True)
    v1 = (pair >> BITS).to(NARROW).to(FLOAT, bitcast=True)
    live = live_row[:, None] & (word < words)[None, :]
    bits = tl.load(meta + row[:, None] * words + word[None, :], mask=live, other=0)
    nibble = tl.reshape((bits[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15, (BN, BK // 4))
    i0, i1 = nibble & 3, nibble >> 2
    zero = tl.zeros((BN, BK // 4), FLOAT)
    w0 = tl.where(i0 == 0, v0, tl.where(i1 == 0, v1, zero))
    w1 = tl.where(i0 == 1, v0, tl.where(i1 == 1, v1, zero))
    w2 = tl.where(i0 == 2, v0, tl.where(i1 == 2, v1, zero))
    w3 = tl.where(i0 == 3, v0, tl.where(i1 == 3, v1, zero))
    k0, k1, k2, k3 = (i0 == 0) | (i1 == 0), (i0 == 1) | (i1 == 1), (i0 == 2) | (i1 == 2), (i0 == 3) | (i1 == 3)
    weight = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BN, BK))
    kept = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (BN, BK))
    return weight, kept


@triton.jit
def _x_tile(x, token, step, M, K, BK: tl.constexpr):
    column = step * BK + tl.arange(0, BK)
    return tl.load(x + token[:, None] * K + column[None, :], mask=(token < M)[:, None] & (column < K)[None, :], other=0)


@triton.jit
def _dot(a, b, acc, DOT: tl.constexpr):
    if tl.int8 == DOT:
        return tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
    else:
        return tl.dot(a.to(DOT), tl.trans(b.to(DOT)), acc, input_precision="ieee")


@triton.jit
def _careful(
    x, values, meta, row, token, first, last, M, K, half, words, live_row,
    FLOAT: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The product with Inf and NaN of x in kept columns only: its finite part, and a count of the contributions that
    are not. Narrow steps, one count after the other: the registers of a rare path must not limit the common one."""
    acc = tl.zeros((BM, BN), tl.float32)
    zero = tl.zeros((BM, BN), tl.float32)
    for step in range(first, last):
        weight, kept = _dense(values, meta, row, step, half, words, live_row, FLOAT, BN, 32)
        tile, w = _x_tile(x, token, step, M, K, 32).to(tl.float32), weight.to(tl.float32)
        infinite = tl.abs(tile) == float("inf")
        acc = _dot(tl.where(infinite | (tile != tile), 0.0, tile), w, acc, DOT)
        nans = _dot(tl.where(tile != tile, 1.0, 0.0), tl.where(kept, 1.0, 0.0), zero, DOT)
        nans = _dot(tl.where(infinite, 1.0, 0.0), tl.where(kept & (w == 0), 1.0, 0.0), nans, DOT)
        acc = tl.where(nans > 0, float("nan"), acc)
        sign_w = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
        up = _dot(tl.where(infinite & (tile > 0), 1.0, 0.0), tl.maximum(sign_w, 0.0), zero, DOT)
        up = _dot(tl.where(infinite & (tile < 0), 1.0, 0.0), tl.maximum(-sign_w, 0.0), up, DOT)
        acc = tl.where(up > 0, acc + float("inf"), acc)
        down = _dot(tl.where(infinite & (tile > 0), 1.0, 0.0), tl.maximum(-sign_w, 0.0), zero, DOT)
        down = _dot(tl.where(infinite & (tile < 0), 1.0, 0.0), tl.maximum(sign_w, 0.0), down, DOT)
        acc = tl.where(down > 0, acc - float("inf"), acc)
    return acc


@triton.jit
def _finish(acc, m, n, live, bias, scales, token_scales, BIAS: tl.constexpr, WHOLE: tl.constexpr):
    v = acc.to(tl.float32)
    if WHOLE:
        v *= tl.load(token_scales + m, mask=live, other=0.0) * tl.load(scales + n, mask=live, other=0.0)
    if BIAS:
        v += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    return v


@triton.jit(do_not_specialize=["M", "splits"])
def _product(
    x, values, meta, bias, scales, token_scales, y, partial, M, N, K, half, words, splits,
    FLOAT: tl.constexpr, DOT: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x [M, K], values [N, half] integers of a pair each, meta int32 [N, words]; partial [splits, M, N] if SPLIT.

    FLOAT is the type of one value (int8 if WHOLE), DOT that of the product; half = K / 4; words = ceil(K / 32).
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    live_row, row = row < N, row.to(tl.int64)
    steps = tl.cdiv(K, BK)
    first, last = steps * tl.program_id(2) // splits, steps * (tl.program_id(2) + 1) // splits
    acc = tl.zeros((BM, BN), tl.int32 if WHOLE else tl.float32)
    for step in range(first, last):
        weight, _ = _dense(values, meta, row, step, half, words, live_row, FLOAT, BN, BK)
        acc = _dot(_x_tile(x, token, step, M, K, BK), weight, acc, DOT)
    if not WHOLE:  # noqa: SIM102  (a constant outside, a tensor inside)
        # A dense product also multiplies pruned columns by zero, and turns an Inf or NaN of x there into NaN. Only then
        # is the tile done again: finite parts as before, and the contributions that are Inf or NaN are counted.
        if tl.max(tl.max((acc - acc != 0).to(tl.int32), axis=1), axis=0) != 0:
            acc = _careful(
                x, values, meta, row, token, first * (BK // 32), last * (BK // 32), M, K, half, words, live_row,
                FLOAT, DOT, BM, BN,
            )  # fmt: skip
    live = (token < M)[:, None] & live_row[None, :]
    at = token[:, None] * N + row[None, :]
    if SPLIT:
        tl.store(partial + tl.program_id(2).to(tl.int64) * M * N + at, acc, mask=live)
    else:
        out = _finish(acc, token[:, None], row[None, :], live, bias, scales, token_scales, BIAS, WHOLE)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["M", "splits"])
def _sum(
    partial, bias, scales, token_scales, y, M, N, splits,
    BIAS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = the sum of partial [splits, M, N] in their order, finished."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < M * N
    acc = tl.zeros((BLOCK,), tl.int32 if WHOLE else tl.float32)
    part = partial + at
    for _ in range(splits):
        acc += tl.load(part, mask=live, other=0)
        part += M * N
    out = _finish(acc, at // N, at % N, live, bias, scales, token_scales, BIAS, WHOLE)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=live)


INTERPRETED = not isinstance(_product, triton.JITFunction)


def tile(tokens: int, element_size: int) -> tuple[int, int, int, int]:
    """Tokens, rows, columns and warps of a program."""
    rows, columns, warps, more_tokens, more_warps = TILES[element_size]
    return (MIN_TOKENS, rows, columns, warps) if tokens <= MIN_TOKENS else (more_tokens, rows, columns, more_warps)


def splits(tokens: int, rows: int, cols: int, element_size: int, processors: int) -> int:
    """Parts of K that fill the device, each of four steps or more, so that adding the parts up costs little."""
    bm, bn, bk, _ = tile(tokens, element_size)
    programs = triton.cdiv(rows, bn) * triton.cdiv(tokens, bm)
    return max(1, min(processors // programs, triton.cdiv(cols, bk) // 4))


def linear24(x, values, meta, bias, scales, token_scales, y, partial) -> None:
    """x [M, K], values [N, K/4] as integers of a pair, meta int32 [N, ceil(K/32)], y [M, N]; bias, scales may be None.

    partial [splits, M, N] of the sum's type (float32, int32 for int8), or None: no split along K.
    """
    (tokens, cols), rows = x.shape, values.shape[0]
    types = {1: tl.int8, 2: tl.bfloat16 if "bfloat16" in str(x.dtype) else tl.float16, 4: tl.float32}
    kind, parts, whole = types[x.element_size()], 1 if partial is None else partial.shape[0], scales is not None
    # the interpreter multiplies bfloat16 as the integers it keeps them in
    dot = tl.float32 if INTERPRETED and kind == tl.bfloat16 else kind
    bm, bn, bk, warps = tile(tokens, x.element_size())
    _product[(triton.cdiv(rows, bn), triton.cdiv(tokens, bm), parts)](
        x, values, meta, bias, scales, token_scales, y, partial, tokens, rows, cols, cols // 4, meta.shape[1], parts,
        FLOAT=kind, DOT=dot, BIAS=bias is not None, WHOLE=whole, SPLIT=partial is not None,
        BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    if partial is not None:
        _sum[(triton.cdiv(tokens * rows, 512),)](
            partial, bias, scales, token_scales, y, tokens, rows, parts,
            BIAS=bias is not None, WHOLE=whole, BLOCK=512, num_warps=4,
        )  # fmt: skip
