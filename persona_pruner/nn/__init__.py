"""Layers: gated MLPs under masks or cut to size."""

from persona_pruner.nn.mlp import MaskedMLP, ffn_bytes, masked, replaced_down, slim_

__all__ = ["MaskedMLP", "ffn_bytes", "masked", "replaced_down", "slim_"]
