"""One CTA: its state and the scheduler.

Scheduling: all threads of a CTA run as one vector while they agree on the pc.
After a divergent branch the groups wait in `ready` (block start pc -> mask);
the lowest pc runs first and groups meeting at a pc merge. Warp-synchronous
instructions park a partial warp until the required lanes arrive, barriers
block threads until their count is complete. When nothing can run the launch
fails with a deadlock report.
"""

import numpy as np

from .blocks import WHOLE_WARP
from .ctamem import Memory
from .errors import PtxError, SimError, Unsupported
from .memory import Arena, SharedChecker
from .operands import U64
from .warp import w32


class CTA(Memory):
    def __init__(self, L, ctaid):
        self.L, self.K, self.ctaid = L, L.K, ctaid
        self.nreal = L.block[0] * L.block[1] * L.block[2]
        self.nwarps = (self.nreal + 31) // 32
        self.n = n = self.nwarps * 32
        self.tids = np.arange(n)
        self.params, self.param_addr = L.params, L.param_addr
        self.G, self.cache, self.nins = L.G, L.cache, 0
        self.traffic = L.traffic  # traffic.Counter or None
        self.R = list(L.reg_init)
        self.S = Arena("shared", L.shared_end + 1024, 0xFF)
        for name, a, size in self.K.static_shared:
            self.S.add(a, size, name)
        if L.dyn_shared:
            self.S.add(self.K.dyn_offset, L.dyn_shared, "dynamic shared memory")
        self.S.seal()
        self.shared = SharedChecker(self, len(self.S.buf), L.races, L.uninit)
        lb = (self.K.local_bytes + 15) // 16 * 16
        self.lstride = lb
        self.LM = Arena("local", lb * n if self.K.local_vars else 0, 0xFF)
        for name, a, size in self.K.local_vars:
            self.LM.add(a, size, name)
        self.LM.seal()
        self.cp_commit = np.zeros(n, np.int64)
        self.cp_ops = []
        self._special = {}
        self.alive = self.tids < self.nreal
        self.exited_early = False

    # ------------------------------------------------ identification
    def special(self, name):
        v = self._special.get(name)
        if v is None:
            v = self._special[name] = self._compute_special(name)
        return v

    def _compute_special(self, name):
        bx, by, _bz = self.L.block
        _gx, _gy, _gz = self.L.grid
        t, lane = self.tids, self.tids % 32
        one = np.ones(1, np.int64)
        base, _, dim = name[1:].partition(".")
        k = "xyz".find(dim) if dim in ("x", "y", "z") else -1
        if base == "tid":
            return [t % bx, t // bx % by, t // (bx * by)][k]
        if base == "ntid":
            return one * self.L.block[k]
        if base == "ctaid":
            return one * self.ctaid[k]
        if base == "nctaid":
            return one * self.L.grid[k]
        shifted = np.uint64(1) << lane.astype(U64)
        table = {
            "laneid": lane,
            "warpid": t // 32,
            "nwarpid": one * self.nwarps,
            "smid": one * 0,
            "nsmid": one,
            "gridid": one * 0,
            "lanemask_eq": shifted,
            "lanemask_lt": shifted - np.uint64(1),
            "lanemask_le": (shifted << np.uint64(1)) - np.uint64(1),
            "lanemask_gt": np.uint64(0xFFFFFFFF) ^ ((shifted << np.uint64(1)) - np.uint64(1)),
            "lanemask_ge": np.uint64(0xFFFFFFFF) ^ (shifted - np.uint64(1)),
            "dynamic_smem_size": one * self.L.dyn_shared,
            "total_smem_size": one * self.L.shared_end,
            "aggr_smem_size": one * self.L.shared_end,
        }
        if base in table:
            return table[base]
        if name == "WARP_SZ":
            return one * 32
        raise Unsupported(f"special register {name}")

    def active(self, m):
        return np.flatnonzero(self.alive if m is None else m)

    def error(self, kind, msg, ins=None, thread=None):
        tid = None
        if thread is not None:
            thread = int(thread)
            bx, by, _ = self.L.block
            tid = (thread % bx, thread // bx % by, thread // (bx * by))
        return SimError(kind, msg, ins, self.ctaid, thread, tid)

    def shared_name(self, b):
        for s, e, n in self.S.allocs:
            if s <= b < e:
                return f"{n}+{b - s}"
        return hex(b)

    # ------------------------------------------------ scheduling
    def run(self):
        L, n = self.L, self.n
        blocks, traffic = L.blocks, self.traffic
        self.ready, self.parked, self.bars, self.since = {}, {}, {}, {}
        ready = self.ready
        self.add(0, None if self.nreal == n else self.alive.copy())
        spins = 0  # backward jumps while other groups wait (spin loops)
        while True:
            if not ready and not self.unblock():
                break
            pc = min(ready)
            limit, quantum = -1, 1 << 60
            if spins > 256 and len(ready) > 1:  # fairness: run the group that waited longest
                pc = min(ready, key=lambda p: self.since.get(p, 0))
                limit, quantum, spins = 1 << 60, 300, 0
            m = ready.pop(pc)
            if L.schedule == "warps" and n > 32:
                m = self.one_warp(pc, m)
            if ready and limit < 0:
                limit = min(ready)
            elif limit < 0:
                limit = 1 << 60
            while True:
                b = blocks[pc]
                if b.park is not None and (m is not None or b.park_pred is not None):
                    m = self.park(b, m)
                    if m is False:
                        break
                if b.fns:
                    try:
                        for f in b.fns:
                            f(self, m)
                    except (SimError, Unsupported, PtxError):
                        raise
                    except Exception as e:
                        raise RuntimeError(f"ptxsim itself failed at {f.ins.text} (ptx line {f.ins.line})") from e
                self.nins += b.nins
                if traffic is not None:
                    traffic.block(self, b, m)
                if self.nins > L.max_instr:
                    raise self.error(
                        "limit",
                        f"more than {L.max_instr} instructions in one CTA (endless loop?)",
                        b.ins,
                        self.active(m)[0],
                    )
                t = b.term
                if t == "":
                    pc = b.next
                elif t == "bra":
                    if b.pred is None:
                        pc = b.ins.target
                    else:
                        p = b.pred(self)
                        if m is None:
                            k, tot = np.count_nonzero(p), n
                        else:
                            p = p & m
                            k, tot = np.count_nonzero(p), np.count_nonzero(m)
                        if k == tot:
                            pc = b.ins.target
                        elif k == 0:
                            pc = b.next
                        else:
                            self.add(b.ins.target, p)
                            self.add(b.next, ~p if m is None else m & ~p)
                            break
                elif t == "exit":
                    m = self.split_pred(b, m)
                    self.alive = np.zeros(n, bool) if m is None else self.alive & ~m
                    break
                elif t == "bar":
                    m = self.split_pred(b, m)
                    if m is not False:
                        nxt = self.barrier(b, m)
                        if nxt is not None and not ready:
                            pc, m = nxt
                            continue
                        if nxt is not None:
                            self.add(*nxt)
                    break
                else:
                    self.brx(b, m)
                    break
                quantum -= 1
                if ready and pc <= b.pc:
                    spins += 1
                unfair = spins > 256 and ready and limit < 1 << 60
                if pc >= limit or quantum <= 0 or unfair:
                    self.add(pc, m)
                    break
        if self.alive.any():
            self.deadlock()

    def add(self, pc, m):
        old = self.ready.get(pc)
        if old is not None:
            m = old | m
        self.since[pc] = self.nins
        if m is not None and np.count_nonzero(m) == self.n:
            m = None
        self.ready[pc] = m

    def one_warp(self, pc, m):
        """schedule='warps': keep only the first warp of the group, leave the rest waiting."""
        mm = np.ones(self.n, bool) if m is None else m
        w = int(np.flatnonzero(mm)[0]) // 32
        sel = mm & (self.tids // 32 == w)
        rest = mm & ~sel
        if rest.any():
            self.ready[pc] = rest
        return sel

    def split_pred(self, b, m):
        """Predicated exit/barrier: threads failing the predicate continue at b.next."""
        if b.pred is None:
            return m
        p = b.pred(self)
        yes = p if m is None else p & m
        no = ~p if m is None else m & ~p
        if no.any():
            self.add(b.next, no)
        else:
            return m
        return yes if yes.any() else np.zeros(self.n, bool) if b.term == "exit" else False

    def brx(self, b, m):
        idx = b.index(self)
        if len(idx) != self.n:
            idx = np.repeat(idx, self.n)
        act = self.alive if m is None else m
        if b.pred is not None:
            p = b.pred(self)
            if (act & ~p).any():
                self.add(b.next, act & ~p)
            act = act & p
        for v in np.unique(idx[act]):
            if v >= len(b.ins.targets):
                raise self.error("ub", f"brx.idx index {v} out of range", b.ins, self.active(act)[0])
            self.add(b.ins.targets[int(v)], act & (idx == v))

    def park(self, b, m):
        """Hold partial warps at a warp-synchronous instruction. -> mask to run, or False."""
        waiting = self.parked.pop(b.pc, None)
        full = np.ones(self.n, bool) if m is None else m
        if waiting is not None:
            full = full | waiting
        eff = full if b.park_pred is None else full & b.park_pred(self)
        e = eff.reshape(-1, 32)
        alive = self.alive.reshape(-1, 32)
        if b.park_mask is None:
            short = (alive & ~e).any(1) & e.any(1)
        else:
            mk = w32(self, b.park_mask(self))
            bits = ((mk[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)).astype(bool)
            need = (bits & e[:, :, None]).any(1) & alive
            short = (need & ~e).any(1)
        dead = None
        if b.park.parts[0] in WHOLE_WARP:
            dead = e.any(1) & ~alive.all(1)
            if dead.any():
                raise self.error(
                    "ub",
                    "warp-wide matrix instruction in a warp with exited or missing threads",
                    b.park,
                    int(np.flatnonzero(dead)[0]) * 32,
                )
        if short.any():
            hold = full & np.repeat(short, 32)
            self.parked[b.pc] = hold
            full = full & ~hold
            if not full.any():
                return False
        return None if np.count_nonzero(full) == self.n else full

    def barrier(self, b, m):
        d, ins = b.bar, b.ins
        if d["kind"] == "unsupported":
            raise Unsupported(f"unsupported instruction: {ins.text} (ptx line {ins.line})")
        if m is None and d["kind"] == "sync" and d["count"] is None and not self.bars:
            self.shared.barrier(np.arange(self.nwarps))  # whole CTA arrives at once
            return b.next, None
        mm = self.alive.copy() if m is None else m
        act = np.flatnonzero(mm)
        if d["id"] is None:
            ident = 0
        else:
            v = d["id"](self)
            v = v if len(v) == 1 else np.unique(v[act])
            if len(v) > 1:  # different barriers in one instruction
                ids = d["id"](self)
                for x in v:
                    sub = mm & (ids == x)
                    self.arrive(b, sub, int(x))
                return None
            ident = int(v[0])
        return self.arrive(b, mm, ident)

    def arrive(self, b, mm, ident):
        d, ins = b.bar, b.ins
        count = None
        if d["count"] is not None:
            v = d["count"](self)
            count = int(v[0] if len(v) == 1 else v[np.flatnonzero(mm)[0]])
        st = self.bars.setdefault(ident, dict(waiting=[], arrived=np.zeros(self.n, bool), extra=0, count=count))
        if st["count"] != count:
            raise self.error(
                "barrier",
                f"barrier {ident}: thread counts {st['count']} and {count} do not match",
                ins,
                np.flatnonzero(mm)[0],
            )
        st["count"] = count
        if d["kind"] == "arrive":
            st["extra"] += int(np.count_nonzero(mm & st["arrived"]))
            st["arrived"] = st["arrived"] | mm
            self.add(b.next, mm)
        else:
            st["waiting"].append((b, mm))
            st["arrived"] = st["arrived"] | mm
        return self.try_release(ident)

    def try_release(self, ident):
        st = self.bars[ident]
        got = int(np.count_nonzero(st["arrived"])) + st["extra"]
        if st["count"] is not None:
            # hardware counts whole warps
            got = int(st["arrived"].reshape(-1, 32).any(1).sum()) * 32 + st["extra"]
            part = st["arrived"].reshape(-1, 32)
            alive = self.alive.reshape(-1, 32)
            if ((alive & ~part).any(1) & part.any(1)).any() or got < st["count"]:
                return None
        else:
            if got < int(np.count_nonzero(self.alive)):
                return None
            if got < self.nreal and not self.L.early_exit_ok:
                k = int(np.flatnonzero(~self.alive[: self.nreal])[0])
                raise self.error(
                    "barrier",
                    f"barrier {ident} reached after {self.nreal - got} threads of the CTA have "
                    f"exited (thread {k} for one); pass early_exit_ok=True to allow",
                    st["waiting"][0][0].ins,
                    np.flatnonzero(st["waiting"][0][1])[0],
                )
        del self.bars[ident]
        wait = st["waiting"]
        if any(b.bar["aligned"] for b, _ in wait):
            owner = np.full(self.n, -1)
            for b, mm in wait:
                owner[mm] = b.pc
            o = owner.reshape(-1, 32)
            hi = o.max(1)
            lo = np.where(o < 0, 1 << 30, o).min(1)
            bad = (hi >= 0) & (lo != hi)
            if bad.any():
                w = int(np.flatnonzero(bad)[0])
                pcs = sorted(set(int(x) for x in o[w] if x >= 0))
                raise self.error(
                    "barrier",
                    "divergent barrier: threads of one warp wait at different bar.sync "
                    f"instructions (ptx lines {[self.L.blocks[p].ins.line for p in pcs]})",
                    wait[0][0].ins,
                    w * 32,
                )
        self.shared.barrier(np.flatnonzero(st["arrived"].reshape(-1, 32).any(1)))
        reds = [(b, mm) for b, mm in wait if b.bar["kind"] == "red"]
        if reds:
            total, cnt = 0, 0
            for b, mm in reds:
                p = b.bar["pred"](self)
                p = np.repeat(p, self.n) if len(p) == 1 else p
                total += int(np.count_nonzero(p & mm))
                cnt += int(np.count_nonzero(mm))
            for b, mm in reds:
                r = {
                    "popc": np.array([total], np.uint32),
                    "and": np.array([total == cnt]),
                    "or": np.array([total > 0]),
                }[b.bar["redop"]]
                b.bar["dst"](self, mm, r)
        if len(wait) == 1:
            b, mm = wait[0]
            return b.next, None if np.count_nonzero(mm) == self.n else mm
        for b, mm in wait:
            self.add(b.next, mm)
        return None

    def unblock(self):
        """Nothing is ready: see whether exits completed a barrier or a parked group."""
        for ident in list(self.bars):
            r = self.try_release(ident)
            if r is not None:
                self.add(*r)
        if not self.ready and self.parked:
            state = (self.alive.tobytes(), tuple(sorted((k, v.tobytes()) for k, v in self.parked.items())))
            if state != getattr(self, "_parked_state", None):
                self._parked_state = state
                for pc, m in list(self.parked.items()):
                    del self.parked[pc]
                    self.add(pc, m)
        return bool(self.ready)

    def deadlock(self):
        lines = []
        for ident, st in self.bars.items():
            for b, mm in st["waiting"]:
                lines.append(
                    f"{np.count_nonzero(mm)} threads (first {np.flatnonzero(mm)[0]}) at barrier {ident}, "
                    f"ptx line {b.ins.line}"
                )
        for pc, mm in self.parked.items():
            ins = self.L.blocks[pc].park
            lines.append(
                f"{np.count_nonzero(mm)} threads (first {np.flatnonzero(mm)[0]}) at '{ins.text}' (ptx line "
                f"{ins.line}) waiting for the other lanes it needs"
            )
        ins = next((self.L.blocks[pc].park for pc in self.parked), None) or next(
            (st["waiting"][0][0].ins for st in self.bars.values() if st["waiting"]), None
        )
        raise self.error("deadlock", "no thread can make progress: " + "; ".join(lines), ins)
