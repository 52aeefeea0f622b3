"""The GPU kernels of masked_swiglu and column_sqnorm_ on a machine without a GPU.

CUDA (compiled by nvcc) and Triton kernels are run from their PTX in the simulator of tests/ptxsim, with its checks for
races, bounds and unwritten shared memory; their machine code is searched for spills and 16-byte accesses.
"""

import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

from persona_pruner.ops import _native, importance

ptxsim = pytest.importorskip("ptxsim", reason="tests/ptxsim is not there")
if _native.interpreting():
    pytest.skip("Triton is being interpreted, so it cannot compile", allow_module_level=True)

CSRC = Path(__file__).parents[1] / "csrc" / "cuda"
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
ACTS = importance.ACTS
CUDA_TYPES = {
    torch.float32: ("float", "f"),
    torch.bfloat16: ("__nv_bfloat16", "13__nv_bfloat16"),
    torch.float16: ("__half", "6__half"),
}
TRITON_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
CHECKS = {"races": True, "uninit": True}
SHAPES = [
    (3, 16, True),
    (70, 136, True),
    (67, 136, False),
    (65, 37, True),
    (130, 300, False),
]  # tokens, channels, halves


def bind(x):
    """A tensor as the simulator takes it: the bytes of its storage and an offset; None is a null pointer."""
    if not isinstance(x, torch.Tensor):
        return x
    storage = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    return storage.numpy(), x.storage_offset() * x.itemsize


def data(tokens, channels, halves, dtype):
    torch.manual_seed(tokens)
    gate, up = torch.randn(tokens, 2 * channels).mul(3).to(dtype).chunk(2, -1)
    if not halves:
        gate, up = gate.contiguous(), up.contiguous()
    return gate, up, torch.rand(channels).round(), torch.randn(tokens, channels).to(dtype)


def unwritten(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def reference(gate, up, mask, dh, act, dtype):
    """h, d_gate, d_up, d_mask, taylor, fisher (which begin at 1) and square sums of gate in `dtype` arithmetic."""
    gate, up, mask, dh = (x.to(dtype) for x in (gate, up, mask, dh))
    wide = mask.to(torch.promote_types(dtype, torch.float32))
    taylor, fisher, norms = (torch.ones_like(wide) for _ in range(3))
    h = importance._reference_forward(gate, up, wide, act)
    grads = importance._reference_backward(dh, gate, up, wide, act, (True, True, True), taylor, fisher)
    importance._reference_sqnorm(gate, norms)
    return h, *grads, taylor, fisher, norms


def check(got, gate, up, mask, dh, act):
    exact = reference(gate, up, mask, dh, act, torch.float64)
    peer = reference(gate, up, mask, dh, act, gate.dtype)
    for name, x, y, z in zip(
        ("h", "d_gate", "d_up", "d_mask", "taylor", "fisher", "norms"), got, peer, exact, strict=True
    ):
        error, allowed = ((v.double() - z).abs().max().item() for v in (x, y))
        assert error <= 2 * allowed + 2e-6 * z.abs().max().item(), f"{name}: {error:.3g}, reference {allowed:.3g}"


@pytest.fixture(scope="module")
def cuda_source():
    lines = ['#include "importance.cuh"', "using namespace pp::importance;"]
    for name, _ in CUDA_TYPES.values():
        for wide in (1, 4 if name == "float" else 8):
            kernels = [f"sqnorm<{name}, {wide}>"]
            kernels += [
                f"swiglu_{k}<{name}, {wide}, {act}>" for k in ("forward", "backward") for act in ("kSilu", "kGeluTanh")
            ]
            lines += [f"template __global__ decltype({k}) pp::importance::{k};" for k in kernels]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def cuda(cuda_source):
    """launch(kernel, dtype, 16-byte accesses?, act or None, grid, args) of the CUDA kernels in the simulator."""
    flags = ("-O3", "-lineinfo", "-std=c++17", f"-I{CSRC}")
    module = ptxsim.Module(ptxsim.compile_cuda(cuda_source, arch="sm_80", flags=flags))
    names = re.findall(r"\.entry (\w+)", module.ptx)

    def launch(kernel, dtype, wide, act, grid, args, **options):
        part = kernel
        if dtype is not None:
            part += f"I{CUDA_TYPES[dtype][1]}Li{16 // dtype.itemsize if wide else 1}E"
            part += f"LNS0_3ActE{ACTS.index(act)}E" if act else ""
        (name,) = (n for n in names if part in n)
        return module.launch(name, grid, 256, [bind(a) for a in args], **CHECKS, **options)

    return launch


def run_cuda(launch, gate, up, mask, dh, act):
    """What csrc/cuda/importance.cu does, with the simulator as the device."""
    (tokens, channels), dtype = gate.shape, gate.dtype
    strides = gate.stride(0), up.stride(0), channels
    offsets = gate.storage_offset(), up.storage_offset()
    wide = not any(n * dtype.itemsize % 16 for n in (*strides, *offsets))
    blocks = -(-tokens // importance.BLOCK)
    grid = -(-channels // 128) * blocks
    inputs = gate, gate.stride(0), up, up.stride(0), mask
    h, d_gate, d_up = (unwritten(tokens, channels, dtype=dtype) for _ in range(3))
    launch("swiglu_forward", dtype, wide, act, grid, [*inputs, h, tokens, channels])
    partial = unwritten(blocks, 2, channels)
    args = [dh, channels, *inputs, d_gate, d_up, partial, tokens, channels]
    launch("swiglu_backward", dtype, wide, act, grid, args, order="shuffle")
    d_mask, (taylor, fisher, norms) = unwritten(channels), (torch.ones(channels) for _ in range(3))
    launch("add_blocks", None, wide, None, -(-channels // 256), [partial, blocks, 2, channels, d_mask, taylor, fisher])
    partial = unwritten(blocks, 1, channels)
    launch("sqnorm", dtype, wide, None, grid, [gate, gate.stride(0), partial, tokens, channels])
    launch("add_blocks", None, wide, None, -(-channels // 256), [partial, blocks, 1, channels, None, norms, None])
    return h, d_gate, d_up, d_mask, taylor, fisher, norms


@needs_nvcc
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", CUDA_TYPES)
def test_cuda_in_the_simulator(cuda, dtype, act):
    for shape in SHAPES:
        inputs = data(*shape, dtype)
        check(run_cuda(cuda, *inputs, act), *inputs, act)


@needs_nvcc
def test_cuda_leaves_out_what_is_not_asked(cuda):
    gate, up, mask, dh = data(66, 136, True, torch.bfloat16)
    full = run_cuda(cuda, gate, up, mask, dh, "silu")
    d_up = unwritten(66, 136, dtype=torch.bfloat16)
    args = [dh, 136, gate, 272, up, 272, mask, None, d_up, None, 66, 136]
    cuda("swiglu_backward", torch.bfloat16, True, "silu", 4, args)
    assert torch.equal(d_up, full[2])


@needs_nvcc
def test_cuda_memory_traffic(cuda):
    """The least bytes in whole sectors, and no bank conflicts."""
    gate, up, mask, dh = data(64, 256, True, torch.bfloat16)
    h, d_gate, d_up = (unwritten(64, 256, dtype=torch.bfloat16) for _ in range(3))
    partial = unwritten(1, 2, 256)
    forward = [gate, 512, up, 512, mask, h, 64, 256]
    backward = [dh, 256, gate, 512, up, 512, mask, d_gate, d_up, partial, 64, 256]
    for kernel, args, read in (("forward", forward, 2), ("backward", backward, 3)):
        t = cuda(f"swiglu_{kernel}", torch.bfloat16, True, "silu", 2, args, traffic=True).traffic
        assert t.total.unique_read == 64 * 256 * 2 * read + 256 * 4
        for i in (0, 2, 4) if kernel == "backward" else (0, 2):
            load = t.arg(i).load
            assert load.efficiency == 1 and set(load.widths) == {16}
        for i in (7, 8) if kernel == "backward" else (5,):
            store = t.arg(i).store
            assert store.efficiency == 1 and set(store.widths) == {16} and t.arg(i).rewrite == 1
    assert t.shared_total.conflicts == 1


class Simulated:
    """Stands for a Triton kernel: fn[grid](...) compiles it as Triton would and runs the PTX in the simulator."""

    def __init__(self, fn, done):
        self.fn, self.done = fn, done

    def __getitem__(self, grid):
        def launch(*args, num_warps, **constants):
            signature, attrs, values = {}, {}, dict(constants)
            for i, (name, value) in enumerate(zip(self.fn.arg_names, args, strict=False)):
                tensor = isinstance(value, torch.Tensor)
                if value is None or (not tensor and value == 1):
                    signature[name], values[name] = "constexpr", value
                    continue
                signature[name] = TRITON_TYPES[value.dtype] if tensor else "i32"
                if (value.storage_offset() * value.itemsize if tensor else value) % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
            signature |= dict.fromkeys(constants, "constexpr")
            key = self.fn.__name__, *signature.items(), *sorted(attrs), *values.items()
            if key not in self.done:
                self.done[key] = ptxsim.compile_triton(self.fn, signature, values, 80, num_warps, attrs=attrs)
            free = [bind(v) for n, v in zip(self.fn.arg_names, args, strict=False) if signature[n] != "constexpr"]
            self.done[key].launch(grid, free, **CHECKS)

        return launch


@pytest.fixture(scope="module")
def compiled():
    return {}


@pytest.fixture
def triton_kernels(monkeypatch, compiled):
    kernels = _native.triton_kernels("importance")
    if isinstance(kernels, str):
        pytest.skip(kernels)
    for name in ("_forward", "_backward", "_sqnorm", "_add_blocks"):
        monkeypatch.setattr(kernels, name, Simulated(getattr(kernels, name), compiled))
    return kernels


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", TRITON_TYPES)
def test_triton_in_the_simulator(triton_kernels, dtype, act):
    for tokens, channels, halves in SHAPES[1:4]:
        gate, up, mask, dh = data(tokens, channels, halves, dtype)
        gelu, block = act == "gelu_tanh", importance.BLOCK
        h, d_gate, d_up = (unwritten(tokens, channels, dtype=dtype) for _ in range(3))
        triton_kernels.masked_swiglu_forward(gate, up, mask, h, gelu, block)
        partial = unwritten(-(-tokens // block), 2, channels)
        d_mask, (taylor, fisher, norms) = unwritten(channels), (torch.ones(channels) for _ in range(3))
        triton_kernels.masked_swiglu_backward(
            dh, gate, up, mask, d_gate, d_up, d_mask, partial, taylor, fisher, gelu, block
        )
        triton_kernels.column_sqnorm(gate, unwritten(-(-tokens // block), 1, channels), norms, block)
        check((h, d_gate, d_up, d_mask, taylor, fisher, norms), gate, up, mask, dh, act)


def disassemble(cubin: Path) -> dict[str, str]:
    """Machine code of each kernel, by the disassembler that comes with Triton."""
    backends = pytest.importorskip("triton.backends")
    tool = Path(backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump")
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return dict(zip(*[iter(re.split(r"Function : (\S+)", text)[1:])] * 2, strict=True))


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_cuda_machine_code(cuda_source, tmp_path, arch):
    source, cubin = tmp_path / "k.cu", tmp_path / "k.cubin"
    source.write_text(cuda_source)
    subprocess.run(
        ["nvcc", "-O3", "-std=c++17", f"-arch={arch}", f"-I{CSRC}", "-cubin", source, "-o", cubin], check=True
    )
    kernels = disassemble(cubin)
    assert len(kernels) == 31
    for name, code in kernels.items():
        assert not re.search(r"\b(STL|LDL)\b", code), f"{name} spills"
        if "Li4E" in name or "Li8E" in name:
            loads = {"swiglu_forward": 2, "swiglu_backward": 3, "sqnorm": 1}[
                re.search(r"swiglu_\w+ward|sqnorm", name)[0]
            ]
            assert code.count("LDG.E.128") >= loads, name
            assert "sqnorm" in name or "STG.E.128" in code, name


@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)])
def test_triton_compiles_ahead_of_time(tmp_path, target):
    """Every kernel for every architecture; on NVIDIA without spills and with 16-byte accesses."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = _native.triton_kernels("importance")
    tile = {"TILE": kernels.TILE, "ROWS": kernels.ROWS}
    block = tile | {"BLOCK": importance.BLOCK}
    all_outputs = {"GATE": True, "UP": True, "SCORES": True}
    jobs = [
        (kernels._forward, block | {"GELU": False}),
        (kernels._backward, block | {"GELU": True} | all_outputs),
        (kernels._sqnorm, block),
        (kernels._add_blocks, tile | {"SET": True, "ADD": True}),
    ]
    floats = {"mask", "partial", "target", "add"}
    for (fn, constants), kind in product(jobs, ("*bf16", "*fp32") if target[1] == 80 else ("*bf16",)):
        signature, attrs = {}, {}
        for i, name in enumerate(fn.arg_names):
            if name in constants:
                signature[name] = "constexpr"
                continue
            number = name.endswith("stride") or name in ("tokens", "channels", "blocks")
            signature[name] = "i32" if number else "*fp32" if name in floats else kind
            attrs[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
        binary = triton.compile(source, target=GPUTarget(*target), options={"num_warps": kernels.WARPS}).asm
        if target[0] == "hip":
            assert len(binary["hsaco"]) > 0 and ".vgpr_spill_count: 0" in binary["amdgcn"]
            continue
        cubin = tmp_path / "k.cubin"
        cubin.write_bytes(binary["cubin"])
        (code,) = disassemble(cubin).values()
        assert not re.search(r"\b(STL|LDL)\b", code), f"{fn.__name__} spills"
        if fn is not kernels._add_blocks:
            assert re.search(r"LDG\.E\S*\.128", code), f"{fn.__name__} has no 16-byte load"
