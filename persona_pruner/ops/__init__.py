"""The ops: one module each with the formula, the reference in plain PyTorch, and the choice of backend."""

from persona_pruner.ops import importance
from persona_pruner.ops.importance import column_sqnorm_, masked_swiglu
from persona_pruner.ops.linear24 import OP as linear24_op
from persona_pruner.ops.linear24 import Packed24, bind24, check24, linear24, pack_linear24, quantize24, unpack24
from persona_pruner.ops.norm_linear import OP as norm_linear_op
from persona_pruner.ops.norm_linear import norm_linear, rms_norm
from persona_pruner.ops.paged_attention import OP as paged_attention_op
from persona_pruner.ops.paged_attention import paged_attention_
from persona_pruner.ops.select24 import OP as select24_op
from persona_pruner.ops.select24 import select24
from persona_pruner.ops.subset_ffn import OP as subset_ffn_op
from persona_pruner.ops.subset_ffn import subset_ffn

OPS = (*importance.OPS, linear24_op, norm_linear_op, paged_attention_op, select24_op, subset_ffn_op)

__all__ = [
    "OPS",
    "Packed24",
    "bind24",
    "check24",
    "column_sqnorm_",
    "linear24",
    "masked_swiglu",
    "norm_linear",
    "norm_linear_op",
    "pack_linear24",
    "paged_attention_",
    "paged_attention_op",
    "quantize24",
    "rms_norm",
    "select24",
    "subset_ffn",
    "subset_ffn_op",
    "unpack24",
]
