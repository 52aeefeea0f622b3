"""Instruction lists to basic blocks of closures; warp-wide instructions and barriers start blocks of their own."""

from dataclasses import dataclass

import numpy as np

from . import access, arith, bits, moves, warp  # noqa: F401  (importing them fills BUILDERS)
from .errors import Unsupported
from .operands import BUILDERS, dst, raw

WHOLE_WARP = {"mma", "ldmatrix", "stmatrix"}
PARKING = WHOLE_WARP | {"shfl", "vote", "match", "redux"}


@dataclass
class Block:
    pc: int
    fns: list
    nins: int
    next: int
    term: str = ""  # "", bra, brx, exit, bar
    ins: object = None  # terminator
    pred: object = None  # getter of terminator predicate
    park: object = None  # parking instruction at the start of this block
    park_pred: object = None
    park_mask: object = None  # getter of its membermask (None: whole warp)


def unsupported(ins, e):
    def f(C, m):
        raise Unsupported(f"unsupported instruction: {ins.text} (ptx line {ins.line}): {e}")

    return f


def compile_ins(ins):
    error = None
    try:
        name = "$call" if ins.op.startswith("$call") else ins.parts[0]
        if name not in BUILDERS:
            raise Unsupported("no such instruction in ptxsim")
        inner = BUILDERS[name](ins)
    except (
        Unsupported,
        KeyError,
        ValueError,
        AttributeError,
        IndexError,
        TypeError,
        StopIteration,
    ) as e:
        error = e
        inner = unsupported(ins, e)
    f = inner
    if ins.pred is not None:
        g = pred_getter(ins)

        def predicated(C, m):
            p = g(C)
            if m is not None:
                p = p & m
            k = np.count_nonzero(p)
            if k == C.n:
                inner(C, None)
            elif k:
                inner(C, p)

        f = predicated
    f.ins, f.error = ins, error
    return f


def pred_getter(ins):
    if ins.pred is None:
        return None
    r, neg = ins.pred
    i = r.slot
    return (lambda C: ~C.R[i]) if neg else (lambda C: C.R[i])


def membermask(ins):
    """Operand holding the membermask, or None for .aligned whole-warp instructions."""
    if ins.parts[0] in ("shfl", "vote", "match", "redux"):
        return raw(ins.operands[-1], "u32")
    if ins.op.startswith("bar.warp"):
        return raw(ins.operands[0], "u32")
    return None


def parks(ins):
    return ins.parts[0] in PARKING or ins.op.startswith("bar.warp")


def is_barrier(ins):
    return ins.parts[0] in ("bar", "barrier") and not ins.op.startswith("bar.warp")


def build_blocks(code):
    leaders = {0}
    for ins in code:
        h = ins.parts[0]
        if h == "bra":
            leaders |= {ins.target, ins.pc + 1}
        elif h == "brx":
            leaders |= set(ins.targets) | {ins.pc + 1}
        elif h in ("ret", "exit") or is_barrier(ins):
            leaders.add(ins.pc + 1)
            if is_barrier(ins):
                leaders.add(ins.pc)
        elif parks(ins):
            leaders |= {ins.pc, ins.pc + 1}
    blocks, n = {}, len(code)
    order = sorted(x for x in leaders if x < n)
    for start, end in zip(order, [*order[1:], n], strict=False):
        b = Block(start, [], end - start, end)
        for ins in code[start:end]:
            h = ins.parts[0]
            if h in ("bra", "brx", "ret", "exit") or is_barrier(ins):
                b.term = {"bra": "bra", "brx": "brx", "ret": "exit", "exit": "exit"}.get(h, "bar")
                b.ins, b.pred = ins, pred_getter(ins)
                if b.term == "brx":
                    b.index = raw(ins.operands[0], "u32")
                elif b.term == "bar":
                    b.bar = decode_barrier(ins)
            else:
                if parks(ins):
                    b.park, b.park_pred, b.park_mask = ins, pred_getter(ins), membermask(ins)
                b.fns.append((lambda C, m: None) if ins.op.startswith("bar.warp") else compile_ins(ins))
        blocks[start] = b
    if n not in blocks:  # falling off the end exits
        blocks[n] = Block(n, [], 0, n, "exit")
    return blocks


def decode_barrier(ins):
    """-> dict(kind, id, count, red op, dst, pred)."""
    p = [x for x in ins.parts[1:] if x != "cta"]
    aligned = ins.parts[0] == "bar" or "aligned" in p
    kind = p[0]
    o = list(ins.operands)
    if kind == "cluster":
        return dict(kind="unsupported")
    if kind == "red":
        redop, ty = next(x for x in p if x in ("popc", "and", "or")), p[-1]
        d = o.pop(0)
        pr = o.pop(-1)
        return dict(
            kind="red",
            id=raw(o[0], "u32"),
            count=raw(o[1], "u32") if len(o) > 1 else None,
            redop=redop,
            dst=dst(d, ty),
            pred=raw(pr, "pred"),
            aligned=aligned,
        )
    return dict(
        kind=kind, id=raw(o[0], "u32") if o else None, count=raw(o[1], "u32") if len(o) > 1 else None, aligned=aligned
    )
