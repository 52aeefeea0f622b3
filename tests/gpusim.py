"""Runs the GPU ops without a GPU, on CPU tensors.

`SimModule` stands in for `persona_pruner._cuda`: it takes the same calls with the same integers and executes the PTX of
csrc/cuda/<op>.cu in ptxsim. `SimJit` stands in for a function under @triton.jit: it compiles for the arguments of the
call, as Triton does, and executes that PTX. So the code under test is the code that ships: the packing, the choice of
kernel and the launch in Python, and the kernels themselves.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from ptxsim import Module, compile_triton

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which(os.environ.get("NVCC", "nvcc"))


def nvcc(source: Path, output: Path, arch: str, *options: str) -> str:
    """Compile a .cu file of this repository; returns what nvcc printed."""
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_paths()["include"], ROOT / "csrc"]
    command = [NVCC, f"-arch=sm_{arch}", "-O3", "-std=c++17", "-DPP_MODULE=_cuda", *options]
    command += [*(f"-I{d}" for d in includes), source, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source}:\n{done.stderr}")
    return done.stdout + done.stderr


def ptx(op: str, arch: str = "80") -> Path:
    """The PTX of csrc/cuda/<op>.cu; kept in build/ptx under a hash of every file in csrc/cuda."""
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "csrc" / "cuda").iterdir()))
    version = subprocess.run([NVCC, "--version"], capture_output=True).stdout
    name = f"{op}_{arch}_{hashlib.sha256(text + version).hexdigest()[:16]}.ptx"
    cached = ROOT / "build" / "ptx" / name
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}")
        nvcc(ROOT / "csrc" / "cuda" / f"{op}.cu", partial, arch, "-lineinfo", "-ptx")
        partial.rename(cached)
    return cached


@functools.cache
def ptx_module(op: str) -> Module:
    return Module(ptx(op).read_text())


def memory(address: int, size: int) -> np.ndarray | None:
    """The `size` bytes at a tensor's data_ptr."""
    if address == 0:
        return None
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)) if size else np.zeros(0, np.uint8)


class SimModule:
    """`checks` go to ptxsim's launch; `stats` keeps (kernel, Stats) of every launch."""

    def __init__(self, ptx=None, **checks):
        self.ptx = ptx
        self.checks = {"races": True, "uninit": True, **checks}
        self.stats = []

    def launch(self, op, kernel, grid, threads, shared, args):
        module = self.ptx or ptx_module(op)
        stats = module.launch(f"{op}_{kernel}", grid, threads, args, shared_bytes=shared, **self.checks)
        self.stats.append((kernel, stats))

    # ---- linear24

    def linear24_kernels(self):
        return Same()

    def linear24(
        self,
        kernel,
        grid,
        threads,
        shared,
        w,
        x,
        y,
        bias,
        row_scale,
        token_scale,
        partial,
        count,
        m,
        n,
        row_bytes,
        kind,
        device,
        stream,
    ):
        row_blocks, blocks = -(-n // 64), -(-row_bytes // 128)
        splits, size = grid[2] if "prefill" in kernel else grid[1], (4, 2, 2)[kind]
        buffers = [memory(w, row_blocks * blocks * (5120 if "_i8_" in kernel else 4608)), memory(x, m * row_bytes)]
        buffers += [memory(y, m * n * size), memory(bias, n * size)]
        buffers += [memory(row_scale, 4 * n), memory(token_scale, 4 * m)]
        buffers += [memory(partial, splits * m * row_blocks * 256), memory(count, 4 * 4096)]
        self.launch("linear24", kernel, grid, threads, shared, [*buffers, m, n, row_bytes, kind])

    def linear24_quantize(self, kernel, x, q, scale, m, cols, row_bytes, device, stream):
        size = 4 if kernel.endswith("f32") else 2
        buffers = [memory(x, m * cols * size), memory(q, m * row_bytes), memory(scale, 4 * m)]
        self.launch("linear24", kernel, m, 256, 0, [*buffers, cols, row_bytes])

    # ---- select24

    def select24_kernels(self):
        return Same()

    def select24(self, kernel, blocks, weight, scale, values, meta, nan, rows, cols, device, stream):
        size = 4 if kernel.startswith("f32") else 2
        buffers = [memory(weight, rows * cols * size), memory(scale, 4 * cols), memory(values, rows * cols // 2 * size)]
        buffers += [memory(meta, rows * ((cols + 7) // 8)), memory(nan, 4)]
        self.launch("select24", kernel, blocks, 256, 0, [*buffers, rows, cols])


class Same(dict):
    """A kernel table whose index of a kernel is its name."""

    def __missing__(self, key):
        return key


TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}
TRITON_TYPES |= {torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}


def specialise(fn, args, constants):
    """As @triton.jit does for a call: (signature, constants, attributes, the arguments that stay arguments).

    A 1 or None becomes a constant, and a pointer or integer that 16 divides is marked so.
    """
    signature, attributes, kept, constants = {}, {}, [], dict(constants)
    fixed = {fn.arg_names[i] if isinstance(i, int) else i for i in fn.do_not_specialize}
    for index, (name, arg) in enumerate(zip(fn.arg_names, args, strict=False)):
        if arg is None or (isinstance(arg, int) and arg == 1 and name not in fixed):
            constants[name] = arg
            continue
        pointer = isinstance(arg, torch.Tensor)
        signature[name] = f"*{TRITON_TYPES[arg.dtype]}" if pointer else "i32"
        if (arg.data_ptr() if pointer else arg) % 16 == 0 and name not in fixed:
            attributes[(index,)] = [["tt.divisibility", 16]]
        kept.append(arg)
    signature = {name: signature.get(name, "constexpr") for name in fn.arg_names}
    return signature, constants, attributes, kept


def whole(arg):
    """A tensor with gaps as the simulator takes it: the bytes of its storage, and where in them it begins."""
    if not isinstance(arg, torch.Tensor) or arg.is_contiguous():
        return arg
    storage = torch.empty(0, dtype=torch.uint8).set_(arg.untyped_storage())
    return storage.numpy(), arg.storage_offset() * arg.itemsize


class SimJit:
    """`SimJit(fn)[grid](...)` for a @triton.jit function `fn`; `checks` as for SimModule."""

    def __init__(self, fn, **checks):
        self.fn, self.stats, self.checks = fn, [], {"races": True, "uninit": True, **checks}

    def __getitem__(self, grid):
        return functools.partial(self.run, grid)

    def run(self, grid, *args, num_warps=4, num_stages=3, **constants):
        signature, constants, attributes, kept = specialise(self.fn, args, constants)
        options = {"attrs": attributes, "num_warps": num_warps, "num_stages": num_stages}
        kernel = compile_triton(self.fn, signature, constants, 80, **options)
        self.stats.append(kernel.launch(grid, [whole(arg) for arg in kept], **self.checks))


@contextmanager
def poisoned():
    """New tensors hold NaN until they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def recorded(kernels):
    """The launches that a module of kernels/ would do in this block, as a list of (function, arguments, options)."""
    import triton

    calls = []
    found = {name: value for name, value in vars(kernels).items() if isinstance(value, triton.JITFunction)}
    try:
        for name, fn in found.items():
            setattr(kernels, name, Recorder(fn, calls))
        yield calls
    finally:
        for name, fn in found.items():
            setattr(kernels, name, fn)


class Recorder:
    def __init__(self, fn, calls):
        self.fn, self.calls = fn, calls

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((self.fn, args, options))


def triton_compile(fn, args, options, target: str):
    """Triton's compiled kernel for a recorded launch; target '80' .. '120' or an AMD name such as 'gfx942'."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in options.items() if name in fn.arg_names}
    options = {name: value for name, value in options.items() if name not in fn.arg_names}
    signature, constants, attributes, _ = specialise(fn, args, constants)
    device = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target), 32)
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=device, options=options)
