"""The ops: one module each with the formula, the reference in plain PyTorch, and the choice of backend."""

from persona_pruner.ops.importance import column_sqnorm_, masked_swiglu

__all__ = ["column_sqnorm_", "masked_swiglu"]
