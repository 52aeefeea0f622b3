"""Memory of a CTA: address spaces, loads, stores, atomics and copies in flight."""

import numpy as np

from .isa import GLOBAL_BASE, LOCAL_BASE, SHARED_BASE, STORAGE


class Memory:
    """The memory side of cta.CTA."""

    def split_generic(self, ad):
        """generic addresses -> list of (space, index array)."""
        sh = (ad >= SHARED_BASE) & (ad < LOCAL_BASE)
        lo = ad >= LOCAL_BASE
        out = []
        for space, sel in (("shared", sh), ("local", lo), ("global", ~(sh | lo))):
            if sel.any():
                out.append((space, None if sel.all() else np.flatnonzero(sel)))
        return out

    def to_shared(self, ins, ad, t):
        if ((ad < SHARED_BASE) | (ad >= LOCAL_BASE)).any():
            raise self.error("oob", "generic address is not in shared memory", ins, t[0])
        return ad - SHARED_BASE

    def resolve(self, ins, space, ad, t, nbytes, what):
        """-> (arena, physical offsets) after alignment and bounds checks."""
        if space in ("global", "const", "param"):
            off = ad - GLOBAL_BASE
            self.G.check(self, ins, off, nbytes, t, what)
            return self.G, off
        if space == "shared":
            self.S.check(self, ins, ad, nbytes, t, what)
            return self.S, ad
        self.LM.check(self, ins, ad, nbytes, t, what)
        return self.LM, ad + t * self.lstride

    def load(self, ins, space, ad, t, size, vec):
        if space is None:
            parts = self.split_generic(ad)
            if len(parts) > 1:
                outs = [np.zeros(len(ad), STORAGE[size]) for _ in range(vec)]
                for sp, ix in parts:
                    base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(sp, 0)
                    for o, v in zip(outs, self.load(ins, sp, ad[ix] - base, t[ix], size, vec), strict=False):
                        o[ix] = v
                return outs
            space = parts[0][0]
            ad = ad - {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(space, 0)
        A, off = self.resolve(ins, space, ad, t, size * vec, "load")
        if A is self.S:
            self.shared.read(ins, off, size * vec, t)
        v = A.views[size]
        i = off if size == 1 else off >> (size.bit_length() - 1)
        return [v[i]] if vec == 1 else [v[i + k] for k in range(vec)]

    def store(self, ins, space, ad, t, size, vals):
        vec = len(vals)
        if space is None:
            parts = self.split_generic(ad)
            if len(parts) > 1:
                for sp, ix in parts:
                    base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(sp, 0)
                    self.store(ins, sp, ad[ix] - base, t[ix], size, [x if len(x) == 1 else x[ix] for x in vals])
                return
            space = parts[0][0]
            ad = ad - {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(space, 0)
        A, off = self.resolve(ins, space, ad, t, size * vec, "store")
        if A is self.S:
            self.shared.write(ins, off, size * vec, t, vals=vals)
        v = A.views[size]
        i = off if size == 1 else off >> (size.bit_length() - 1)
        for k, x in enumerate(vals):
            v[i + k] = x

    def atomic(self, ins, space, ad, t, size, b, c, apply, opn, idt):
        if space is None:
            parts = self.split_generic(ad)
            if len(parts) > 1:
                out = np.zeros(len(ad), STORAGE[size])
                for sp, ix in parts:
                    base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(sp, 0)
                    out[ix] = self.atomic(
                        ins, sp, ad[ix] - base, t[ix], size, b[ix], None if c is None else c[ix], apply, opn, idt
                    )
                return out
            space = parts[0][0]
            ad = ad - {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(space, 0)
        A, off = self.resolve(ins, space, ad, t, size, "atomic")
        if A is self.S:
            self.shared.write(ins, off, size, t, atomic=True)
        v = A.views[size]
        i = off >> (size.bit_length() - 1)
        order = np.argsort(i, kind="stable")
        si = i[order]
        if not (si[1:] == si[:-1]).any():  # all addresses distinct
            old = v[i]
            v[i] = apply(old, b, c)
            return old
        # rounds: the r-th access of every address is done together (a legal order)
        new = np.r_[True, si[1:] != si[:-1]]
        pos = np.arange(len(si))
        rank = pos - np.maximum.accumulate(np.where(new, pos, 0))
        old = np.zeros(len(i), v.dtype)
        if opn == "add" and idt is not None:  # integer add: prefix sums
            bs = b[order]
            cs = np.cumsum(bs, dtype=v.dtype)
            start = np.maximum.accumulate(np.where(new, pos, 0))
            before = cs - bs - (cs - bs)[start]
            old[order] = v[si] + before
            last = np.r_[new[1:], True]
            v[si[last]] = (old[order] + bs)[last]
            return old
        for r in range(int(rank.max()) + 1):
            k = order[rank == r]
            o = v[i[k]]
            old[k] = o
            v[i[k]] = apply(o, b[k], None if c is None else c[k])
        return old

    # ------------------------------------------------ cp.async
    def cp_async(self, ins, dsta, srca, t, size, nsrc):
        if (nsrc > size).any():
            raise self.error("ub", "cp.async src-size larger than cp-size", ins, t[0])
        self.S.check(self, ins, dsta, size, t, "cp.async destination")
        data = np.zeros((len(t), size), np.uint8)
        off = srca - GLOBAL_BASE
        for n in np.unique(nsrc):
            k = np.flatnonzero(nsrc == n)
            if n == 0:
                continue
            bad = off[k] & (size - 1)
            if bad.any():
                raise self.error("misaligned", f"cp.async source not {size}-byte aligned", ins, t[k[bad.argmax()]])
            # bounds: check first and last byte of what is really read
            self.G.check(self, ins, off[k], 1, t[k], "cp.async source")
            self.G.check(self, ins, off[k] + (int(n) - 1), 1, t[k], "cp.async source")
            data[k, :n] = self.G.buf[off[k][:, None] + np.arange(int(n))]
        b = dsta[:, None] + np.arange(size)
        S = self.shared
        if S.npending and S.pending[b].any():
            k = np.argwhere(S.pending[b])[0]
            raise self.error(
                "async",
                f"cp.async to shared byte {self.shared_name(int(b[tuple(k)]))} while an earlier "
                "cp.async to it is in flight",
                ins,
                t[int(k[0])],
            )
        S.mark_write(ins, b.reshape(-1), np.repeat(t, size))
        S.pending[b] = 1
        S.npending += b.size
        self.cp_ops.append([ins, t, b, data, self.cp_commit[t].copy()])

    def cp_wait(self, ins, m, n):
        """Land groups: all but the n most recent committed ones (n None: everything)."""
        if n is None:
            self.cp_commit = self.cp_commit + (1 if m is None else m.astype(np.int64))
            n = 0
        left = []
        for op in self.cp_ops:
            oins, t, b, data, grp = op
            land = grp < self.cp_commit[t] - n
            if m is not None:
                land &= m[t]
            if land.all():
                sel = slice(None)
            elif land.any():
                sel = np.flatnonzero(land)
                keep = ~land
                left.append([oins, t[keep], b[keep], data[keep], grp[keep]])
            else:
                left.append(op)
                continue
            bb = b[sel]
            self.S.buf[bb] = data[sel]
            self.shared.pending[bb] = 0
            self.shared.npending -= bb.size
        self.cp_ops = left
