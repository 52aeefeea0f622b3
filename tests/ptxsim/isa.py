"""What the other modules share: address spaces, type sizes, operands, instructions, kernels."""

from dataclasses import dataclass

import numpy as np

GLOBAL_BASE = 0x7000_0000_0000  # virtual address of byte 0 of the global arena
SHARED_BASE = 0x7F00_0000_0000  # generic window of shared memory
LOCAL_BASE = 0x7F80_0000_0000  # generic window of local memory
SHARED_START = 1024  # first usable shared offset (null stays invalid)
LOCAL_START = 64
REDZONE = 256

SIZES = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "f32x2": 8,
    "pred": 1,
    "b128": 16,
}
STORAGE = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}

LINKAGE = {".visible", ".extern", ".weak", ".common", ".hidden"}
VAR_SPACES = {".global": "global", ".const": "const", ".shared": "shared", ".local": "local", ".param": "param"}


# ---------------------------------------------------------------- operands
@dataclass(frozen=True)
class Reg:
    slot: int
    type: str
    name: str

    @property
    def storage(self):
        return np.dtype(bool) if self.type == "pred" else STORAGE[SIZES[self.type]]


@dataclass(frozen=True)
class Imm:
    value: object  # int, or float for decimal literals
    fbits: int = 0  # 32/64 when written 0f.. / 0d.. (value is then the bit pattern)


@dataclass(frozen=True)
class Sym:
    """Address of a variable: its space and absolute address inside that space."""

    name: str
    space: str
    addr: int


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Addr:
    base: object  # Reg, Sym, Imm
    off: int
    coords: tuple = ()  # tensor coordinates ([map, {c0, c1}])


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Not:
    op: object


@dataclass(frozen=True)
class Neg:
    op: object


@dataclass(frozen=True)
class Pair:
    a: object
    b: object


@dataclass(frozen=True)
class Label:
    name: str


class Sink:
    def __repr__(self):
        return "_"


SINK = Sink()


@dataclass
class Ins:
    op: str
    operands: list
    pred: object  # None or (Reg, negated)
    line: int
    text: str
    pc: int = -1
    target: int = -1  # branch target pc
    targets: list = None  # brx
    loc: str = ""
    scope: object = None

    @property
    def parts(self):
        return self.op.split(".")


@dataclass
class Param:
    name: str
    type: str
    size: int
    align: int
    offset: int
    is_array: bool


@dataclass
class Kernel:
    name: str
    params: list
    param_bytes: int
    code: list
    nregs: int
    reg_types: list
    static_shared: list  # (name, offset, size)
    dyn_offset: int  # where extern shared starts
    local_bytes: int
    local_vars: list
    maxntid: tuple = None
    reqntid: tuple = None


@dataclass
class Var:
    name: str
    space: str
    addr: int
    size: int
    init: bytes = b""


class Scope:
    def __init__(self, parent=None):
        self.parent, self.names, self.labels = parent, {}, {}

    def find(self, name):
        s = self
        while s is not None:
            if name in s.names:
                return s.names[name]
            s = s.parent
        return None

    def find_label(self, name):
        s = self
        while s is not None:
            if name in s.labels:
                return s.labels[name]
            s = s.parent
        return None


def parse_number(s):
    if s[:2] in ("0f", "0F"):
        return Imm(int(s[2:], 16), 32)
    if s[:2] in ("0d", "0D"):
        return Imm(int(s[2:], 16), 64)
    t = s.rstrip("U")
    if t[:2] in ("0x", "0X"):
        return Imm(int(t, 16))
    if t[:2] in ("0b", "0B"):
        return Imm(int(t, 2))
    if "." in t or "e" in t or "E" in t:
        return Imm(float(t))
    if len(t) > 1 and t[0] == "0":
        return Imm(int(t, 8))
    return Imm(int(t))
