"""Logic, shifts, bit fields, byte permutes, comparisons and selects."""

import numpy as np

from . import fp
from .isa import SINK, SIZES, STORAGE, Imm, Pair
from .operands import I64, INT, U8, U32, U64, dst, fsrc, isrc, need, op, raw, rawdt, split


@op("and", "or", "xor")
def _logic(ins):
    ty = ins.parts[-1]
    fn = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.parts[0]]
    d, a, b = ins.operands
    w, ga, gb = dst(d, ty), raw(a, ty), raw(b, ty)
    return lambda C, m: w(C, m, fn(ga(C), gb(C)))


@op("not", "cnot")
def _not(ins):
    ty = ins.parts[-1]
    d, a = ins.operands
    w, g = dst(d, ty), raw(a, ty)
    if ins.parts[0] == "cnot":
        return lambda C, m: w(C, m, (g(C) == 0).astype(rawdt(ty)))
    return lambda C, m: w(C, m, ~g(C))


@op("shl", "shr")
def _shift(ins):
    ty = ins.parts[-1]
    d, a, b = ins.operands
    w, ga, gb = dst(d, ty), isrc(a, ty), raw(b, "u32")
    dt, bits = INT[ty], SIZES[ty] * 8
    left = ins.parts[0] == "shl"
    lim = U32.type(bits - 1)

    def f(C, m):
        x, s = ga(C), gb(C)
        c = np.minimum(s, lim).astype(dt)
        if left:
            r = np.where(s > lim, dt.type(0), x << c)
        else:
            r = x >> c
            if dt.kind == "u":
                r = np.where(s > lim, dt.type(0), r)
        w(C, m, r)

    if isinstance(b, Imm) and 0 <= b.value < bits:
        c = dt.type(b.value)
        if left:
            return lambda C, m: w(C, m, ga(C) << c)
        return lambda C, m: w(C, m, ga(C) >> c)
    return f


@op("shf")
def _shf(ins):
    _, direction, mode, ty = ins.parts
    d, a, b, c = ins.operands
    w, ga, gb, gc = dst(d, ty), raw(a, ty), raw(b, ty), raw(c, "u32")

    def f(C, m):
        v = (gb(C).astype(U64) << U64.type(32)) | ga(C).astype(U64)
        s = gc(C)
        s = (s & U32.type(31) if mode == "wrap" else np.minimum(s, U32.type(32))).astype(U64)
        r = ((v << s) >> U64.type(32)) if direction == "l" else (v >> s)
        w(C, m, r.astype(U32))

    return f


@op("bfe")
def _bfe(ins):
    ty = ins.parts[-1]
    d, a, b, c = ins.operands
    w, ga, gb, gc = dst(d, ty), isrc(a, ty), raw(b, "u32"), raw(c, "u32")
    bits = SIZES[ty] * 8
    dt = INT[ty]

    def f(C, m):
        x = ga(C)
        pos, ln = (gb(C) & U32.type(255)).astype(I64), (gc(C) & U32.type(255)).astype(I64)
        if dt.kind == "u":
            sh = np.minimum(pos, bits - 1).astype(dt)
            r = np.where(pos >= bits, dt.type(0), x >> sh)
            l2 = np.minimum(ln, bits)
            ones = dt.type(np.iinfo(dt).max)
            mask = np.where(l2 >= bits, ones, (dt.type(1) << np.minimum(l2, bits - 1).astype(dt)) - dt.type(1))
            return w(C, m, r & mask)
        # signed: sign bit at min(pos+len-1, msb); bits above filled with it
        top = np.minimum(pos + ln - 1, bits - 1)
        left = (bits - 1 - np.maximum(top, 0)).astype(dt)
        right = np.clip(bits - ln, 0, bits - 1).astype(dt)
        avail = np.minimum(ln, np.maximum(bits - pos, 0))
        right = np.clip(bits - avail, 0, bits - 1).astype(dt)
        r = (x << left) >> right
        sign = x >> dt.type(bits - 1)
        r = np.where(pos >= bits, sign, r)
        w(C, m, np.where(ln == 0, dt.type(0), r))

    return f


@op("bfi")
def _bfi(ins):
    ty = ins.parts[-1]
    f_, a, b, c, d = ins.operands
    w, ga, gb, gc, gd = dst(f_, ty), raw(a, ty), raw(b, ty), raw(c, "u32"), raw(d, "u32")
    bits, dt = SIZES[ty] * 8, rawdt(ty)

    def f(C, m):
        pos, ln = (gc(C) & U32.type(255)).astype(I64), (gd(C) & U32.type(255)).astype(I64)
        ln = np.minimum(ln, np.maximum(bits - pos, 0))
        ones = dt.type(np.iinfo(dt).max)
        mask = np.where(ln >= bits, ones, (dt.type(1) << np.minimum(ln, bits - 1).astype(dt)) - dt.type(1))
        sh = np.minimum(pos, bits - 1).astype(dt)
        mask = np.where(ln == 0, dt.type(0), mask << sh)
        w(C, m, (gb(C) & ~mask) | ((ga(C) << sh) & mask))

    return f


def clz(x):
    bits = x.dtype.itemsize * 8
    n = np.zeros(x.shape, U32)
    y = x
    s = bits // 2
    while s:
        z = (y >> x.dtype.type(bits - s)) == 0
        n = n + z.astype(U32) * U32.type(s)
        y = np.where(z, y << x.dtype.type(s), y)
        s //= 2
    return np.where(x == 0, U32.type(bits), n)


def popc(x):
    return (
        np.bitwise_count(x).astype(U32)
        if hasattr(np, "bitwise_count")
        else np.unpackbits(np.ascontiguousarray(x).view(U8).reshape(len(x), -1), axis=1).sum(1).astype(U32)
    )


@op("popc", "clz")
def _popc(ins):
    ty = ins.parts[-1]
    d, a = ins.operands
    fn = popc if ins.parts[0] == "popc" else clz
    w, g = dst(d, "u32"), raw(a, ty)
    return lambda C, m: w(C, m, fn(g(C)))


@op("bfind")
def _bfind(ins):
    ty = ins.parts[-1]
    d, a = ins.operands
    w, g = dst(d, "u32"), isrc(a, ty)
    bits = SIZES[ty] * 8
    shiftamt = "shiftamt" in ins.parts

    def f(C, m):
        x = g(C)
        if x.dtype.kind == "i":
            x = np.where(x < 0, ~x, x)
        lz = clz(x.view(STORAGE[SIZES[ty]]))
        r = lz if shiftamt else U32.type(bits - 1) - lz
        w(C, m, np.where(lz == bits, U32.type(0xFFFFFFFF), r))

    return f


@op("brev")
def _brev(ins):
    ty = ins.parts[-1]
    d, a = ins.operands
    w, g = dst(d, ty), raw(a, ty)

    def f(C, m):
        x = np.ascontiguousarray(g(C))
        b = x.view(U8).reshape(len(x), -1)[:, ::-1]
        r = np.packbits(np.unpackbits(np.ascontiguousarray(b), axis=1, bitorder="little"), axis=1, bitorder="big")
        w(C, m, np.ascontiguousarray(r).view(x.dtype).reshape(-1))

    return f


@op("prmt")
def _prmt(ins):
    need(ins, ins.parts[1:], {"b32"})
    d, a, b, c = ins.operands
    w, ga, gb, gc = dst(d, "b32"), raw(a, "b32"), raw(b, "b32"), raw(c, "b32")

    def f(C, m):
        v = (gb(C).astype(U64) << U64.type(32)) | ga(C).astype(U64)
        s = gc(C).astype(U64)
        r = U64.type(0)
        for i in range(4):
            n = (s >> U64.type(4 * i)) & U64.type(15)
            k = n & U64.type(7)
            byte = (v >> (k * U64.type(8))) & U64.type(255)
            sign = np.where(byte >> U64.type(7), U64.type(255), U64.type(0))
            byte = np.where(n >> U64.type(3), sign, byte)
            r = r | (byte << U64.type(8 * i))
        w(C, m, r.astype(U32))

    return f


@op("lop3")
def _lop3(ins):
    boolop = ins.parts[1] if len(ins.parts) == 3 else None
    ops = list(ins.operands)
    pd = None
    if isinstance(ops[0], Pair):
        ops[0], pd = ops[0].a, dst(ops[0].b, "pred")
    w = dst(ops[0], "b32")
    ga, gb, gc = (raw(x, "b32") for x in ops[1:4])
    lut = ops[4].value & 255
    q = raw(ops[5], "pred") if boolop else None

    def f(C, m):
        x, y, z = ga(C), gb(C), gc(C)
        r = np.zeros(1, U32)
        for i in range(8):
            if lut >> i & 1:
                r = r | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
        if pd is not None:
            nz = r != 0
            nz = (nz | q(C)) if boolop == "or" else (nz & q(C))
            pd(C, m, nz)
        w(C, m, r)

    return f


# ---------------------------------------------------------------- compare and select
CMP = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def compare(cmp, x, y):
    if x.dtype.kind == "f":
        if cmp == "num":
            return ~(np.isnan(x) | np.isnan(y))
        if cmp == "nan":
            return np.isnan(x) | np.isnan(y)
        if cmp == "ne":
            return (x != y) & ~(np.isnan(x) | np.isnan(y))
        if cmp[-1] == "u" and cmp[:-1] in CMP:
            return CMP[cmp[:-1]](x, y) | np.isnan(x) | np.isnan(y)
    return CMP[cmp](x, y)


BOOLOP = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _cmp_operands(ins, mods, ty):
    if ty in fp.FLOATS:
        ftz = "ftz" in mods
        return fsrc(ins.operands[1], ty, ftz), fsrc(ins.operands[2], ty, ftz)
    return isrc(ins.operands[1], ty), isrc(ins.operands[2], ty)


@op("setp")
def _setp(ins):
    mods, ty = split(ins, None)
    cmp = mods[0]
    need(ins, mods[1:], {"and", "or", "xor", "ftz"})
    bop = next((BOOLOP[p] for p in mods[1:] if p in BOOLOP), None)
    d = ins.operands[0]
    p, q = (d.a, d.b) if isinstance(d, Pair) else (d, SINK)
    wp, wq = dst(p, "pred"), dst(q, "pred")
    ga, gb = _cmp_operands(ins, mods, ty)
    gc = raw(ins.operands[3], "pred") if bop else None
    if ty in ("f16x2", "bf16x2"):

        def fx2(C, m):
            r = compare(cmp, ga(C), gb(C))
            for w, t in ((wp, r[:, 0]), (wq, r[:, 1])):
                w(C, m, bop(t, gc(C)) if bop else t.copy())

        return fx2

    def f(C, m):
        t = compare(cmp, ga(C), gb(C))
        if bop is None:
            wp(C, m, t)
            if q is not SINK:
                wq(C, m, ~t)
        else:
            c = gc(C)
            u = bop(~t, c)
            wp(C, m, bop(t, c))
            wq(C, m, u)

    return f


@op("selp")
def _selp(ins):
    ty = ins.parts[-1]
    d, a, b, c = ins.operands
    w, ga, gb, gc = dst(d, ty), raw(a, ty), raw(b, ty), raw(c, "pred")
    return lambda C, m: w(C, m, np.where(gc(C), ga(C), gb(C)))
