"""Module and launch: binds arguments into one global arena and runs the CTAs one after another."""

import re
import time
from dataclasses import dataclass, field

import numpy as np

from .blocks import build_blocks
from .cta import CTA
from .errors import PtxError, SimError
from .isa import GLOBAL_BASE, REDZONE, SIZES, STORAGE
from .memory import Arena
from .operands import U64
from .parser import Parser
from .traffic import Counter

MAX_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 70: 96, 75: 64}


@dataclass
class Stats:
    instructions: int = 0  # CTA-wide instructions executed
    ctas: int = 0
    seconds: float = 0.0
    per_cta: list = field(default_factory=list)
    traffic: object = None  # traffic.Traffic, with launch(traffic=True)

    @property
    def rate(self):
        return self.instructions / max(self.seconds, 1e-9)


def as_numpy(a):
    """numpy view of an argument; torch CPU tensors are accepted."""
    if hasattr(a, "data_ptr") and hasattr(a, "untyped_storage"):
        import torch

        a = a.detach()
        if a.dtype == torch.bfloat16:
            a = a.view(torch.int16)
        return a.numpy()
    return a


class Launch:
    """One run of a kernel.

    args: numpy arrays (pointers, updated in place), (array, byte offset), ints, floats, None, or bytes for by-value
    structs.
    races / uninit: shared-memory checkers; races="strict" also reports same-value stores.
    order: linear | reverse | shuffle (CTA order).
    schedule: lockstep | warps (warps run one after another between barriers).
    ctas: only run these CTA indices.  traffic: count memory requests and instructions (stats.traffic).
    """

    def __init__(
        self,
        mod,
        name,
        grid,
        block,
        args=(),
        shared_bytes=0,
        races=False,
        uninit=False,
        order="linear",
        schedule="lockstep",
        seed=0,
        max_instr=50_000_000,
        early_exit_ok=False,
        poison=True,
        ctas=None,
        traffic=False,
    ):
        self.mod, self.grid, self.block = mod, dim3(grid), dim3(block)
        self.K, self.blocks = mod.compiled(name)
        K = self.K
        nt = self.block[0] * self.block[1] * self.block[2]
        if nt > 1024 or nt < 1:
            raise SimError("limit", f"block of {nt} threads")
        if K.reqntid and tuple(self.block) != tuple(K.reqntid):
            raise SimError("limit", f"block {self.block} but kernel has .reqntid {K.reqntid}")
        if K.maxntid and nt > K.maxntid[0] * K.maxntid[1] * K.maxntid[2]:
            raise SimError("limit", f"block {self.block} but kernel has .maxntid {K.maxntid}")
        self.races, self.uninit, self.schedule = races, uninit, schedule
        self.max_instr, self.early_exit_ok, self.order, self.ctas = max_instr, early_exit_ok, order, ctas
        self.rng = np.random.default_rng(seed)
        self.dyn_shared = shared_bytes
        self.shared_end = K.dyn_offset + shared_bytes
        arch = int(re.sub(r"\D", "", mod.target) or 80)
        used = sum(s for _, _, s in K.static_shared) + shared_bytes
        cap = MAX_SHARED.get(arch, 227) * 1024
        if used > cap:
            raise SimError("limit", f"{used} bytes of shared memory, {mod.target} allows {cap} per block")
        n = (nt + 31) // 32 * 32
        junk = 0xA5A5A5A5A5A5A5A5 if poison else 0
        pool = {s: np.full(n, junk & ((1 << (8 * s)) - 1), STORAGE[s]) for s in (1, 2, 4, 8)}
        false = np.zeros(n, bool)
        self.reg_init = [false if t == "pred" else pool[SIZES[t]] for t in K.reg_types]
        self.cache = {}
        self.bind(args)
        self.traffic = Counter(self) if traffic else None

    def bind(self, args):
        K, mod = self.K, self.mod
        if len(args) != len(K.params):
            raise SimError("limit", f"{K.name} takes {len(K.params)} arguments, got {len(args)}")
        # merge overlapping numpy buffers into single allocations
        spans = []
        arrays = []
        self.pointers = {}  # parameter name -> host address of its array
        for p, a in zip(K.params, args, strict=False):
            off = 0
            if isinstance(a, tuple):
                a, off = a
            a = as_numpy(a)
            if isinstance(a, np.ndarray) and a.ndim >= 0 and not p.is_array and p.size == 8 and not np.isscalar(a):
                if not a.flags.c_contiguous:
                    raise SimError("limit", f"argument {p.name}: array is not C-contiguous")
                arrays.append((p, a, off))
                if a.nbytes:
                    spans.append((a.ctypes.data, a.ctypes.data + a.nbytes))
                    self.pointers[p.name] = a.ctypes.data
            else:
                arrays.append((p, a, None))
        spans.sort()
        merged = []
        for s, e in spans:
            if merged and s < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], e)
            else:
                merged.append([s, e])
        pos = (mod.parser.gsize + 255) // 256 * 256 + REDZONE
        placed = []
        for s, e in merged:
            placed.append((s, e, pos))
            pos = (pos + (e - s) + 255) // 256 * 256 + REDZONE
        param_off = pos
        pos += (K.param_bytes + 255) // 256 * 256 + REDZONE
        self.G = G = Arena("global", pos, 0xEE)
        for v in mod.parser.vars.values():
            if v.space == "global":
                o = v.addr - GLOBAL_BASE
                G.add(o, v.size, v.name)
                G.buf[o : o + v.size] = mod.globals[v.name]
        params = np.zeros(max(K.param_bytes, 8) + 16, np.uint8)
        self.bound = []
        for p, a, off in arrays:
            if off is not None:
                if a.nbytes:
                    s, e, base = next(x for x in placed if x[0] <= a.ctypes.data < x[1])
                    o = base + a.ctypes.data - s
                    G.buf[o : o + a.nbytes] = a.reshape(-1).view(np.uint8)
                    self.bound.append((a, o))
                else:
                    o = REDZONE // 2
                raw_ = np.array([GLOBAL_BASE + o + off], U64).view(np.uint8)
            else:
                raw_ = scalar_bytes(p, a)
            params[p.offset : p.offset + p.size] = raw_
        for s, e, base in placed:
            names = [n for n, a in self.pointers.items() if s <= a < e]
            G.add(base, e - s, "buffer " + "/".join(names))
        G.add(param_off, max(K.param_bytes, 1), "kernel parameters")
        G.buf[param_off : param_off + K.param_bytes] = params[: K.param_bytes]
        G.seal()
        self.params = params
        self.param_addr = lambda off: GLOBAL_BASE + param_off + off

    def run(self):
        gx, gy, gz = self.grid
        ids = (
            [(x, y, z) for z in range(gz) for y in range(gy) for x in range(gx)]
            if self.ctas is None
            else [dim3(c, 0) for c in self.ctas]
        )
        if self.order == "shuffle":
            self.rng.shuffle(ids)
            ids = [tuple(int(v) for v in c) for c in ids]
        elif self.order == "reverse":
            ids.reverse()
        st = Stats()
        t0 = time.perf_counter()
        with np.errstate(all="ignore"):
            for c in ids:
                C = CTA(self, c)
                try:
                    C.run()
                finally:
                    st.instructions += C.nins
                    st.ctas += 1
        st.seconds = time.perf_counter() - t0
        if self.traffic is not None:
            st.traffic = self.traffic.finish()
        for a, o in self.bound:
            if a.flags.writeable:
                a.reshape(-1).view(np.uint8)[:] = self.G.buf[o : o + a.nbytes]
        for v in self.mod.parser.vars.values():
            if v.space == "global":
                o = v.addr - GLOBAL_BASE
                self.mod.globals[v.name][:] = self.G.buf[o : o + v.size]
        return st


def dim3(v, fill=1):
    v = (v,) if isinstance(v, (int, np.integer)) else tuple(v)
    return tuple(int(x) for x in v) + (fill,) * (3 - len(v))


def scalar_bytes(p, a):
    if a is None:
        a = 0
    if isinstance(a, (bytes, bytearray)) or (p.is_array and isinstance(a, np.ndarray)):
        b = np.frombuffer(bytes(a) if isinstance(a, (bytes, bytearray)) else a.tobytes(), np.uint8)
        if len(b) != p.size:
            raise SimError("limit", f"argument {p.name}: {len(b)} bytes given, {p.size} expected")
        return b
    if isinstance(a, np.ndarray):
        a = a.reshape(-1)[0]
    if isinstance(a, (float, np.floating)):
        ft = {2: np.float16, 4: np.float32, 8: np.float64}[p.size]
        return np.array([a], ft).view(np.uint8)
    if p.type in ("f32", "f64"):
        return np.array([a], np.float32 if p.type == "f32" else np.float64).view(np.uint8)
    return np.array([int(a) % (1 << (8 * p.size))], STORAGE[p.size]).view(np.uint8)


class Module:
    """A parsed PTX module. launch() runs one kernel; module globals persist between launches."""

    def __init__(self, ptx):
        self.ptx = ptx
        self.parser = Parser(ptx)
        self.target, self.version = self.parser.target, self.parser.version
        self._compiled = {}
        self.globals = {}
        for v in self.parser.vars.values():
            if v.space == "global":
                b = np.zeros(v.size, np.uint8)
                b[: len(v.init)] = np.frombuffer(v.init, np.uint8)
                self.globals[v.name] = b
        for var, off, sym in self.parser.relocs:
            if sym in self.parser.vars:
                self.globals[var][off : off + 8] = np.array([self.parser.vars[sym].addr], U64).view(np.uint8)

    @property
    def kernels(self):
        return list(self.parser.entries)

    def compiled(self, name):
        if name not in self.parser.entries:
            match = [k for k in self.parser.entries if name in k]
            if len(match) != 1:
                raise PtxError(f"no kernel {name!r}; module has {self.kernels}")
            name = match[0]
        if name not in self._compiled:
            K = self.parser.kernel(name)
            self._compiled[name] = (K, build_blocks(K.code))
        return self._compiled[name]

    def unsupported(self, name):
        """Instructions of a kernel that ptxsim cannot execute (static check)."""
        _, blocks = self.compiled(name)
        bad = [f.ins for b in blocks.values() for f in b.fns if getattr(f, "error", None) is not None]
        return bad + [b.ins for b in blocks.values() if b.term == "bar" and b.bar["kind"] == "unsupported"]

    def launch(self, name, grid, block, args=(), **options):
        """Runs a kernel with the options of `Launch` and returns Stats."""
        return Launch(self, name, grid, block, args, **options).run()
