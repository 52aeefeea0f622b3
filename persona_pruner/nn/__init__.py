"""Layers: gated MLPs under masks or cut to size, and 2:4 sparse linears."""

from persona_pruner.nn.mlp import MaskedMLP, ffn_bytes, masked, replaced_down, slim_
from persona_pruner.nn.sparse import SparseLinear24, SparsifyReport, input_norms, sparsify_

__all__ = [
    "MaskedMLP",
    "SparseLinear24",
    "SparsifyReport",
    "ffn_bytes",
    "input_norms",
    "masked",
    "replaced_down",
    "slim_",
    "sparsify_",
]
