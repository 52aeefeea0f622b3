"""mov, cvt, address conversion, and instructions without an effect here."""

import numpy as np

from . import fp
from .errors import Unsupported
from .isa import GLOBAL_BASE, LOCAL_BASE, SHARED_BASE, SINK, SIZES, STORAGE, Vec
from .operands import F32, F64, INT, ROUND, ROUNDI, U64, dst, fdst, fsrc, isrc, need, op, raw


@op("mov")
def _mov(ins):
    ty = ins.parts[-1]
    d, a = ins.operands
    if isinstance(a, Vec):  # pack
        n = len(a.items)
        part = f"b{SIZES[ty] * 8 // n}"
        gs = [raw(x, part) for x in a.items]
        w, dt = dst(d, ty), STORAGE[SIZES[ty]]

        def pack(C, m):
            vs = [g(C) for g in gs]
            k = max(len(v) for v in vs)
            out = np.empty((k, n), STORAGE[SIZES[part]])
            for j, v in enumerate(vs):
                out[:, j] = v
            w(C, m, out.view(dt).reshape(-1))

        return pack
    if isinstance(d, Vec):  # unpack
        n = len(d.items)
        part = f"b{SIZES[ty] * 8 // n}"
        ws = [None if x is SINK else dst(x, part) for x in d.items]
        g, pd = raw(a, ty), STORAGE[SIZES[part]]

        def unpack(C, m):
            v = np.ascontiguousarray(g(C)).view(pd).reshape(-1, n)
            for j, w in enumerate(ws):
                if w is not None:
                    w(C, m, v[:, j].copy())

        return unpack
    if ty == "b128":
        raise Unsupported(ins.text)
    w, g = dst(d, ty), raw(a, ty)
    return lambda C, m: w(C, m, g(C))


def float_to_int(x, dt, src64):
    """x already rounded to integral values (f32/f64 array) -> dt with saturation."""
    info = np.iinfo(dt)
    nan = np.isnan(x)
    x = np.where(nan, 0.0, x.astype(F64))
    hi = float(info.max)  # may round up to 2^63 / 2^64
    big, small = x >= hi, x <= float(info.min)
    r = np.where(big | small, 0.0, x)
    r = r.astype(dt) if dt.kind == "i" or dt.itemsize < 8 else r.astype(U64)
    r = np.where(big, dt.type(info.max), np.where(small, dt.type(info.min), r))
    nanv = 0 if not src64 and dt.itemsize < 8 else (1 << (dt.itemsize * 8 - 1))
    nanv = np.array([nanv], np.dtype(f"u{dt.itemsize}")).view(dt)[0]
    return np.where(nan, nanv, r)


@op("cvt")
def _cvt(ins):
    p = ins.parts[1:]
    types = [x for x in p if x in SIZES]
    dty, sty = types[-2:] if len(types) >= 2 else (types[0], types[0])
    mods = [x for x in p if x not in SIZES]
    need(ins, mods, {"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "relu", "satfinite"})
    mode = next((x for x in mods if x in ROUND), "rn")
    rint = next((ROUNDI[x] for x in mods if x in ROUNDI), None)
    ftz, sat, relu = "ftz" in mods, "sat" in mods, "relu" in mods
    ops = ins.operands
    d = ops[0]
    if dty in ("f16x2", "bf16x2") and sty == "f32":
        w = fdst(d, dty, mode, sat=sat, relu=relu)
        hi, lo = fsrc(ops[1], "f32", ftz), fsrc(ops[2], "f32", ftz)

        def packed(C, m):
            a, b = np.broadcast_arrays(lo(C), hi(C))
            v = np.stack([a, b], 1)
            if "satfinite" in mods:
                v = np.clip(v, -65504, 65504) if dty == "f16x2" else v
            w(C, m, v)

        return packed
    if dty == "tf32":
        w, g = dst(d, "b32"), raw(ops[1], "b32")
        return lambda C, m: w(C, m, fp.tf32_round(g(C), mode))
    df, sf = dty in fp.FLOATS, sty in fp.FLOATS
    if not df and not sf:
        w, g = dst(d, dty), isrc(ops[1], sty)
        sd, dd = INT[sty], INT[dty]
        if sat:
            i = np.iinfo(dd)
            j = np.iinfo(sd)
            lo, hi = max(i.min, j.min), min(i.max, j.max)
            return lambda C, m: w(C, m, np.clip(g(C), sd.type(lo), sd.type(hi)).astype(dd))
        return lambda C, m: w(C, m, g(C).astype(dd))
    if df and not sf:  # int -> float
        w, g = fdst(d, dty, mode, ftz, sat), isrc(ops[1], sty)
        wide = np.longdouble if SIZES[sty] == 8 else F64
        if dty == "f64":
            return lambda C, m: w(C, m, fp.round_to(g(C).astype(np.longdouble), F64, mode))
        if mode == "rn" and dty == "f32":
            return lambda C, m: w(C, m, g(C).astype(F32))

        def i2f(C, m):
            v = g(C).astype(wide)
            if dty == "f32":
                v = fp.round_to(v, F32, mode)
            w(C, m, v.astype(F64) if v.dtype != F32 else v)

        return i2f
    if sf and not df:  # float -> int
        w, g = dst(d, dty), fsrc(ops[1], sty, ftz)
        fn = rint or np.trunc
        return lambda C, m: w(C, m, float_to_int(fn(g(C)), INT[dty], sty == "f64"))
    w, g = fdst(d, dty, mode, ftz, sat, relu), fsrc(ops[1], sty, ftz)
    if rint is not None:
        return lambda C, m: w(C, m, rint(g(C)))
    if dty == "f64":
        return lambda C, m: w(C, m, g(C).astype(F64))
    return lambda C, m: w(C, m, g(C))


@op("cvta")
def _cvta(ins):
    to = "to" in ins.parts
    space = next(
        p.split("::")[0] for p in ins.parts[1:] if p.split("::")[0] in ("global", "shared", "local", "const", "param")
    )
    d, a = ins.operands
    w, g = dst(d, "u64"), raw(a, "u64")
    off = U64.type({"shared": SHARED_BASE, "local": LOCAL_BASE}.get(space, 0))
    if to:
        return lambda C, m: w(C, m, g(C) - off)
    return lambda C, m: w(C, m, g(C) + off)


@op("isspacep")
def _isspacep(ins):
    space = ins.parts[1].split("::")[0]
    d, a = ins.operands
    w, g = dst(d, "pred"), raw(a, "u64")
    lo, hi = {
        "shared": (SHARED_BASE, LOCAL_BASE),
        "local": (LOCAL_BASE, 1 << 63),
        "global": (GLOBAL_BASE, SHARED_BASE),
    }.get(space, (1, 0))
    return lambda C, m: w(C, m, (g(C) >= U64.type(lo)) & (g(C) < U64.type(hi)))


@op(
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "nanosleep",
    "griddepcontrol",
    "setmaxnreg",
    "pmevent",
)
def _nop(ins):
    return lambda C, m: None


@op("createpolicy")
def _createpolicy(ins):
    w = dst(ins.operands[0], "b64")
    return lambda C, m: w(C, m, np.zeros(1, U64))


@op("trap", "brkpt")
def _trap(ins):
    def f(C, m):
        raise C.error("trap", "trap executed", ins, C.active(m)[0])

    return f


@op("$call")
def _call(ins):
    name = ins.op.split(".", 1)[1]

    def f(C, m):
        if "assert" in name:
            raise C.error("assert", "device assertion failed", ins, C.active(m)[0])
        if name != "vprintf":
            raise Unsupported(f"call of external function {name} (ptx line {ins.line})")

    return f
