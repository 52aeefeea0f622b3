"""The ops: one module each with the formula, the reference in plain PyTorch, and the choice of backend."""

from persona_pruner.ops import importance
from persona_pruner.ops.importance import column_sqnorm_, masked_swiglu

OPS = (*importance.OPS,)

__all__ = ["OPS", "column_sqnorm_", "masked_swiglu"]
