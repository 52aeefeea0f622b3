"""The ops: one module each with the formula, the reference in plain PyTorch, and the choice of backend."""

from persona_pruner.ops import importance
from persona_pruner.ops.importance import column_sqnorm_, masked_swiglu
from persona_pruner.ops.linear24 import OP as linear24_op
from persona_pruner.ops.linear24 import Packed24, bind24, check24, linear24, pack_linear24, quantize24, unpack24
from persona_pruner.ops.select24 import OP as select24_op
from persona_pruner.ops.select24 import select24

OPS = (*importance.OPS, linear24_op, select24_op)

__all__ = [
    "OPS",
    "Packed24",
    "bind24",
    "check24",
    "column_sqnorm_",
    "linear24",
    "masked_swiglu",
    "pack_linear24",
    "quantize24",
    "select24",
    "unpack24",
]
