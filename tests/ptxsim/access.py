"""Loads, stores, atomics and cp.async."""

import re

import numpy as np

from . import fp
from .errors import Unsupported
from .isa import SINK, SIZES, STORAGE, Addr, Reg, Sym, Vec
from .operands import I64, INT, dst, need, op, raw

HINTS = re.compile(r"^(L1::|L2::|level::|evict|unified|cache_hint)")
CACHE = {
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "nc",
    "weak",
    "volatile",
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "sc",
    "cta",
    "gpu",
    "sys",
    "cluster",
    "mmio",
    "uni",
    "noftz",
}
SPACES = {"global", "shared", "local", "const", "param"}


def mem_parts(ins, extra=()):
    """-> (space, vector length, type, other mods)."""
    space, vec, ty, other = None, 1, None, []
    for p in ins.parts[1:]:
        base = p.split("::")[0]
        if base in SPACES:
            if p == "shared::cluster":
                raise Unsupported(f"distributed shared memory: {ins.text}")
            space = base
        elif p in ("v2", "v4", "v8"):
            vec = int(p[1:])
        elif p in SIZES:
            ty = p
        elif p in CACHE or HINTS.match(p):
            pass
        else:
            other.append(p)
    need(ins, other, set(extra))
    return space, vec, ty, other


def addr_getter(a, space=None):
    """-> (getter of int64 addresses, space). Param symbols give the space themselves."""
    if not isinstance(a, Addr):
        raise Unsupported(f"address operand {a!r}")
    b, off = a.base, a.off
    if isinstance(b, Sym):
        v = np.array([b.addr + off], I64)
        if space in (None, "param") and b.space != "param":
            return (lambda C: v), (b.space if space is not None or b.space in ("local", "shared") else "global")
        if b.space == "param":
            return (lambda C: v), "param"
        return (lambda C: v), space
    if isinstance(b, Reg) and SIZES[b.type] == 4:
        i = b.slot
        # 32-bit addresses wrap modulo 2**32
        return (lambda C: (C.R[i].astype(I64) + off) & 0xFFFFFFFF), space
    g = raw(b, "u64")
    return (lambda C: g(C).view(I64) + off), space


def active_addr(C, m, ad):
    """Addresses of active threads, with their thread ids."""
    if len(ad) != C.n:
        ad = np.repeat(ad, C.n)
    if m is None:
        return ad, C.tids
    t = np.flatnonzero(m)
    return ad[t], t


def elem_type(ty):
    return STORAGE[SIZES[ty]]


@op("ld", "ldu")
def _ld(ins):
    space, vec, ty, _ = mem_parts(ins)
    d, a = ins.operands[:2]
    size = SIZES[ty]
    ds = d.items if isinstance(d, Vec) else (d,)
    ws = [dst(x, ty) for x in ds]
    signed = ty[0] == "s"
    sdt = INT.get(ty, None)
    ga, space = addr_getter(a, space)
    if space == "param" and isinstance(a.base, Sym) and a.base.space == "param":
        off = a.base.addr + a.off
        sl = slice(off, off + size * vec)

        def ldp(C, m):
            v = C.params[sl].view(STORAGE[size])
            for j, w in enumerate(ws):
                x = v[j : j + 1]
                w(C, m, x.view(sdt) if signed else x)

        return ldp

    def f(C, m):
        ad, t = active_addr(C, m, ga(C))
        vals = C.load(ins, space, ad, t, size, vec)
        if C.traffic is not None:
            C.traffic.access(C, "load", space, ad, t, size * vec)
        for w, v in zip(ws, vals, strict=False):
            if m is not None:
                full = np.zeros(C.n, v.dtype)
                full[t] = v
                v = full
            w(C, m, v.view(sdt) if signed else v)

    return f


@op("st")
def _st(ins):
    space, _vec, ty, other = mem_parts(ins, {"async"})
    if other:
        raise Unsupported(ins.text)
    a, s = ins.operands[:2]
    size = SIZES[ty]
    gs = [raw(x, ty) for x in (s.items if isinstance(s, Vec) else (s,))]
    ga, space = addr_getter(a, space)

    def f(C, m):
        ad, t = active_addr(C, m, ga(C))
        vals = []
        for g in gs:
            v = g(C)
            vals.append(v if len(v) == 1 or m is None else v[t])
        C.store(ins, space, ad, t, size, vals)
        if C.traffic is not None:
            C.traffic.access(C, "store", space, ad, t, size * len(vals))

    return f


def _atomic(ins, has_dst):
    p = [x for x in ins.parts[1:]]
    if "async" in p:
        raise Unsupported(ins.text)
    space, _vec, ty, other = mem_parts(ins, {"add", "inc", "dec", "min", "max", "and", "or", "xor", "exch", "cas"})
    opn = other[0]
    ops = ins.operands
    d, ops = (ops[0], ops[1:]) if has_dst else (SINK, ops)
    ga, space = addr_getter(ops[0], space)
    size = SIZES[ty]
    src = [raw(x, ty) for x in (ops[1].items if isinstance(ops[1], Vec) else (ops[1],))]
    src2 = raw(ops[2], ty) if opn == "cas" else None
    ws = [dst(x, ty) for x in (d.items if isinstance(d, Vec) else (d,) * len(src))]
    isf = ty in fp.FLOATS
    idt = INT.get(ty)

    def apply(old, b, c):
        if isf:
            x, y = fp.load(ty, old), fp.load(ty, b)
            if opn == "add":
                return fp.store(ty, x + y)
            if opn in ("min", "max"):
                return fp.store(ty, (np.fmin if opn == "min" else np.fmax)(x, y))
        x, y = (old.view(idt), b.view(idt)) if idt is not None else (old, b)
        if opn == "add":
            r = x + y
        elif opn == "min":
            r = np.minimum(x, y)
        elif opn == "max":
            r = np.maximum(x, y)
        elif opn == "and":
            r = x & y
        elif opn == "or":
            r = x | y
        elif opn == "xor":
            r = x ^ y
        elif opn == "exch":
            r = b
        elif opn == "cas":
            r = np.where(old == b, c, old)
        elif opn == "inc":
            r = np.where(x >= y, x.dtype.type(0), x + x.dtype.type(1))
        elif opn == "dec":
            r = np.where((x == 0) | (x > y), y, x - x.dtype.type(1))
        else:
            raise Unsupported(ins.text)
        return r.view(old.dtype)

    def f(C, m):
        ad, t = active_addr(C, m, ga(C))
        n = len(ad)
        for j, (g, w) in enumerate(zip(src, ws, strict=False)):
            b = g(C)
            b = np.repeat(b, n) if len(b) == 1 else b[t]
            c = None
            if src2 is not None:
                c = src2(C)
                c = np.repeat(c, n) if len(c) == 1 else c[t]
            old = C.atomic(ins, space, ad + j * size, t, size, b, c, apply, opn, idt)
            if d is not SINK:
                full = np.zeros(C.n, old.dtype)
                full[t] = old
                w(C, m, full)
        if C.traffic is not None:
            C.traffic.access(C, "atomic", space, ad, t, size * len(src))

    return f


@op("atom")
def _atom(ins):
    return _atomic(ins, True)


@op("red")
def _red(ins):
    return _atomic(ins, False)


# ---------------------------------------------------------------- cp.async
@op("cp")
def _cp(ins):
    p = ins.parts
    if p[1] != "async":
        raise Unsupported(ins.text)
    if p[2] == "commit_group":

        def commit(C, m):
            C.cp_commit = C.cp_commit + (1 if m is None else m.astype(np.int64))

        return commit
    if p[2] in ("wait_group", "wait_all"):
        n = ins.operands[0].value if p[2] == "wait_group" else None
        return lambda C, m: C.cp_wait(ins, m, n)
    if p[2] not in ("ca", "cg"):
        raise Unsupported(f"unsupported instruction: {ins.text}")
    need(ins, [x for x in p[3:] if not HINTS.match(x)], {"shared", "shared::cta", "global"})
    ops = ins.operands
    gd, _ = addr_getter(ops[0], "shared")
    gs, _ = addr_getter(ops[1], "global")
    size = ops[2].value
    if size not in (4, 8, 16) or (p[2] == "cg" and size != 16):
        raise Unsupported(f"cp-size {size}: {ins.text}")
    extra = ops[3:]
    has_policy = any("cache_hint" in x for x in p)
    if has_policy:
        extra = extra[:-1]
    gn = gig = None
    if extra:
        if isinstance(extra[0], Reg) and extra[0].type == "pred":
            gig = raw(extra[0], "pred")
        else:
            gn = raw(extra[0], "u32")

    def f(C, m):
        dsta, t = active_addr(C, m, gd(C))
        srca, _ = active_addr(C, m, gs(C))
        if gn is not None:
            ns = gn(C)
            ns = np.repeat(ns, len(t)) if len(ns) == 1 else ns[t]
        elif gig is not None:
            ns = np.where(gig(C)[t], 0, size)
        else:
            ns = np.full(len(t), size)
        ns = ns.astype(I64)
        C.cp_async(ins, dsta, srca, t, size, ns)
        if C.traffic is not None:
            C.traffic.cp_async(dsta, srca, t, size, ns)

    return f
