"""Performance counters: launch(..., traffic=True) fills stats.traffic.

The instruction closures call Counter (CTA.traffic; None when off) with the addresses
of their active threads; the scheduler calls block(). Everything is counted per warp
request, as the hardware's load/store unit sees it; nothing is timed.
"""

from dataclasses import dataclass, field, fields

import numpy as np

from . import fp
from .isa import GLOBAL_BASE, LOCAL_BASE, SHARED_BASE
from .warp import SHAPE, warps_of

SECTOR = 32


def ratio(a, b):
    return a / b if b else float("nan")


# ---------------------------------------------------------------- results
@dataclass
class Access:
    """Requests of one kind. widths: bytes per lane access -> number of lane accesses."""

    requests: int = 0
    bytes: int = 0  # asked for by active lanes
    sectors: int = 0  # 32-byte sectors touched, summed over requests
    ideal: int = 0  # ceil(bytes of distinct addresses / 32), summed over requests
    widths: dict = field(default_factory=dict)

    @property
    def efficiency(self):
        return ratio(self.ideal, self.sectors)

    def add(self, requests, nbytes, sectors, ideal, widths=()):
        self.requests += requests
        self.bytes += nbytes
        self.sectors += sectors
        self.ideal += ideal
        for k in widths:
            self.widths[k] = self.widths.get(k, 0) + widths[k]


@dataclass
class Buffer:
    """Global traffic of one buffer. load includes cp.async; atomic counts as read and as written."""

    load: Access = field(default_factory=Access)
    store: Access = field(default_factory=Access)
    atomic: Access = field(default_factory=Access)
    unique_read: int = 0  # bytes of the distinct sectors read in the whole launch
    unique_write: int = 0

    @property
    def read_bytes(self):
        return SECTOR * (self.load.sectors + self.atomic.sectors)

    @property
    def write_bytes(self):
        return SECTOR * (self.store.sectors + self.atomic.sectors)

    @property
    def unique(self):
        return self.unique_read + self.unique_write

    @property
    def reread(self):
        return ratio(self.read_bytes, self.unique_read)

    @property
    def rewrite(self):
        return ratio(self.write_bytes, self.unique_write)

    def kinds(self):
        return [(f.name, getattr(self, f.name)) for f in fields(self)[:3] if getattr(self, f.name).requests]


@dataclass
class Shared:
    requests: int = 0
    bytes: int = 0
    wavefronts: int = 0
    ideal: int = 0

    @property
    def conflicts(self):
        """Bank-conflict factor; 1.0 is conflict-free."""
        return ratio(self.wavefronts, self.ideal)

    def add(self, requests, nbytes, wavefronts, ideal):
        self.requests += requests
        self.bytes += nbytes
        self.wavefronts += wavefronts
        self.ideal += ideal


@dataclass
class Count:
    cta: int = 0  # times executed, all warps that run together counting once
    warp: int = 0  # warp instructions issued


@dataclass
class Traffic:
    total: Buffer = field(default_factory=Buffer)
    buffers: dict = field(default_factory=dict)  # parameter (or variable) name -> Buffer
    args: list = field(default_factory=list)  # name in buffers of every kernel parameter, None for scalars
    shared: dict = field(default_factory=dict)  # load, store, atomic, ldmatrix, stmatrix, cp.async
    mix: dict = field(default_factory=dict)  # family -> Count
    mma_flops: int = 0  # dense-equivalent

    def arg(self, i):
        """Buffer of the i-th kernel argument."""
        return self.buffers[self.args[i]]

    @property
    def shared_total(self):
        t = Shared()
        for s in self.shared.values():
            t.add(s.requests, s.bytes, s.wavefronts, s.ideal)
        return t

    @property
    def intensity(self):
        """mma FLOPs per byte of least DRAM traffic."""
        return ratio(self.mma_flops, self.total.unique)

    def __str__(self):
        rows = [["global memory", "requests", "bytes", "sectors", "ideal", "coalescing", "lane bytes: accesses"]]
        uniq = [["distinct sectors", "read bytes", "unique", "re-read", "write bytes", "unique", "re-write"]]
        for name, b in [(n, b) for n, b in self.buffers.items() if b.kinds()] + [("total", self.total)]:
            for kind, a in b.kinds():
                w = " ".join(f"{k}: {v}" for k, v in sorted(a.widths.items()))
                rows.append([f"{name} {kind}", a.requests, a.bytes, a.sectors, a.ideal, a.efficiency, w])
            uniq.append([name, b.read_bytes, b.unique_read, b.reread, b.write_bytes, b.unique_write, b.rewrite])
        sh = [["shared memory", "requests", "bytes", "wavefronts", "ideal", "conflict factor"]]
        for name, s in [*self.shared.items(), ("total", self.shared_total)]:
            sh.append([name, s.requests, s.bytes, s.wavefronts, s.ideal, s.conflicts])
        mix = [["instructions", "CTA-wide", "warp"]]
        mix += [[k, c.cta, c.warp] for k, c in sorted(self.mix.items(), key=lambda x: -x[1].warp)]
        mix.append(["total", sum(c.cta for c in self.mix.values()), sum(c.warp for c in self.mix.values())])
        out = [table(rows), table(uniq), table(sh), table(mix)]
        if self.mma_flops:
            out.append(f"mma FLOPs (dense-equivalent): {self.mma_flops}, {self.intensity:.2f} per unique global byte")
        return "\n\n".join(out)


def table(rows):
    cells = [[("-" if x != x else f"{x:.3f}") if isinstance(x, float) else str(x) for x in r] for r in rows]
    width = [max(len(r[j]) for r in cells) for j in range(len(cells[0]))]
    text = len(cells[0]) - 1 if "accesses" in cells[0][-1] else -1
    lines = []
    for row in cells:
        padded = [x.ljust(w) if j in (0, text) else x.rjust(w) for j, (x, w) in enumerate(zip(row, width, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------- instruction families
CONTROL = {"bra", "brx", "ret", "exit", "$call", "call", "trap", "brkpt", "nanosleep", "pmevent"}
BARRIER = {"bar", "barrier", "membar", "fence"}
SHUFFLE = {"shfl", "vote", "match", "redux", "activemask"}
FLOATOPS = {"sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh"}


def family(ins):
    p = ins.parts
    h = "$call" if ins.op.startswith("$call") else p[0]
    if h in CONTROL:
        return "control"
    if h in BARRIER:
        return "barrier"
    if h in SHUFFLE:
        return "shuffle"
    if h == "mma":
        return "mma.sp" if p[1].startswith("sp") else "mma.sync"
    if h == "cp":
        return "cp.async" if p[2] in ("ca", "cg") else "barrier"
    if h in ("ld", "ldu", "st", "atom", "red"):
        space = next(
            (s for s in (x.split("::")[0] for x in p[1:]) if s in ("global", "shared", "local", "const", "param")),
            "generic",
        )
        return f"{ {'ldu': 'ld', 'red': 'atom'}.get(h, h) }.{space}"
    if h in ("ldmatrix", "stmatrix", "cvt", "mov"):
        return h
    if h in ("prefetch", "prefetchu", "discard", "applypriority"):
        return "prefetch"
    isf = p[-1] in fp.FLOATS
    if isf and h in ("fma", "mad"):
        return "fma"
    return "float" if isf or h in FLOATOPS else "integer"


def flops(ins):
    """Dense-equivalent operations per warp of a matrix instruction."""
    p = ins.parts
    if p[0] != "mma":
        return 0
    for x in p:
        s = SHAPE.match(x)
        if s:
            M, N, K = map(int, s.groups())
            return 2 * M * N * K
    return 0


# ---------------------------------------------------------------- counting
def starts(x):
    """Marks the first element of every run of equal values."""
    new = np.ones(len(x), bool)
    np.not_equal(x[1:], x[:-1], out=new[1:])
    return new


def runs(x):
    """Number of distinct values of a sorted array."""
    return int(np.count_nonzero(starts(x)))


def distinct(key):
    """Sorted distinct values (np.unique, faster on small arrays)."""
    k = np.sort(key)
    return k[starts(k)]


def wavefronts(group, off, nbytes, merge=True):
    """32 banks of 4 bytes. group: number of the set of lanes served together, per lane.

    -> (wavefronts, groups). Different words of one bank take one wavefront each; the same
    word is broadcast, unless merge is False (atomics).
    """
    words = max(nbytes // 4, 1)
    key = group << 32 | off >> 2
    if words > 1:
        key = (key[:, None] + np.arange(words)).reshape(-1)
    u = distinct(key) if merge else np.sort(key)
    g = starts(u >> 32).cumsum() - 1
    n = np.bincount(g * 32 + (u & 31), minlength=32 * (int(g[-1]) + 1)).reshape(-1, 32)
    return int(n.max(1).sum()), len(n)


class Counter:
    def __init__(self, L):
        self.L, self.G = L, L.G
        self.T = T = Traffic()
        names = [a[2].removeprefix("buffer ") for a in L.G.allocs]
        owner = {n: full for full in names for n in full.split("/")}
        T.args = [owner.get(p.name) if p.name in L.pointers else None for p in L.K.params]
        for n in dict.fromkeys([n for n in T.args if n] + names):
            T.buffers[n] = Buffer()
        self.alloc = [T.buffers[n] for n in names]
        self.read = np.zeros(len(L.G.buf) // SECTOR + 2, bool)
        self.written = np.zeros_like(self.read)
        self.blocks = {}  # pc -> [block, executions, warps]
        self.flops = {i.pc: f for i in L.K.code if (f := flops(i))}

    # ------------------------------------------------ instructions
    def block(self, C, b, m):
        c = self.blocks.get(b.pc)
        if c is None:
            c = self.blocks[b.pc] = [b, 0, 0]
        c[1] += 1
        c[2] += C.nwarps if m is None else len(warps_of(m))
        f = self.flops.get(b.pc)
        if f:  # matrix instructions are blocks of their own
            if b.park_pred is not None:
                p = b.park_pred(C)
                m = p if m is None else m & p
            self.T.mma_flops += f * (C.nwarps if m is None else len(warps_of(m)))

    def finish(self):
        T = self.T
        for b, n, w in self.blocks.values():
            for ins in self.L.K.code[b.pc : b.pc + b.nins]:
                c = T.mix.setdefault(family(ins), Count())
                c.cta += n
                c.warp += w
        for (s, e, _), buf in zip(self.G.allocs, self.alloc, strict=False):
            s, e = s // SECTOR, -(-e // SECTOR)
            for f, seen in (("unique_read", self.read), ("unique_write", self.written)):
                n = SECTOR * int(np.count_nonzero(seen[s:e]))
                for x in (buf, T.total):
                    setattr(x, f, getattr(x, f) + n)
        return T

    # ------------------------------------------------ memory
    def access(self, C, kind, space, ad, t, size):
        """One load, store or atomic of size bytes per thread of t, at addresses ad."""
        if space is None:
            for sp, ix in C.split_generic(ad):
                base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(sp, 0)
                self.access(C, kind, sp, (ad if ix is None else ad[ix]) - base, t if ix is None else t[ix], size)
        elif space == "global":
            self.glob(kind, ad - GLOBAL_BASE, t, size)
        elif space == "shared":
            self.shared(kind, ad, t, size)

    def glob(self, kind, off, t, size):
        """size: bytes per lane (an int, or one per lane). Lane accesses are aligned, so lie in one sector."""
        if not len(off):
            return
        self.mark(kind, off >> 5)
        self.each(kind, self.requests, off, t, size)

    def each(self, kind, measure, off, *args):
        """Add measure(off, *args) to the total and to every buffer touched."""
        lo, hi = np.searchsorted(self.G.starts, (off.min(), off.max()), "right") - 1
        got = measure(off, *args)
        getattr(self.T.total, kind).add(*got)
        if lo == hi:
            getattr(self.alloc[lo], kind).add(*got)
            return
        k = np.searchsorted(self.G.starts, off, "right") - 1
        for j in np.unique(k):
            s = k == j
            got = measure(off[s], *(a[s] if isinstance(a, np.ndarray) else a for a in args))
            getattr(self.alloc[j], kind).add(*got)

    def mark(self, kind, sectors):
        if kind in ("load", "atomic"):
            self.read[sectors] = True
        if kind in ("store", "atomic"):
            self.written[sectors] = True

    def requests(self, off, t, size):
        if isinstance(size, np.ndarray):
            if (size != size[0]).any():
                return self.mixed(off, t, size)
            size = int(size[0])
        key = distinct((t >> 5) << 44 | off)
        per = np.bincount(key >> 44) * size
        ideal = int(((per + (SECTOR - 1)) >> 5).sum())
        return runs(t >> 5), len(off) * size, runs(key >> 5), ideal, {size: len(off)}

    def mixed(self, off, t, size):
        """cp.async with source sizes that differ between lanes."""
        key, one = np.unique((t >> 5) << 44 | off, return_index=True)
        ideal = int(np.ceil(np.bincount(key >> 44, size[one]) / SECTOR).sum())
        widths = {int(k): int(n) for k, n in zip(*np.unique(size, return_counts=True), strict=False)}
        return runs(t >> 5), int(size.sum()), runs(key >> 5), ideal, widths

    def shared(self, kind, off, t, size, group=None):
        """group: lanes served together (by default the whole warp up to 4 bytes, half for 8, a quarter for 16)."""
        if group is None:
            group = t // (32 if size <= 4 else max(128 // size, 1))
        n, ideal = wavefronts(group, off, size, kind != "atomic")
        self.T.shared.setdefault(kind, Shared()).add(runs(t >> 5), len(t) * size, n, ideal)

    def cp_async(self, dsta, srca, t, size, nsrc):
        self.shared("cp.async", dsta, t, size)
        k = np.flatnonzero(nsrc)  # source size 0 (zero fill) reads nothing
        self.glob("load", srca[k] - GLOBAL_BASE, t[k], nsrc[k])
