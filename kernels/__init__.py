"""Triton kernels, one file an op, installed as `persona_pruner.kernels`.

Kernels take pointers, sizes and strides; checks, choice of backend and allocation live in
`persona_pruner.ops`. Nothing here touches a device while being imported.
"""

if __name__ == "kernels":
    raise ImportError("these kernels are `persona_pruner.kernels`; the repository root must not be on sys.path")
