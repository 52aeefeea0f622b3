"""The ops: one module each with the formula, the reference in plain PyTorch, and the choice of backend."""

from persona_pruner.ops.linear24 import Packed24, check24, linear24, pack_linear24, quantize24, unpack24
from persona_pruner.ops.select24 import select24

__all__ = ["Packed24", "check24", "linear24", "pack_linear24", "quantize24", "select24", "unpack24"]
