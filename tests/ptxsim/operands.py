"""Instruction semantics: build(ins) -> closure f(C, m).

C is the CTA state (core.CTA); C.R is the list of register arrays, one element
per thread. m is None when every thread executes, else a bool array. Results
for inactive threads may be garbage: dst() merges them under the mask.
Register arrays are never modified in place.
"""

import numpy as np

from . import fp
from .errors import Unsupported
from .isa import SINK, SIZES, STORAGE, Addr, Imm, Label, Neg, Not, Reg, Special, Sym

U8, U16, U32, U64 = (np.dtype(t) for t in (np.uint8, np.uint16, np.uint32, np.uint64))
I32, I64, F32, F64, BOOL = (np.dtype(t) for t in (np.int32, np.int64, np.float32, np.float64, bool))
INT = {}
for w in (8, 16, 32, 64):
    INT[f"u{w}"] = INT[f"b{w}"] = np.dtype(f"u{w // 8}")
    INT[f"s{w}"] = np.dtype(f"i{w // 8}")
ROUND = {"rn", "rz", "rm", "rp", "rna"}
ROUNDI = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}

BUILDERS = {}


def op(*names):
    def deco(f):
        for n in names:
            BUILDERS[n] = f
        return f

    return deco


def need(ins, parts, allowed):
    bad = [p for p in parts if p not in allowed]
    if bad:
        raise Unsupported(f"unsupported modifier .{bad[0]} in '{ins.text}' (ptx line {ins.line})")


def rawdt(ty):
    return BOOL if ty == "pred" else STORAGE[SIZES[ty]]


# ---------------------------------------------------------------- operands
def imm_array(o, ty):
    """1-element array with the immediate's bits for instruction type ty (storage dtype)."""
    size = SIZES[ty]
    v = o.value
    if ty == "pred":
        return np.array([bool(v)])
    if o.fbits:
        if size * 8 == o.fbits:
            return np.array([v], STORAGE[size])
        x = np.array([v], STORAGE[o.fbits // 8]).view(F32 if o.fbits == 32 else F64)
        return x.astype({4: F32, 8: F64}[size]).view(STORAGE[size])
    if isinstance(v, float) or (ty in fp.FLOATS and ty in ("f32", "f64")):
        return np.array([v], F32 if size == 4 else F64).view(STORAGE[size])
    return np.array([v % (1 << (8 * size))], STORAGE[size])


def raw(o, ty):
    """getter of the operand's bits as unsigned storage of type ty."""
    dt = rawdt(ty)
    if isinstance(o, Reg):
        i, st = o.slot, o.storage
        if st == dt:
            return lambda C: C.R[i]
        if ty == "pred" or o.type == "pred":
            raise Unsupported(f"predicate register {o.name} used as .{ty}")
        return lambda C: C.R[i].astype(dt)
    if isinstance(o, Imm):
        a = imm_array(o, ty)
        return lambda C: a
    if isinstance(o, Not):
        g = raw(o.op, "pred")
        return lambda C: ~g(C)
    if isinstance(o, Neg):
        g = raw(o.op, ty)
        return lambda C: 0 - g(C)
    if isinstance(o, Special):
        n = o.name
        if n in ("%clock", "%clock64", "%globaltimer", "%clock_hi", "%globaltimer_lo", "%globaltimer_hi"):
            return lambda C: np.array([C.nins % (1 << (8 * dt.itemsize))], dt)
        if n == "%pm0" or n.startswith("%envreg"):
            return lambda C: np.zeros(1, dt)
        return lambda C: C.special(n).astype(dt)
    if isinstance(o, Sym):
        a = np.array([sym_value(o)], U64).astype(dt)
        if o.space == "param":
            return lambda C: np.array([C.param_addr(o.addr)], U64).astype(dt)
        return lambda C: a
    if isinstance(o, Addr) and not o.coords:  # mov.u64 %rd, sym+4 style
        g = raw(o.base, ty)
        return lambda C: g(C) + dt.type(o.off)
    if isinstance(o, Label):
        raise Unsupported(f"symbol {o.name!r} as operand")
    raise Unsupported(f"operand {o!r}")


def sym_value(s):
    return s.addr


def isrc(o, ty):
    """integer operand in its signed/unsigned dtype."""
    g, dt = raw(o, ty), INT[ty]
    if rawdt(ty) == dt:
        return g
    return lambda C: g(C).view(dt)


def fsrc(o, ty, ftz=False):
    g = raw(o, ty)
    h = (lambda C: g(C).view(F32)) if ty == "f32" else lambda C: fp.load(ty, g(C))
    return (lambda C: fp.flush(h(C))) if ftz else h


def dst(o, ty):
    """writer w(C, m, v): v any integer/bool array or bits; widened to the register."""
    if o is SINK:
        return lambda C, m, v: None
    if not isinstance(o, Reg):
        raise Unsupported(f"destination {o!r}")
    i, st = o.slot, o.storage

    def w(C, m, v):
        dt = v.dtype
        if dt != st:
            if dt.itemsize == st.itemsize and dt != BOOL:
                v = v.view(st)
            elif dt.kind == "i" and dt.itemsize < st.itemsize:
                v = v.astype(np.dtype(f"i{st.itemsize}")).view(st)
            else:
                v = v.astype(st)
        if len(v) != C.n:
            v = np.repeat(v, C.n)
        C.R[i] = v if m is None else np.where(m, v, C.R[i])

    return w


def fdst(o, ty, mode="rn", ftz=False, sat=False, relu=False):
    w = dst(o, ty)
    plain = not (ftz or sat or relu)

    def f(C, m, v):
        if not plain:
            if relu:
                v = np.where(v > 0, v, np.where(np.isnan(v), v, v.dtype.type(0)))
            if sat:
                v = np.where(v > 0, np.where(v < 1, v, v.dtype.type(1)), v.dtype.type(0))
            if ftz:
                v = fp.flush(v)
        w(C, m, fp.store(ty, v, mode))

    return f


def fmods(ins, parts, extra=()):
    """Common float modifiers -> (mode, ftz, sat, relu)."""
    need(ins, parts, {"ftz", "sat", "relu", "rn", "rz", "rm", "rp", "noftz"} | set(extra))
    mode = next((p for p in parts if p in ("rn", "rz", "rm", "rp")), "rn")
    return dict(mode=mode, ftz="ftz" in parts, sat="sat" in parts, relu="relu" in parts)


def split(ins, known):
    """parts after the mnemonic, with the trailing type separated: (mods, type)."""
    p = ins.parts[1:]
    return p[:-1], p[-1]
