"""Layers: gated MLPs under masks or cut to size, attention with fewer heads, and 2:4 sparse linears."""

from persona_pruner.nn.heads import attentions, cut_heads_, group_cost, head_groups, heads_watched
from persona_pruner.nn.mlp import MaskedMLP, ffn_bytes, masked, slim_, slim_copy
from persona_pruner.nn.sparse import SparseLinear24, SparsifyReport, input_norms, sparsify_, weights

__all__ = [
    "MaskedMLP",
    "SparseLinear24",
    "SparsifyReport",
    "attentions",
    "cut_heads_",
    "ffn_bytes",
    "group_cost",
    "head_groups",
    "heads_watched",
    "input_norms",
    "masked",
    "slim_",
    "slim_copy",
    "sparsify_",
    "weights",
]
