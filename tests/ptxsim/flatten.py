"""One kernel body to a flat list of resolved instructions.

Register names, labels and shared, local and parameter variables are resolved here, brace scopes
(inline asm) honoured and calls of `.func` inlined: the executor sees slots, offsets and target pcs only.
"""

import re

from .errors import PtxError, Unsupported
from .isa import (
    LINKAGE,
    LOCAL_START,
    SHARED_START,
    SINK,
    SIZES,
    VAR_SPACES,
    Addr,
    Imm,
    Ins,
    Label,
    Neg,
    Not,
    Pair,
    Param,
    Reg,
    Scope,
    Special,
    Sym,
    Var,
    Vec,
    parse_number,
)


def walk(ops):
    """All leaf operands, looking through vectors, addresses, pairs and negations."""
    for o in ops:
        if isinstance(o, Vec):
            yield from walk(o.items)
        elif isinstance(o, Addr):
            yield from walk((o.base, *o.coords))
        elif isinstance(o, (Not, Neg)):
            yield from walk((o.op,))
        elif isinstance(o, Pair):
            yield from walk((o.a, o.b))
        else:
            yield o


class FuncBuilder:
    """Flattens one entry (and inlined calls) into a list of Ins."""

    def __init__(self, parser, params):
        self.p, self.params = parser, params
        self.code, self.reg_types = [], []
        self.shared, self.shared_end, self.dyn = [], SHARED_START, []
        self.dyn_align = 16
        self.local_bytes, self.local_vars = LOCAL_START, []
        self.loc = ""
        self.return_label = None
        self.placed = {}

    # shared/local allocation
    def add_shared(self, v):
        if v.size < 0:
            self.dyn.append(v)
            self.dyn_align = max(self.dyn_align, v.align)
            return
        a = max(v.align, 16)
        v.addr = (self.shared_end + a - 1) // a * a
        self.shared.append((v.name, v.addr, v.size))
        self.shared_end = v.addr + v.size + 64  # 64-byte red zone

    def add_local(self, name, size, align):
        a = max(align, 16)
        addr = (self.local_bytes + a - 1) // a * a
        self.local_bytes = addr + size + 16
        v = Var(name, "local", addr, size)
        self.local_vars.append((name, addr, size))
        return v

    def place_module_shared(self, v):
        if id(v) not in self.placed:
            self.placed[id(v)] = Var(v.name, "shared", -1, v.size)
            self.placed[id(v)].align = v.align
            self.add_shared(self.placed[id(v)])
        return self.placed[id(v)]

    def finish(self):
        for ins in self.code:  # place module-level shared variables in use
            for v in walk(ins.operands):
                if isinstance(v, Var) and v.space == "shared" and v.name in self.p.vars and self.p.vars[v.name] is v:
                    self.place_module_shared(v)
        a = self.dyn_align
        self.dyn_offset = (self.shared_end + a - 1) // a * a
        for v in self.dyn:
            v.addr = self.dyn_offset
        for pc, ins in enumerate(self.code):
            ins.pc = pc
        for ins in self.code:
            ins.operands = [self.fix(o) for o in ins.operands]
            if ins.op.split(".")[0] in ("bra", "brx"):
                if ins.op.startswith("bra"):
                    ins.target = self.lookup_label(ins, ins.operands[0])
                else:
                    ins.targets = [
                        self.lookup_label(ins, Label(x)) for x in self.lookup_label(ins, ins.operands[1], raw=True)
                    ]
        return self.code

    def lookup_label(self, ins, lab, raw=False):
        t = ins.scope.find_label(lab.name) if isinstance(lab, Label) else None
        if t is None:
            raise PtxError(f"line {ins.line}: undefined label {lab}")
        return t

    def fix(self, o):
        """Resolve variable references now that all addresses are known."""
        if isinstance(o, Var):
            o = self.placed.get(id(o), o)
            return Sym(o.name, o.space, o.addr)
        if isinstance(o, Param):
            return Sym(o.name, "param", o.offset)
        if isinstance(o, Addr):
            return Addr(self.fix(o.base), o.off, tuple(self.fix(c) for c in o.coords))
        if isinstance(o, Vec):
            return Vec(tuple(self.fix(x) for x in o.items))
        return o

    # parse a { ... } body starting at token index pos
    def emit_body(self, pos, scope, depth):
        p = self.p
        p.i = pos
        p.expect("{")
        scopes = [scope]
        while True:
            t = p.peek()
            if t == "}":
                p.next()
                scopes.pop()
                if not scopes:
                    return
            elif t == "{":
                p.next()
                scopes.append(Scope(scopes[-1]))
            else:
                self.statement(scopes[-1], depth)

    def statement(self, sc, depth):
        p = self.p
        t = p.peek()
        if t == ";":
            p.next()
        elif t == ".reg":
            p.next()
            ty = p.next()[1:]
            if ty in ("v2", "v4"):
                raise Unsupported(f"line {p.line()}: vector registers")
            while True:
                name = p.next()
                if p.peek() == "<":
                    p.next()
                    cnt = int(p.next())
                    p.expect(">")
                    for k in range(cnt):
                        self.new_reg(sc, f"{name}{k}", ty)
                else:
                    self.new_reg(sc, name, ty)
                if p.next() == ";":
                    break
        elif t in VAR_SPACES:
            p.variables(sc, self)
        elif t in LINKAGE:
            p.next()
            if p.peek() in VAR_SPACES:
                p.variables(sc, self, extern=t == ".extern")
        elif t == ".loc":
            f, ln = p.loc()
            self.loc = f"{p.files.get(f, f)}:{ln}"
        elif t in (".pragma", ".callprototype"):
            p.skip_to_semicolon()
        elif p.peek(1) == ":" and p.kind() == "word":
            name = p.next()
            p.next()
            if p.peek() == ".branchtargets":
                p.next()
                labs = []
                while True:
                    labs.append(p.next())
                    if p.next() == ";":
                        break
                sc.labels[name] = labs
            elif p.peek() == ".callprototype":
                p.skip_to_semicolon()
            else:
                sc.labels[name] = len(self.code)
        else:
            self.instruction(sc, depth)

    def new_reg(self, sc, name, ty):
        if ty not in SIZES or ty == "b128":
            raise Unsupported(f"register type .{ty}")
        sc.names[name] = Reg(len(self.reg_types), ty, name)
        self.reg_types.append(ty)

    def instruction(self, sc, depth):
        p = self.p
        line = p.line()
        start = p.i
        pred = None
        if p.peek() == "@":
            p.next()
            neg = p.peek() == "!"
            if neg:
                p.next()
            r = sc.find(p.next())
            if not isinstance(r, Reg):
                raise PtxError(f"line {line}: bad predicate")
            pred = (r, neg)
        op = p.next()
        ops = []
        if op.split(".")[0] == "call":
            return self.call(sc, op, pred, line, depth)
        while p.peek() != ";":
            ops.append(self.operand(sc))
            if p.peek() == ",":
                p.next()
        p.next()
        text = " ".join(x[1] for x in p.toks[start : p.i])
        text = re.sub(r" ([,;\]\)])", r"\1", text).replace("[ ", "[")
        if op.split(".")[0] == "ret" and self.return_label is not None:
            op, ops = "bra", [Label(self.return_label)]
        self.code.append(Ins(op, ops, pred, line, text, loc=self.loc, scope=sc))

    def operand(self, sc):
        p = self.p
        t = p.peek()
        if t == "{":
            p.next()
            items = []
            while p.peek() != "}":
                items.append(self.operand(sc))
                if p.peek() == ",":
                    p.next()
            p.next()
            o = Vec(tuple(items))
        elif t == "[":
            p.next()
            base = self.operand(sc)
            off, coords = 0, ()
            while p.peek() != "]":
                s = p.next()
                if s == ",":
                    c = self.operand(sc)
                    coords += c.items if isinstance(c, Vec) else (c,)
                    continue
                v = p.next()
                if v == "-":
                    s, v = ("-" if s == "+" else "+"), p.next()
                off += parse_number(v).value * (1 if s == "+" else -1)
            p.next()
            if isinstance(base, tuple):  # sym+imm parsed as a pair
                base, o2 = base
                off += o2
            return Addr(base, off, coords)
        elif t == "(":
            p.next()
            items = []
            while p.peek() != ")":
                items.append(self.operand(sc))
                if p.peek() == ",":
                    p.next()
            p.next()
            return Vec(tuple(items))
        elif t == "!":
            p.next()
            return Not(self.operand(sc))
        elif t == "-":
            p.next()
            o = self.operand(sc)
            if isinstance(o, Imm):
                if o.fbits:
                    return Imm(o.value ^ (1 << (o.fbits - 1)), o.fbits)
                return Imm(-o.value)
            return Neg(o)
        elif p.kind() == "num":
            o = parse_number(p.next())
        else:
            p.next()
            if t == "_":
                o = SINK
            else:
                o = sc.find(t)
                if o is None:
                    o = self.params.get(t)
                if o is None:
                    o = Special(t) if t.startswith("%") or t == "WARP_SZ" else Label(t)
        if p.peek() == "|":
            p.next()
            return Pair(o, self.operand(sc))
        return o

    # ------------------------------------------------------------ calls are inlined
    def call(self, sc, op, pred, line, depth):
        p = self.p
        rets = self.operand(sc) if p.peek() == "(" else Vec(())
        if p.peek() == ",":
            p.next()
        name = p.next()
        args = Vec(())
        if p.peek() == ",":
            p.next()
            args = self.operand(sc)
        while p.next() != ";":
            pass
        text = f"{op} {name}"
        if name in ("vprintf", "__assertfail", "__assert_fail"):
            self.code.append(Ins(f"$call.{name}", list(args.items), pred, line, text, loc=self.loc, scope=sc))
            return
        if name not in p.funcs or p.funcs[name][0] is None:
            self.code.append(Ins(f"$call.{name}", [], pred, line, text, loc=self.loc, scope=sc))
            return
        if depth > 16:
            raise Unsupported(f"line {line}: recursive call of {name}")
        pos, fr, fa = p.funcs[name]
        inner = Scope(p.mod_scope)
        for formal, actual in list(zip(fr, rets.items, strict=False)) + list(zip(fa, args.items, strict=False)):
            if not isinstance(actual, (Var, Reg)):
                raise Unsupported(f"line {line}: call argument {actual}")
            inner.names[formal[0]] = actual
        # @p call: jump over the inlined body when the predicate is false
        end = f"$ret{len(self.code)}"
        sc.labels[end] = -1
        if pred is not None:
            self.code.append(Ins("bra", [Label(end)], (pred[0], not pred[1]), line, text, loc=self.loc, scope=sc))
        saved = (p.i, self.return_label, self.loc)
        inner_top = Scope(inner)
        inner_top.labels[end] = -1
        self.return_label = end
        self.emit_body(pos, inner_top, depth + 1)
        p.i, self.return_label, self.loc = saved
        inner_top.labels[end] = sc.labels[end] = len(self.code)
