"""Layers: gated MLPs under masks or cut to size, and 2:4 sparse linears."""

from persona_pruner.nn.mlp import MaskedMLP, ffn_bytes, masked, slim_, slim_copy
from persona_pruner.nn.sparse import SparseLinear24, SparsifyReport, input_norms, sparsify_, weights

__all__ = [
    "MaskedMLP",
    "SparseLinear24",
    "SparsifyReport",
    "ffn_bytes",
    "input_norms",
    "masked",
    "slim_",
    "slim_copy",
    "sparsify_",
    "weights",
]
