"""PTX text to module variables and entry points; bodies are flattened on demand (flatten.py)."""

import re
import struct

from .errors import PtxError, Unsupported
from .flatten import FuncBuilder
from .isa import GLOBAL_BASE, LINKAGE, REDZONE, SIZES, VAR_SPACES, Kernel, Param, Scope, Var, parse_number

TOKEN = re.compile(
    r"""
    (?P<str>"(?:[^"\\]|\\.)*")
  | (?P<num>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?\b
        |\d+\.\d*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\d+U?)
  | (?P<word>[A-Za-z_$%.][\w$%.]*(?:::[\w.]+)*)
  | (?P<sym>[\[\]{}(),;:+\-|!@<>=*&^~?/])
  | (?P<ws>\s+)
""",
    re.X,
)


def _strip_comments(text):
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def tokenize(text):
    out, line, pos = [], 1, 0
    text = _strip_comments(text)
    n = len(text)
    while pos < n:
        m = TOKEN.match(text, pos)
        if not m:
            raise PtxError(f"line {line}: cannot tokenize {text[pos : pos + 30]!r}")
        kind, s = m.lastgroup, m.group(0)
        if kind == "ws":
            line += s.count("\n")
        else:
            out.append((kind, s, line))
        pos = m.end()
    out.append(("eof", "", line))
    return out


class Parser:
    def __init__(self, text):
        self.lines = text.split("\n")
        self.toks = tokenize(text)
        self.i = 0
        self.version = self.target = ""
        self.files = {}
        self.vars = {}  # module-level variables by name
        self.gsize = REDZONE  # bytes of global arena used by module variables
        self.funcs = {}  # name -> (token index of body, params, rets)
        self.entries = {}  # name -> token position
        self.mod_scope = Scope()
        self.relocs = []  # (var name, byte offset, symbol)
        self.module()

    # ------------------------------------------------------------ helpers
    def peek(self, k=0):
        return self.toks[self.i + k][1]

    def kind(self, k=0):
        return self.toks[self.i + k][0]

    def next(self):
        t = self.toks[self.i]
        self.i += 1
        return t[1]

    def line(self):
        return self.toks[self.i][2]

    def expect(self, s):
        t = self.next()
        if t != s:
            raise PtxError(f"line {self.toks[self.i - 1][2]}: expected {s!r}, got {t!r}")

    def skip_to_semicolon(self):
        while self.next() != ";":
            pass

    def skip_braces(self):
        depth = 0
        while True:
            t = self.next()
            if t == "{":
                depth += 1
            elif t == "}":
                depth -= 1
                if depth == 0:
                    return
            elif t == "":
                raise PtxError("unbalanced braces")

    # ------------------------------------------------------------ module level
    def module(self):
        while self.kind() != "eof":
            t = self.peek()
            if t == ".version":
                self.next()
                self.version = self.next()
            elif t == ".target":
                self.next()
                self.target = self.next()
                while self.peek() == ",":
                    self.next()
                    self.next()
            elif t == ".address_size":
                self.next()
                if self.next() != "64":
                    raise Unsupported("only .address_size 64")
            elif t == ".file":
                self.next()
                no = int(self.next())
                self.files[no] = self.next().strip('"')
                while self.peek() == ",":
                    self.next()
                    self.next()
            elif t == ".loc":
                self.loc()
            elif t == ".section":
                self.next()
                if self.peek() != "{":
                    self.next()
                self.skip_braces()
            elif t in (".pragma", ".alias"):
                self.skip_to_semicolon()
            elif t in LINKAGE:
                self.next()
            elif t == ".entry":
                self.next()
                self.entry_header()
            elif t == ".func":
                self.next()
                self.func_header()
            elif t in VAR_SPACES:
                self.variables(self.mod_scope, None, extern=self.peek(-1) == ".extern")
            elif t == ";":
                self.next()
            else:
                raise PtxError(f"line {self.line()}: unexpected {t!r} at module level")

    def loc(self):
        self.next()
        f, ln = self.next(), self.next()
        self.next()
        while self.peek() == ",":  # , function_name label{+n}, inlined_at file line col
            self.next()
            if self.next() == "inlined_at":
                self.i += 3
            else:
                self.next()
                if self.peek() == "+":
                    self.i += 2
        return int(f), int(ln)

    def entry_header(self):
        name = self.next()
        params = self.param_list() if self.peek() == "(" else []
        off, out = 0, []
        for pname, ty, size, align, arr in params:
            off = (off + align - 1) // align * align
            out.append(Param(pname, ty, size, align, off, arr))
            off += size
        attrs = {}
        while self.peek() != "{":
            t = self.next()
            if t == ";":
                return
            if t in (".maxntid", ".reqntid"):
                v = [int(self.next())]
                while self.peek() == ",":
                    self.next()
                    v.append(int(self.next()))
                attrs[t[1:]] = tuple(v + [1] * (3 - len(v)))
        self.entries[name] = (self.i, out, off, attrs)
        self.skip_braces()

    def func_header(self):
        rets = self.param_list() if self.peek() == "(" else []
        name = self.next()
        params = self.param_list() if self.peek() == "(" else []
        while self.peek() not in ("{", ";"):
            self.next()
        if self.peek() == ";":
            self.funcs.setdefault(name, (None, rets, params))
            self.next()
            return
        self.funcs[name] = (self.i, rets, params)
        self.skip_braces()

    def param_list(self):
        """( .param .u64 .ptr .global .align 1 name , .param .align 8 .b8 name[24] )"""
        self.expect("(")
        out = []
        while self.peek() != ")":
            t = self.next()
            if t == ",":
                continue
            if t not in (".param", ".reg"):
                raise PtxError(f"line {self.line()}: expected .param, got {t!r}")
            out.append(self.one_param())
        self.next()
        return out

    def one_param(self):
        ty, align = None, None
        while self.peek().startswith("."):
            t = self.next()
            if t == ".align":
                a = int(self.next())
                if ty is None:
                    align = a
            elif t == ".ptr":
                while self.peek() in (".global", ".shared", ".const", ".local", ".align"):
                    if self.next() == ".align":
                        self.next()
            elif t[1:] in SIZES:
                ty = t[1:]
        name = self.next()
        count, arr = 1, False
        while self.peek() == "[":
            self.next()
            arr = True
            count *= int(self.next()) if self.peek() != "]" else 0
            self.expect("]")
        size = SIZES[ty] * count
        return name, ty, size, max(align or 1, SIZES[ty]), arr

    # ------------------------------------------------------------ variables
    def variables(self, scope, fn, extern=False):
        """.shared .align 4 .b8 name[1024] {= {...}}, name2 ... ;"""
        space = VAR_SPACES[self.next()]
        align, ty, vec = 1, None, 1
        while self.peek().startswith(".") and self.kind() == "word":
            t = self.next()
            if t == ".align":
                align = int(self.next())
            elif t in (".v2", ".v4"):
                vec = int(t[2])
            elif t[1:] in SIZES:
                ty = t[1:]
            elif t.startswith(".attribute"):
                self.expect("(")
                while self.next() != ")":
                    pass
            else:
                raise Unsupported(f"line {self.line()}: variable attribute {t}")
        while True:
            name = self.next()
            count, unsized = vec, False
            while self.peek() == "[":
                self.next()
                if self.peek() == "]":
                    unsized = True
                else:
                    count *= parse_number(self.next()).value
                self.expect("]")
            size = SIZES[ty] * count
            a = max(align, SIZES[ty] * vec)
            init, relocs = b"", []
            if self.peek() == "=":
                self.next()
                init, relocs = self.initializer(ty)
                size = max(size, len(init))
            self.declare(scope, fn, name, space, size, a, init, relocs, extern, unsized)
            if self.peek() == ",":
                self.next()
                continue
            self.expect(";")
            return

    def initializer(self, ty):
        out, relocs = bytearray(), []
        sz = SIZES[ty]

        def item():
            t = self.next()
            neg = False
            if t == "-":
                neg, t = True, self.next()
            if re.match(r"\d", t):
                v = parse_number(t)
                if v.fbits or isinstance(v.value, float):
                    bits = v.value
                    if isinstance(bits, float):
                        bits = struct.unpack("<I" if sz == 4 else "<Q", struct.pack("<f" if sz == 4 else "<d", bits))[0]
                    if neg:
                        bits ^= 1 << (8 * sz - 1)
                    out.extend(bits.to_bytes(sz, "little"))
                else:
                    out.extend(((-v.value if neg else v.value) % (1 << (8 * sz))).to_bytes(sz, "little"))
            elif t == "generic":
                self.expect("(")
                relocs.append((len(out), self.next()))
                self.expect(")")
                out.extend(bytes(sz))
            else:
                relocs.append((len(out), t))
                out.extend(bytes(sz))

        def group():
            self.expect("{")
            while self.peek() != "}":
                if self.peek() == "{":
                    group()
                else:
                    item()
                if self.peek() == ",":
                    self.next()
            self.next()

        if self.peek() == "{":
            group()
        else:
            item()
        return bytes(out), relocs

    def declare(self, scope, fn, name, space, size, align, init, relocs, extern, unsized):
        if space in ("global", "const"):
            off = (self.gsize + 255) // 256 * 256
            self.gsize = off + size + REDZONE
            v = Var(name, "global", GLOBAL_BASE + off, size, init)
            self.vars[name] = v
            for o, sym in relocs:
                self.relocs.append((name, o, sym))
        elif space == "shared":
            v = Var(name, "shared", -1, -1 if (extern or unsized) else size)
            v.align = max(align, 16)
            if fn is None:
                self.vars[name] = v
            else:
                fn.add_shared(v)
        elif space in ("local", "param"):
            v = fn.add_local(name, size, align)
        scope.names[name] = v

    # ------------------------------------------------------------ function bodies
    def kernel(self, name):
        pos, params, nbytes, attrs = self.entries[name]
        fn = FuncBuilder(self, {p.name: p for p in params})
        fn.emit_body(pos, Scope(self.mod_scope), depth=0)
        code = fn.finish()
        return Kernel(
            name,
            params,
            nbytes,
            code,
            len(fn.reg_types),
            fn.reg_types,
            fn.shared,
            fn.dyn_offset,
            fn.local_bytes,
            fn.local_vars,
            attrs.get("maxntid"),
            attrs.get("reqntid"),
        )
