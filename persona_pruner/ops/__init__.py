"""The ops: one module each with the formula, the reference in plain PyTorch, and the choice of backend."""
