"""Integer and float arithmetic, special functions."""

import numpy as np

from . import fp
from .errors import Unsupported
from .isa import SIZES
from .operands import BUILDERS, F64, I32, I64, INT, U32, U64, dst, fdst, fmods, fsrc, isrc, need, op, raw, rawdt, split


def wide_float(ty, mode):
    """Directed rounding needs a wider intermediate."""
    return ty in ("f32", "f32x2") and mode != "rn"


@op("add", "sub", "mul")
def _addsubmul(ins):
    mods, ty = split(ins, None)
    name = ins.parts[0]
    fn = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    d, a, b = ins.operands
    if ty in fp.FLOATS:
        k = fmods(ins, mods)
        w, ga, gb = fdst(d, ty, **k), fsrc(a, ty, k["ftz"]), fsrc(b, ty, k["ftz"])
        if wide_float(ty, k["mode"]):
            return lambda C, m: w(C, m, fn(ga(C).astype(F64), gb(C).astype(F64)))
        if ty == "f64" and k["mode"] != "rn":
            return lambda C, m: w(
                C, m, fp.round_to(fn(ga(C).astype(np.longdouble), gb(C).astype(np.longdouble)), F64, k["mode"])
            )
        return lambda C, m: w(C, m, fn(ga(C), gb(C)))
    if name == "mul":
        return _imul(ins, mods, ty, None)
    if ty in ("u16x2", "s16x2"):
        need(ins, mods, set())
        w, ga, gb = dst(d, "b32"), raw(a, "b32"), raw(b, "b32")
        return lambda C, m: w(C, m, fn(fp.halves(ga(C)), fp.halves(gb(C))).reshape(-1, 2).copy().view(U32).reshape(-1))
    need(ins, mods, {"sat"})
    w = dst(d, ty)
    ga, gb = isrc(a, ty), isrc(b, ty)
    if "sat" in mods:
        return lambda C, m: w(C, m, np.clip(fn(ga(C).astype(I64), gb(C).astype(I64)), -(2**31), 2**31 - 1).astype(I32))
    return lambda C, m: w(C, m, fn(ga(C), gb(C)))


def mulhi(x, y):
    """High half of the product, same dtype."""
    dt = x.dtype
    bits = dt.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{dt.kind}{dt.itemsize * 2}")
        return (x.astype(wide) * y.astype(wide) >> wide.type(bits)).astype(dt)
    s = dt.kind == "i"
    a, b = np.broadcast_arrays(x.astype(U64) if not s else x.view(U64), y.astype(U64) if not s else y.view(U64))
    M, sh = U64.type(0xFFFFFFFF), U64.type(32)
    al, ah, bl, bh = a & M, a >> sh, b & M, b >> sh
    t = al * bl
    u = ah * bl + (t >> sh)
    v = al * bh + (u & M)
    r = ah * bh + (u >> sh) + (v >> sh)
    if s:
        z = U64.type(0)
        r = r - np.where(x < 0, b, z) - np.where(y < 0, a, z)
        return r.view(I64)
    return r


def _imul(ins, mods, ty, acc):
    """mul/mad integer; acc is the addend operand or None."""
    need(ins, mods, {"lo", "hi", "wide", "sat"})
    d, a, b = ins.operands[:3]
    ga, gb = isrc(a, ty), isrc(b, ty)
    if "wide" in mods:
        wt = ty[0] + str(SIZES[ty] * 16)
        wd = INT[wt]

        def mul(C):
            return ga(C).astype(wd) * gb(C).astype(wd)

        ty = wt
    elif "hi" in mods:

        def mul(C):
            return mulhi(*np.broadcast_arrays(ga(C), gb(C)))
    else:

        def mul(C):
            return ga(C) * gb(C)

    w = dst(d, ty)
    if acc is None:
        return lambda C, m: w(C, m, mul(C))
    gc = isrc(acc, ty)
    if "sat" in mods:
        return lambda C, m: w(C, m, np.clip(mul(C).astype(I64) + gc(C), -(2**31), 2**31 - 1).astype(I32))
    return lambda C, m: w(C, m, mul(C) + gc(C))


@op("mad")
def _mad(ins):
    mods, ty = split(ins, None)
    if ty in fp.FLOATS:
        return _fma(ins)
    return _imul(ins, mods, ty, ins.operands[3])


@op("fma")
def _fma(ins):
    mods, ty = split(ins, None)
    k = fmods(ins, mods)
    d, a, b, c = ins.operands
    w = fdst(d, ty, **k)
    ga, gb, gc = (fsrc(x, ty, k["ftz"]) for x in (a, b, c))
    if ty == "f64":
        if k["mode"] != "rn":
            raise Unsupported(ins.text)
        return lambda C, m: w(C, m, fp.fma64(ga(C), gb(C), gc(C)))
    return lambda C, m: w(C, m, ga(C).astype(F64) * gb(C) + gc(C))


def idiv(x, y):
    """C-style truncating division; x/0 gives all ones."""
    if x.dtype.kind == "u":
        return np.where(y == 0, x.dtype.type(np.iinfo(x.dtype).max), x // np.where(y == 0, x.dtype.type(1), y))
    ud = np.dtype(f"u{x.dtype.itemsize}")
    ax = np.where(x < 0, 0 - x.view(ud), x.view(ud))
    ay = np.where(y < 0, 0 - y.view(ud), y.view(ud))
    q = ax // np.where(ay == 0, ud.type(1), ay)
    q = np.where((x < 0) != (y < 0), 0 - q, q).view(x.dtype)
    return np.where(y == 0, x.dtype.type(-1), q)


@op("div")
def _div(ins):
    mods, ty = split(ins, None)
    d, a, b = ins.operands
    if ty in fp.FLOATS:
        k = fmods(ins, mods, {"full", "approx"})
        w, ga, gb = fdst(d, ty, **k), fsrc(a, ty, k["ftz"]), fsrc(b, ty, k["ftz"])
        if wide_float(ty, k["mode"]):
            return lambda C, m: w(C, m, ga(C).astype(F64) / gb(C).astype(F64))
        return lambda C, m: w(C, m, ga(C) / gb(C))
    need(ins, mods, set())
    w, ga, gb = dst(d, ty), isrc(a, ty), isrc(b, ty)
    return lambda C, m: w(C, m, idiv(*np.broadcast_arrays(ga(C), gb(C))))


@op("rem")
def _rem(ins):
    mods, ty = split(ins, None)
    need(ins, mods, set())
    d, a, b = ins.operands
    w, ga, gb = dst(d, ty), isrc(a, ty), isrc(b, ty)

    def f(C, m):
        x, y = np.broadcast_arrays(ga(C), gb(C))
        w(C, m, x - idiv(x, y) * y)

    return f


@op("min", "max")
def _minmax(ins):
    mods, ty = split(ins, None)
    ismin = ins.parts[0] == "min"
    d, a, b = ins.operands[:3]
    if ty in fp.FLOATS:
        need(ins, mods, {"ftz", "NaN", "xorsign", "abs"})
        ftz = "ftz" in mods
        w = fdst(d, ty, ftz=ftz)
        gs = [fsrc(x, ty, ftz) for x in ins.operands[1:]]
        nanp, xs = "NaN" in mods, "xorsign" in mods
        base = (np.minimum if ismin else np.maximum) if nanp else (np.fmin if ismin else np.fmax)

        def f(C, m):
            v = [g(C) for g in gs]
            if "abs" in mods:
                r = np.abs(v[0])
                for y in v[1:]:
                    r = base(r, np.abs(y))
                if xs:
                    s = np.signbit(v[0])
                    for y in v[1:]:
                        s = s ^ np.signbit(y)
                    r = np.where(s, -r, r)
                return w(C, m, r)
            r = v[0]
            for y in v[1:]:
                t = base(r, y)
                z = (r == 0) & (y == 0)  # -0 < +0
                if z.any():
                    zz = (np.signbit(r) | np.signbit(y)) if ismin else (np.signbit(r) & np.signbit(y))
                    t = np.where(z, np.where(zz, t.dtype.type(-0.0), t.dtype.type(0)), t)
                r = t
            w(C, m, r)

        return f
    need(ins, mods, {"relu"})
    fn = np.minimum if ismin else np.maximum
    if ty in ("s16x2", "u16x2"):
        w, ga, gb = dst(d, "b32"), raw(a, "b32"), raw(b, "b32")
        hd = np.dtype("i2" if ty[0] == "s" else "u2")

        def fx2(C, m):
            r = fn(fp.halves(ga(C)).view(hd), fp.halves(gb(C)).view(hd))
            if "relu" in mods:
                r = np.maximum(r, 0)
            w(C, m, np.ascontiguousarray(r).view(U32).reshape(-1))

        return fx2
    w, ga, gb = dst(d, ty), isrc(a, ty), isrc(b, ty)
    if "relu" in mods:
        return lambda C, m: w(C, m, np.maximum(fn(ga(C), gb(C)), 0))
    return lambda C, m: w(C, m, fn(ga(C), gb(C)))


@op("abs", "neg")
def _absneg(ins):
    mods, ty = split(ins, None)
    d, a = ins.operands
    isabs = ins.parts[0] == "abs"
    if ty in fp.FLOATS:
        need(ins, mods, {"ftz"})
        w, g = dst(d, ty), raw(a, ty)
        one = {
            "f16": 1 << 15,
            "bf16": 1 << 15,
            "f32": 1 << 31,
            "f64": 1 << 63,
            "f16x2": 0x80008000,
            "bf16x2": 0x80008000,
            "f32x2": 0x8000000080000000,
        }[ty]
        dt = rawdt(ty)
        sign, keep = dt.type(one), dt.type(~one & ((1 << (8 * dt.itemsize)) - 1))
        ld = (lambda C: fp.store(ty, fp.flush(fp.load(ty, g(C))))) if "ftz" in mods else g
        return (lambda C, m: w(C, m, ld(C) & keep)) if isabs else (lambda C, m: w(C, m, ld(C) ^ sign))
    need(ins, mods, set())
    w, g = dst(d, ty), isrc(a, ty)
    return (lambda C, m: w(C, m, np.abs(g(C)))) if isabs else (lambda C, m: w(C, m, 0 - g(C)))


# ---------------------------------------------------------------- special functions
def _unary(fn):
    def build(ins):
        mods, ty = split(ins, None)
        k = fmods(ins, mods, {"approx"})
        d, a = ins.operands
        w, g = fdst(d, ty, **k), fsrc(a, ty, k["ftz"])
        return lambda C, m: w(C, m, fn(g(C).astype(F64)))

    return build


BUILDERS["ex2"] = _unary(np.exp2)
BUILDERS["lg2"] = _unary(np.log2)
BUILDERS["rcp"] = _unary(lambda x: 1.0 / x)
BUILDERS["rsqrt"] = _unary(lambda x: 1.0 / np.sqrt(x))
BUILDERS["sqrt"] = _unary(np.sqrt)
BUILDERS["sin"] = _unary(np.sin)
BUILDERS["cos"] = _unary(np.cos)
BUILDERS["tanh"] = _unary(np.tanh)


@op("copysign")
def _copysign(ins):
    d, a, b = ins.operands
    ty = ins.parts[-1]
    w, ga, gb = fdst(d, ty), fsrc(a, ty), fsrc(b, ty)
    return lambda C, m: w(C, m, np.copysign(gb(C), ga(C)))  # sign of a, magnitude of b
