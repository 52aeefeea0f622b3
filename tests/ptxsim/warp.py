"""Warp-level instructions: shuffles, votes, matrix loads and mma / mma.sp.

Register arrays are viewed as (W, 32). Only complete participants reach these
closures: core.py parks threads until the required lanes have converged.
"""

import re

import numpy as np

from . import fp
from .access import addr_getter
from .errors import Unsupported
from .isa import SINK, Imm, Pair, Vec
from .operands import F32, F64, I64, INT, U16, U32, dst, isrc, need, op, raw

LANE = np.arange(32)


def w32(C, v):
    """(n,) or (1,) -> (W, 32)."""
    if len(v) != C.n:
        v = np.repeat(v, C.n)
    return v.reshape(-1, 32)


def amask(C, m):
    return np.ones((C.nwarps, 32), bool) if m is None else m.reshape(-1, 32)


def pack_bits(b):
    """(W, 32) bool -> (W,) u32."""
    return np.packbits(b, axis=1, bitorder="little").view(U32).reshape(-1)


def members(C, mm, act, ins):
    """membermask (W,32) u32 -> bool (W, 32, 32): [w, lane, other]; checks the executing lane is a member."""
    own = (mm >> LANE.astype(U32)) & U32.type(1)
    bad = act & (own == 0)
    if bad.any():
        raise C.error("ub", "executing thread is not in its own membermask", ins, int(np.flatnonzero(bad)[0]))
    return ((mm[:, :, None] >> LANE.astype(U32)) & U32.type(1)).astype(bool)


@op("shfl")
def _shfl(ins):
    if ins.parts[1] != "sync":
        raise Unsupported("shfl without .sync")
    mode = ins.parts[2]
    d, a, b, c, mm = ins.operands
    d, p = (d.a, d.b) if isinstance(d, Pair) else (d, SINK)
    w, wp = dst(d, "b32"), dst(p, "pred")
    ga, gb, gc, gm = raw(a, "b32"), raw(b, "u32"), raw(c, "u32"), raw(mm, "u32")

    def f(C, m):
        act = amask(C, m)
        x, y, z, mk = w32(C, ga(C)), w32(C, gb(C)), w32(C, gc(C)), w32(C, gm(C))
        own = (mk >> LANE.astype(U32)) & U32.type(1)
        if (act & (own == 0)).any():
            raise C.error(
                "ub", "executing thread is not in its own membermask", ins, int(np.flatnonzero(act & (own == 0))[0])
            )
        bv, cv, seg = (y & 31).astype(np.int64), (z & 31).astype(np.int64), ((z >> 8) & 31).astype(np.int64)
        lo = LANE & seg
        hi = lo | (cv & ~seg & 31)
        if mode == "up":
            j = LANE - bv
            ok = j >= hi
        elif mode == "down":
            j = LANE + bv
            ok = j <= hi
        elif mode == "bfly":
            j = LANE ^ bv
            ok = j <= hi
        else:
            j = lo | (bv & ~seg & 31)
            ok = j <= hi
        j = np.where(ok, j, LANE)
        row = np.arange(C.nwarps)[:, None]
        if m is not None:
            src = act[row, j]
            if (act & ~src).any():
                k = int(np.flatnonzero(act & ~src)[0])
                raise C.error("ub", f"shfl reads from lane {int(j.reshape(-1)[k])} which is inactive", ins, k)
        w(C, m, x[row, j].reshape(-1))
        if p is not SINK:
            wp(C, m, np.broadcast_to(ok, act.shape).reshape(-1).copy())

    return f


@op("vote")
def _vote(ins):
    _, sync, mode, ty = ins.parts
    if sync != "sync":
        raise Unsupported("vote without .sync")
    d, a, mm = ins.operands
    w, ga, gm = dst(d, ty), raw(a, "pred"), raw(mm, "u32")

    def f(C, m):
        act = amask(C, m)
        mem = w32(C, gm(C))
        x = pack_bits(w32(C, ga(C)) & act)[:, None] & mem
        full = pack_bits(act)[:, None] & mem
        if mode == "ballot":
            r = x
        elif mode == "any":
            r = x != 0
        elif mode == "all":
            r = x == full
        else:
            r = (x == 0) | (x == full)
        w(C, m, np.ascontiguousarray(r).reshape(-1))

    return f


@op("match")
def _match(ins):
    mode, ty = ins.parts[1], ins.parts[-1]
    d, a, mm = ins.operands
    d, p = (d.a, d.b) if isinstance(d, Pair) else (d, SINK)
    w, wp, ga, gm = dst(d, "b32"), dst(p, "pred"), raw(a, ty), raw(mm, "u32")

    def f(C, m):
        act, x = amask(C, m), w32(C, ga(C))
        mem = members(C, w32(C, gm(C)), act, ins) & act[:, None, :]
        eq = (x[:, :, None] == x[:, None, :]) & mem
        bits = np.packbits(eq, axis=2, bitorder="little").view(U32)[..., 0]
        if mode == "all":
            al = (eq == mem).all(2)
            bits = np.where(al, bits, U32.type(0))
            wp(C, m, al.reshape(-1))
        w(C, m, bits.reshape(-1))

    return f


@op("redux")
def _redux(ins):
    opn, ty = ins.parts[2], ins.parts[-1]
    d, a, mm = ins.operands
    if ty == "f32":
        raise Unsupported(ins.text)
    w, ga, gm = dst(d, ty), isrc(a, ty), raw(mm, "u32")
    fn = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[opn]
    dt = INT[ty]
    ident = {
        "add": 0,
        "or": 0,
        "xor": 0,
        "and": -1 if dt.kind == "i" else np.iinfo(dt).max,
        "min": np.iinfo(dt).max,
        "max": np.iinfo(dt).min,
    }[opn]

    def f(C, m):
        act, x = amask(C, m), w32(C, ga(C))
        mem = members(C, w32(C, gm(C)), act, ins) & act[:, None, :]
        v = np.where(mem, x[:, None, :], dt.type(ident))
        w(C, m, fn.reduce(v, axis=2, dtype=dt).reshape(-1))

    return f


@op("activemask")
def _activemask(ins):
    w = dst(ins.operands[0], "b32")
    return lambda C, m: w(C, m, np.repeat(pack_bits(amask(C, m)), 32))


# ---------------------------------------------------------------- matrix load/store
def warps_of(m):
    """Indices of warps taking part (all lanes present, checked by core)."""
    return np.flatnonzero(m.reshape(-1, 32).any(1))


def merge_warps(C, m, ws, v):
    """(len(ws), 32) values -> full (n,) array."""
    if m is None:
        return v.reshape(-1)
    full = np.zeros((C.nwarps, 32), v.dtype)
    full[ws] = v
    return full.reshape(-1)


@op("ldmatrix", "stmatrix")
def _ldstmatrix(ins):
    load = ins.parts[0] == "ldmatrix"
    if "m8n8" not in ins.parts or ins.parts[-1] != "b16":
        raise Unsupported(ins.text)
    nm = next(int(p[1]) for p in ins.parts if p in ("x1", "x2", "x4"))
    trans = "trans" in ins.parts
    d, a = ins.operands if load else ins.operands[::-1]
    regs = d.items if isinstance(d, Vec) else (d,)
    generic = not any(p.startswith("shared") for p in ins.parts)
    ga, space = addr_getter(a, None if generic else "shared")
    ws_ = [dst(r, "b32") for r in regs] if load else None
    gs_ = None if load else [raw(r, "b32") for r in regs]
    what = "ldmatrix row" if load else "stmatrix row"

    def rows(C, m):
        ad = ga(C)
        if len(ad) != C.n:
            ad = np.repeat(ad, C.n)
        wl = np.arange(C.nwarps) if m is None else warps_of(m)
        lanes = np.arange(8 * nm)
        t = (wl[:, None] * 32 + lanes).reshape(-1)
        off = ad[t]
        if generic or space is None:
            off = C.to_shared(ins, off, t)
        C.S.check(C, ins, off, 16, t, what)
        if C.traffic is not None:
            C.traffic.shared(ins.parts[0], off, t, 16, np.arange(len(t)) // 8)
        return wl, t, off

    def ld(C, m):
        wl, t, off = rows(C, m)
        C.shared.read(ins, off, 16, t)
        x = C.S.views[2][(off >> 1)[:, None] + np.arange(8)].reshape(len(wl), nm, 8, 8)
        if trans:
            x = np.ascontiguousarray(x.swapaxes(2, 3))
        x = x.view(U32).reshape(len(wl), nm, 32)
        for j, w in enumerate(ws_):
            w(C, m, merge_warps(C, m, wl, x[:, j]))

    def st(C, m):
        wl, t, off = rows(C, m)
        C.shared.write(ins, off, 16, t)
        x = np.stack([w32(C, g(C))[wl] for g in gs_], 1)  # (W, nm, 32) u32
        x = np.ascontiguousarray(x).view(U16).reshape(len(wl), nm, 8, 8)
        if trans:
            x = x.swapaxes(2, 3)
        C.S.views[2][(off >> 1)[:, None] + np.arange(8)] = x.reshape(-1, 8)

    return ld if load else st


# ---------------------------------------------------------------- mma fragment layouts
# With E = 32 / bits elements per register, g = lane >> 2, q = lane & 3 (PTX ISA figures):
#   A (16 x k):  register r, element e -> row g + 8*(r & 1),  col q*E + e + 4E*(r >> 1)
#   B (k x 8):   register r, element e -> row q*E + e + 4E*r, col g
#   C (16 x 8):  element i             -> row g + 8*(i >> 1), col 2*q + (i & 1)
# For mma.sp the same A formula addresses the compressed 16 x k/2 matrix.
def frag_index(kind, nreg, E):
    """Flat index (lane*nreg*E + r*E + e) of each matrix element, in row-major matrix order."""
    lane = np.arange(32)[:, None, None]
    r = np.arange(nreg)[None, :, None]
    e = np.arange(E)[None, None, :]
    g, q = lane >> 2, lane & 3
    if kind == "A":
        row, col = g + 8 * (r & 1) + 0 * e, q * E + e + 4 * E * (r >> 1)
        shape = (16, 4 * E * (nreg // 2))
    elif kind == "B":
        row, col = q * E + e + 4 * E * r, g + 0 * r + 0 * e
        shape = (4 * E * nreg, 8)
    else:
        i = r * E + e
        row, col = g + 8 * (i >> 1), 2 * q + (i & 1)
        shape = (16, 8)
    flat = lane * nreg * E + r * E + e
    perm = np.empty(shape, np.int64)
    perm[row, col] = flat
    return perm.reshape(-1), shape


ELEM = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8}


def decode(ty, regs):
    """u32 register values -> float64 elements in memory order."""
    if ty == "f16":
        return regs.view(np.float16).astype(F64)
    if ty == "bf16":
        return fp.bf16_load(regs.view(U16)).astype(F64)
    if ty == "tf32":
        return (regs & U32.type(0xFFFFE000)).view(F32).astype(F64)
    if ty == "f32":
        return regs.view(F32).astype(F64)
    return regs.view({"s8": np.int8, "u8": np.uint8, "s32": np.int32}[ty]).astype(F64)


def meta_nibbles(kind, E_bits, nnib, sel, meta):
    """Sparsity metadata -> (W, 16, nnib) nibbles, one per chunk of each row of A.

    meta: (W, 32) u32. Contributing lanes of quad g (PTX ISA 'Sparse matrix storage'; the
    placement inside the words is CUTLASS' ELayout / ReorderMeta):
      16/32-bit types, 4 nibbles/row: lane 4g+sel: bits 0-15 row g, bits 16-31 row g+8
      16/32-bit types, 8 nibbles/row: lanes 4g+2sel+{0,1}: nibbles 0-3 / 4-7, same two rows
      8-bit types, 8 nibbles/row:     lanes 4g+2sel+{0,1}: row g / row g+8, all 32 bits
      8-bit types, 16 nibbles/row:    lanes 4g+{0,1}: rows g, g+8 nibbles 0-7; 4g+{2,3}: 8-15
    """
    W = meta.shape[0]
    quad = meta.reshape(W, 8, 4)
    sh = (np.arange(8) * 4).astype(U32)
    nib = (quad[..., None] >> sh) & U32.type(15)  # (W, g, lane in quad, 8 nibbles)
    out = np.empty((W, 16, nnib), np.int64)
    if E_bits >= 16:
        lanes = [sel] if nnib == 4 else [2 * sel, 2 * sel + 1]
        for j, q in enumerate(lanes):
            out[:, :8, 4 * j : 4 * j + 4] = nib[:, :, q, :4]
            out[:, 8:, 4 * j : 4 * j + 4] = nib[:, :, q, 4:]
    else:
        base = 2 * sel if nnib == 8 else 0
        for j in range(nnib // 8):
            out[:, :8, 8 * j : 8 * j + 8] = nib[:, :, base + 2 * j]
            out[:, 8:, 8 * j : 8 * j + 8] = nib[:, :, base + 2 * j + 1]
    return out


ORDERED = {0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110}
VALID = np.array([n in ORDERED or (n & 3) != (n >> 2) for n in range(16)])
VALID_ORDERED = np.array([n in ORDERED for n in range(16)])
VALID_TF32 = np.array([n in (0b0100, 0b1110) for n in range(16)])


def decompress(C, ins, A, nib, ty, ordered, warps):
    """Compressed A (W, 16, K/2) + nibbles -> dense (W, 16, K)."""
    ok = (VALID_TF32 if ty == "tf32" else VALID_ORDERED if ordered else VALID)[nib]
    if not ok.all():
        w, r, c = (int(x) for x in np.argwhere(~ok)[0])
        raise C.error(
            "ub",
            f"invalid sparsity metadata 0b{int(nib[w, r, c]):04b} for row {r}, chunk {c}"
            f" of {ty}{' (ordered_metadata)' if ordered else ''}",
            ins,
            int(warps[w]) * 32 + (r % 8) * 4,
        )
    W, M, K2 = A.shape
    D = np.zeros((W, M, 2 * K2))
    wi, ri = np.arange(W)[:, None, None], np.arange(M)[None, :, None]
    ch = np.arange(nib.shape[2])[None, None, :]
    if ty == "tf32":  # 1:2, one value per chunk of two
        D[wi, ri, 2 * ch + (nib >> 1 & 1)] = A
    else:  # 2:4
        D[wi, ri, 4 * ch + (nib & 3)] = A[:, :, 0::2]
        D[wi, ri, 4 * ch + (nib >> 2)] = A[:, :, 1::2]
    return D


SHAPE = re.compile(r"^m(\d+)n(\d+)k(\d+)$")


@op("mma")
def _mma(ins):
    parts = ins.parts[1:]
    sparse = parts[0] == "sp" or parts[0].startswith("sp::")
    ordered = "sp::ordered_metadata" in parts or "ordered_metadata" in ins.op
    M, N, K = next(tuple(map(int, SHAPE.match(p).groups())) for p in parts if SHAPE.match(p))
    types = [
        p
        for p in parts
        if p
        in (
            "f16",
            "bf16",
            "tf32",
            "f32",
            "f64",
            "s8",
            "u8",
            "s4",
            "u4",
            "b1",
            "s32",
            "e4m3",
            "e5m2",
            "e2m1",
            "e3m2",
            "e2m3",
        )
    ]
    layout = [p for p in parts if p in ("row", "col")]
    known = {"sync", "aligned", "sp", "sp::ordered_metadata", "row", "col", "satfinite"} | set(types)
    need(ins, [p for p in parts if not SHAPE.match(p)], known)
    dty, aty, bty, cty = types
    if layout != ["row", "col"]:
        raise Unsupported(ins.text)
    if aty not in ELEM or bty not in ELEM or (M, N) != (16, 8):
        raise Unsupported(f"mma shape/type: {ins.text}")
    bits = ELEM[aty]
    allowed = {16: (8, 16), 32: (4, 8), 8: (16, 32)}[bits]
    if sparse:
        allowed = tuple(2 * k for k in allowed)
    if K not in allowed:
        raise Unsupported(f"mma shape/type: {ins.text}")
    E = 32 // bits
    ops = ins.operands
    na = (K // 2 if sparse else K) // (2 * E)  # A registers
    nb = K // (4 * E)  # B registers
    items = [o.items if isinstance(o, Vec) else (o,) for o in ops[:4]]
    nc = {"f32": 4, "s32": 4, "f16": 2}[cty]
    nd = {"f32": 4, "s32": 4, "f16": 2}[dty]
    for name, got, want in (
        ("D", len(items[0]), nd),
        ("A", len(items[1]), na),
        ("B", len(items[2]), nb),
        ("C", len(items[3]), nc),
    ):
        if got != want:
            raise Unsupported(f"{name} has {got} registers, expected {want}: {ins.text}")
    ga = [raw(x, "b32") for x in items[1]]
    gb = [raw(x, "b32") for x in items[2]]
    gc = [raw(x, "b32") for x in items[3]]
    wd = [dst(x, "b32") for x in items[0]]
    fragA, _ = fragment("A", aty, ga, E)
    fragB, _ = fragment("B", bty, gb, E)
    fragC, _ = fragment("C", cty, gc, 4 // nc)
    scatter = fragment_scatter(nd, 4 // nd)
    satf = "satfinite" in parts
    if sparse:
        gmeta, sel = raw(ops[4], "b32"), ops[5].value if isinstance(ops[5], Imm) else None
        nnib = K // 2 if aty == "tf32" else K // 4
        nsel = {4: 4, 8: 2, 16: 1}[nnib]
        if sel is None:
            raise Unsupported(f"sparsity selector must be an immediate: {ins.text}")

    def f(C, m):
        wl = None if m is None else warps_of(m)
        W = C.nwarps if m is None else len(wl)
        A = fragA(C, W, wl)
        B = fragB(C, W, wl)
        if sparse:
            ws = np.arange(W) if wl is None else wl
            if not 0 <= sel < nsel:
                raise C.error("ub", f"sparsity selector {sel} out of range 0..{nsel - 1}", ins, int(ws[0]) * 32)
            meta = w32(C, gmeta(C))[ws]
            nibbles = meta_nibbles(aty, bits, nnib, sel, meta)
            kept = None if np.isfinite(B).all() else decompress(C, ins, np.ones_like(A), nibbles, aty, ordered, ws)
            A = decompress(C, ins, A, nibbles, aty, ordered, ws)
        if sparse and kept is not None:  # rows of B that A does not name are not multiplied
            D = np.where(kept[..., None] != 0, A[..., None] * B[:, None], 0.0).sum(2) + fragC(C, W, wl)
        else:
            D = np.matmul(A, B) + fragC(C, W, wl)
        if dty == "s32":
            if satf:
                D = np.clip(D, -(2.0**31), 2.0**31 - 1)
            D = D.astype(I64).astype(U32)
        elif dty == "f32":
            D = D.astype(F32).view(U32)
        else:
            D = D.astype(np.float16)
        D = D.reshape(-1)[scatter(W)]  # (registers, W, 32 [, 2])
        if dty == "f16":
            D = D.view(U32)[..., 0]
        for j, w in enumerate(wd):
            w(C, m, D[j].reshape(-1) if m is None else merge_warps(C, m, wl, D[j]))

    return f


def fragment(kind, ty, gs, E):
    """-> (reader f(C, W, warps) -> (W, rows, cols) float64, matrix shape) for operand registers gs."""
    perm, shape = frag_index(kind, len(gs), E)
    lane, r, e = perm // (len(gs) * E), perm // E % len(gs), perm % E
    cache = {}

    def read(C, W, wl):
        ix = cache.get(W)
        if ix is None:  # flat index into [register, warp, lane, element]
            ix = ((r * W + np.arange(W)[:, None]) * 32 + lane) * E + e
            ix = cache[W] = ix.reshape(W, *shape)
        regs = []
        for g in gs:
            v = g(C)
            if len(v) != C.n:
                v = np.repeat(v, C.n)
            regs.append(v if wl is None else v.reshape(-1, 32)[wl].reshape(-1))
        return decode(ty, np.concatenate(regs))[ix]

    return read, shape


def fragment_scatter(nreg, E):
    """C/D matrix -> registers: f(W) = flat index array of shape (nreg, W, 32 [, E])."""
    perm, _ = frag_index("C", nreg, E)
    inv = np.argsort(perm).reshape(32, nreg, E)  # [lane, r, e] -> matrix position
    cache = {}

    def index(W):
        ix = cache.get(W)
        if ix is None:
            ix = inv.transpose(1, 0, 2)[:, None] + (np.arange(W) * 128)[:, None, None]
            ix = cache[W] = np.ascontiguousarray(ix if E > 1 else ix[..., 0])
        return ix

    return index
