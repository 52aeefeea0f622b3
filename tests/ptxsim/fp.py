"""Float formats: conversions between register bits and numpy compute arrays.

Every float type has load(bits) -> compute array and store(values) -> bits.
Packed types (f16x2, bf16x2) use compute arrays of shape (n, 2).
f16/bf16 compute in float32 (add/mul are then correctly rounded on store) and
fma goes through float64.
"""

import numpy as np

U8, U16, U32, U64 = (np.dtype(t) for t in (np.uint8, np.uint16, np.uint32, np.uint64))
F16, F32, F64 = (np.dtype(t) for t in (np.float16, np.float32, np.float64))


def f64_to_f32_odd(x):
    """Round to odd, so that a second rounding to <= 22 bits is correct."""
    r = x.astype(F32)
    big = np.abs(r.astype(F64)) > np.abs(x)
    b = r.view(U32) - big.astype(U32)
    inexact = (b.view(F32).astype(F64) != x) & np.isfinite(x)
    b = np.where(np.isinf(r) & np.isfinite(x), U32.type(0x7F7FFFFF) | (r.view(U32) & U32.type(0x80000000)), b)
    return (b | inexact.astype(U32)).view(F32)


def round_to(x, dt, mode):
    """Round x (wider float array) to numpy float dtype dt with PTX mode rn/rz/rm/rp/rna."""
    r = x.astype(dt)
    if mode == "rn":
        return r
    w = r.astype(x.dtype)
    if mode == "rz":
        return np.where((np.abs(w) > np.abs(x)), np.nextafter(r, dt.type(0)), r)
    if mode == "rm":
        return np.where(w > x, np.nextafter(r, dt.type(-np.inf)), r)
    if mode == "rp":
        return np.where(w < x, np.nextafter(r, dt.type(np.inf)), r)
    raise ValueError(f"rounding mode {mode!r}")


def bf16_load(b):
    return (b.astype(U32) << U32.type(16)).view(F32)


def bf16_store(x, mode="rn"):
    if x.dtype == F64:
        x = f64_to_f32_odd(x)
    u = np.ascontiguousarray(x).view(U32)
    if mode == "rn":
        r = (u + U32.type(0x7FFF) + ((u >> U32.type(16)) & U32.type(1))) >> U32.type(16)
    else:
        r = u >> U32.type(16)
        more = (u & U32.type(0xFFFF)) != 0
        neg = (u >> U32.type(31)) != 0
        if mode == "rm":
            r = r + (more & neg)
        elif mode == "rp":
            r = r + (more & ~neg)
        elif mode != "rz":
            raise ValueError(f"rounding mode {mode!r}")
    return np.where(np.isnan(x), U16.type(0x7FFF), r.astype(U16))


def f16_store(x, mode="rn"):
    if mode == "rn":
        r = x.astype(F16)
    else:
        r = round_to(x, F16, mode)
        if mode == "rz":
            r = np.where(np.isinf(r) & np.isfinite(x), np.copysign(F16.type(65504), r), r)
    return r.view(U16)


def tf32_round(bits, mode):
    """f32 bits -> tf32 bits (low 13 bits zero)."""
    u = bits
    if mode == "rz":
        r = u
    elif mode == "rna":
        r = u + U32.type(0x1000)
    else:
        r = u + U32.type(0xFFF) + ((u >> U32.type(13)) & U32.type(1))
    r = r & U32.type(0xFFFFE000)
    special = (u & U32.type(0x7F800000)) == U32.type(0x7F800000)
    return np.where(special, u, r)


def halves(b):
    """u32 (n,) -> u16 (n, 2), low half first."""
    return np.ascontiguousarray(b).view(U16).reshape(-1, 2)


def load(ty, bits):
    if ty == "f32":
        return bits.view(F32)
    if ty == "f64":
        return bits.view(F64)
    if ty == "f16":
        return bits.view(F16).astype(F32)
    if ty == "bf16":
        return bf16_load(bits)
    if ty == "f16x2":
        return halves(bits).view(F16).astype(F32)
    if ty == "bf16x2":
        return bf16_load(halves(bits))
    if ty == "f32x2":
        return np.ascontiguousarray(bits).view(F32).reshape(-1, 2)
    raise KeyError(ty)


def store(ty, v, mode="rn"):
    if ty == "f32":
        return (v if v.dtype == F32 else round_to(v, F32, mode)).view(U32)
    if ty == "f64":
        return v.astype(F64).view(U64)
    if ty == "f16":
        return f16_store(v, mode)
    if ty == "bf16":
        return bf16_store(v, mode)
    if ty == "f16x2":
        return np.ascontiguousarray(f16_store(v, mode)).view(U32).reshape(-1)
    if ty == "bf16x2":
        return np.ascontiguousarray(bf16_store(v, mode)).view(U32).reshape(-1)
    if ty == "f32x2":
        v = v if v.dtype == F32 else round_to(v, F32, mode)
        return np.ascontiguousarray(v).view(U64).reshape(-1)
    raise KeyError(ty)


FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2"}
TINY = F32.type(np.finfo(np.float32).tiny)


def flush(x):
    return np.where(np.abs(x) < TINY, np.copysign(x.dtype.type(0), x), x)


def two_prod(a, b):
    p = a * b
    c = a * 134217729.0
    ah = c - (c - a)
    al = a - ah
    c = b * 134217729.0
    bh = c - (c - b)
    bl = b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def fma64(a, b, c):
    """Near-correctly rounded double fma (double-double, plain fallback at the extremes)."""
    p, pe = two_prod(a, b)
    s = p + c
    t = s - p
    se = (p - (s - t)) + (c - t)
    r = s + (se + pe)
    return np.where(np.isfinite(r), r, a * b + c)


# ---- convenience for users: bf16 <-> numpy
def to_bf16(x):
    """float array -> uint16 array holding bfloat16 bits."""
    x = np.ascontiguousarray(x)
    return bf16_store(x if x.dtype == F64 else x.astype(F32)).reshape(x.shape)


def from_bf16(b):
    return bf16_load(np.asarray(b, np.uint16))
