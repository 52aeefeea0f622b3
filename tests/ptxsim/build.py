"""Compile CUDA C++ (nvcc) and Triton kernels to PTX."""

import os
import shutil
import subprocess
import tempfile

from .errors import PtxError
from .launch import Module, dim3

NVCC = os.environ.get("NVCC") or shutil.which("nvcc") or "nvcc"


def compile_cuda(src, arch="sm_80", flags=("-O3", "-lineinfo", "-std=c++17")):
    """src: path of a .cu file, or CUDA source text. Returns PTX text."""
    with tempfile.TemporaryDirectory() as d:
        if "\n" in str(src) or "{" in str(src):
            path = os.path.join(d, "kernel.cu")
            with open(path, "w") as f:
                f.write(src)
        else:
            path = str(src)
        out = os.path.join(d, "kernel.ptx")
        r = subprocess.run([NVCC, f"-arch={arch}", *flags, "-ptx", path, "-o", out], capture_output=True, text=True)
        if r.returncode:
            raise PtxError(f"nvcc failed:\n{r.stderr}")
        with open(out) as f:
            return f.read()


class TritonKernel:
    """PTX of a Triton kernel with the launch facts needed to run it."""

    def __init__(self, compiled):
        self.ptx = compiled.asm["ptx"]
        self.ttgir = compiled.asm.get("ttgir")
        md = compiled.metadata
        self.name, self.num_warps, self.shared = md.name, md.num_warps, md.shared
        self.module = Module(self.ptx)

    def launch(self, grid, args, **kw):
        """args: the non-constexpr arguments in order. Triton's scratch pointers are added as null."""
        K, _ = self.module.compiled(self.name)
        args = list(args) + [None] * (len(K.params) - len(args))
        return self.module.launch(self.name, dim3(grid), 32 * self.num_warps, args, shared_bytes=self.shared, **kw)


def compile_triton(fn, signature, constexprs=None, arch=80, num_warps=4, num_stages=3, attrs=None, **options):
    """fn: @triton.jit function; signature: {"x_ptr": "*fp16", "n": "i32", "BLOCK": "constexpr"}.

    attrs: {(arg index,): [["tt.divisibility", 16]]} as Triton's own specialisation would add
    (that is what turns loads into vector loads and cp.async); "auto" marks every pointer
    and i32 argument divisible by 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(signature)
    constexprs = dict(constexprs or {})
    if attrs == "auto":
        attrs = {
            (i,): [["tt.divisibility", 16]]
            for i, k in enumerate(names)
            if signature[k] != "constexpr" and (signature[k].startswith("*") or signature[k] == "i32")
        }
    sig = dict(signature)
    for k in constexprs:
        sig.setdefault(k, "constexpr")
    src = ASTSource(fn=fn, signature=sig, constexprs=constexprs, attrs=attrs)
    c = triton.compile(
        src,
        target=GPUTarget("cuda", int(arch), 32),
        options=dict(num_warps=num_warps, num_stages=num_stages, **options),
    )
    return TritonKernel(c)
