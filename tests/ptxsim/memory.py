"""Byte arenas with allocations and red zones, and the shared-memory checkers."""

import numpy as np

from .isa import STORAGE


class Arena:
    """One address space: a byte buffer plus the allocations that may be touched."""

    def __init__(self, name, size, fill=0):
        size = (size + 63) // 64 * 64
        self.name = name
        self.buf = np.full(size, fill, np.uint8)
        self.views = {s: self.buf.view(dt) for s, dt in STORAGE.items()}
        self.allocs = []  # (start, end, name)

    def add(self, start, size, name):
        self.allocs.append((start, start + size, name))

    def seal(self):
        self.allocs.sort()
        self.starts = np.array([a[0] for a in self.allocs], np.int64)
        self.ends = np.array([a[1] for a in self.allocs], np.int64)

    def locate(self, off):
        k = int(np.searchsorted(self.starts, off, "right")) - 1
        near = []
        if k >= 0:
            s, e, n = self.allocs[k]
            near.append(f"{off - s} bytes into {n} (size {e - s})")
        if k + 1 < len(self.allocs):
            s, e, n = self.allocs[k + 1]
            near.append(f"{s - off} bytes before {n}")
        return ", ".join(near[:1] if near and k >= 0 else near) or "no allocation"

    def check(self, C, ins, off, size, tids, what):
        """off: int64 offsets (one per active thread). Raises SimError on the first bad one."""
        if len(off) == 0:
            return
        if size > 1 and int(np.bitwise_or.reduce(off)) & (size - 1):
            k = int(np.flatnonzero(off & (size - 1))[0])
            raise C.error(
                "misaligned",
                f"{what} of {size} bytes at {self.name} offset {int(off[k]):#x} is not {size}-byte aligned",
                ins,
                tids[k],
            )
        lo, hi = int(np.minimum.reduce(off)), int(np.maximum.reduce(off)) + size
        key = (ins.pc, self.name)
        c = C.cache.get(key)
        if c is not None and c[0] <= lo and hi <= c[1]:
            return
        if len(self.starts):
            k = np.searchsorted(self.starts, off, "right") - 1
            ok = (k >= 0) & (off + size <= self.ends[k])
        else:
            ok = np.zeros(len(off), bool)
        if not ok.all():
            j = int(np.flatnonzero(~ok)[0])
            n = int((~ok).sum())
            raise C.error(
                "oob",
                f"{what} of {size} bytes out of bounds in {self.name} memory: "
                f"{self.locate(int(off[j]))} ({n} of {len(off)} threads bad)",
                ins,
                tids[j],
            )
        k0 = int(k[0])
        C.cache[key] = (int(self.starts[k0]), int(self.ends[k0]))


class SharedChecker:
    """Races (between warps), uninitialised reads and in-flight cp.async, per byte.

    Ordering uses vector clocks between warps, advanced at barriers, so partial
    (named) barriers are handled.
    """

    def __init__(self, C, nbytes, races, uninit):
        self.C, self.races, self.uninit = C, bool(races), uninit
        self.strict = races == "strict"
        self.W = W = C.nwarps
        if races:
            self.vc = np.zeros((W, W), np.int32)  # vc[w, v]: epoch of v known to w
            self.epoch = np.ones(W, np.int32)
            self.wwarp = np.full(nbytes, -1, np.int16)
            self.wepoch = np.zeros(nbytes, np.int32)
            self.watomic = np.zeros(nbytes, bool)
            self.wtid = np.zeros(nbytes, np.int32)
            self.wpc = np.zeros(nbytes, np.int32)
            self.repoch = np.zeros((nbytes, W), np.int32)
            self.rpc = np.zeros(nbytes, np.int32)
        if uninit:
            self.init = np.zeros(nbytes, bool)
        self.pending = np.zeros(nbytes, np.uint8)
        self.npending = 0

    def barrier(self, warps):
        if self.races:
            vc = self.vc[warps].max(0)
            vc[warps] = np.maximum(vc[warps], self.epoch[warps])
            self.vc[warps] = vc
            self.epoch[warps] += 1

    def _bytes(self, off, size, tids):
        if size == 1:
            return off, tids
        b = (off[:, None] + np.arange(size)).reshape(-1)
        return b, np.repeat(tids, size)

    def read(self, ins, off, size, tids):
        C = self.C
        if not (self.races or self.uninit or self.npending):
            return
        b, t = self._bytes(off, size, tids)
        if self.npending:
            p = self.pending[b]
            if p.any():
                k = int(np.flatnonzero(p)[0])
                raise C.error(
                    "async",
                    f"read of shared byte {C.shared_name(int(b[k]))} while a cp.async to it "
                    "is in flight (missing cp.async.wait)",
                    ins,
                    t[k],
                )
        if self.uninit:
            p = ~self.init[b]
            if p.any():
                k = int(np.flatnonzero(p)[0])
                raise C.error("uninit", f"read of uninitialised shared byte {C.shared_name(int(b[k]))}", ins, t[k])
        if self.races:
            w = t >> 5
            ww = self.wwarp[b]
            bad = (ww >= 0) & (ww != w) & (self.wepoch[b] > self.vc[w, ww])
            if bad.any():
                k = int(np.flatnonzero(bad)[0])
                self.race("read-after-write", int(b[k]), ins, int(t[k]), int(self.wtid[b[k]]), int(self.wpc[b[k]]))
            self.repoch[b, w] = self.epoch[w]
            self.rpc[b] = ins.pc

    def write(self, ins, off, size, tids, atomic=False, vals=None):
        """vals: list of stored arrays (one per vector element), to tell harmless same-value stores."""
        C = self.C
        if not (self.races or self.uninit or self.npending):
            return
        b, t = self._bytes(off, size, tids)
        if self.npending:
            p = self.pending[b]
            if p.any():
                k = int(np.flatnonzero(p)[0])
                raise C.error(
                    "async",
                    f"write to shared byte {C.shared_name(int(b[k]))} while a cp.async to it is in flight",
                    ins,
                    t[k],
                )
        data = None
        if self.races and vals is not None:
            data = np.stack(np.broadcast_arrays(off, *vals)[1:], -1)
            data = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        self.mark_write(ins, b, t, atomic, data)

    def mark_write(self, ins, b, t, atomic=False, data=None):
        if self.uninit:
            self.init[b] = True
        if not self.races:
            return
        # storing the value that is already there cannot be observed (Triton does this with replicated data)
        change = np.ones(len(b), bool) if data is None or self.strict else self.C.S.buf[b] != data
        w = t >> 5
        ww = self.wwarp[b]
        bad = (ww >= 0) & (ww != w) & (self.wepoch[b] > self.vc[w, ww]) & change
        if atomic:
            bad &= ~self.watomic[b]
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            self.race("write-after-write", int(b[k]), ins, int(t[k]), int(self.wtid[b[k]]), int(self.wpc[b[k]]))
        rb = self.repoch[b] > self.vc[w]
        rb[np.arange(len(b)), w] = False
        rb &= change[:, None]
        if rb.any():
            k = int(np.flatnonzero(rb.any(1))[0])
            v = int(np.flatnonzero(rb[k])[0])
            self.race("write-after-read", int(b[k]), ins, int(t[k]), v * 32, int(self.rpc[b[k]]), warp_only=True)
        if not atomic and len(b) > 1:  # two warps writing in this very instruction
            o = np.argsort(b, kind="stable")
            sb, sw = b[o], w[o]
            same = (sb[1:] == sb[:-1]) & (sw[1:] != sw[:-1])
            if data is not None and not self.strict:
                same &= data[o][1:] != data[o][:-1]
            if same.any():
                k = int(np.flatnonzero(same)[0])
                self.race("write-write", int(sb[k]), ins, int(t[o][k + 1]), int(t[o][k]), ins.pc)
        self.wwarp[b] = w
        self.wepoch[b] = self.epoch[w]
        self.watomic[b] = atomic
        self.wtid[b] = t
        self.wpc[b] = ins.pc

    def race(self, kind, byte, ins, t, other, opc, warp_only=False):
        o = self.C.K.code[opc]
        who = f"warp {other // 32}" if warp_only else f"thread {other}"
        raise self.C.error(
            "race",
            f"{kind} race on shared byte {self.C.shared_name(byte)} with {who} at "
            f"ptx line {o.line} ({o.text}) with no barrier between",
            ins,
            t,
        )
