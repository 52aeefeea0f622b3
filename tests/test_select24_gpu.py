"""select24 on a GPU: every CUDA and Triton kernel, its PTX executed where there is no GPU, itself where there is one.

Values and metadata must equal the reference bit for bit.
"""

import importlib
import os
import subprocess
import sys

import gpusim
import pytest
import torch

from persona_pruner.errors import InputError
from persona_pruner.ops import _native, select24

op = importlib.import_module("persona_pruner.ops.select24")

INTERPRETING = _native.interpreting()
needs_nvcc = pytest.mark.skipif(gpusim.NVCC is None or INTERPRETING, reason="nvcc is not installed")
needs_triton = pytest.mark.skipif(
    isinstance(_native.triton_kernels("select24"), str) or INTERPRETING, reason="triton is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
BITS = {2: torch.int16, 4: torch.int32}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# K % 8 == 4 leaves half a byte over; 2052 and 4104 are more than one block of threads; 257 rows end inside a block.
SHAPES = [(1, 4), (3, 12), (257, 8), (33, 136), (5, 2052), (2, 4104)]


def random_weight(rows, cols, dtype, seed=0):
    """Few distinct magnitudes, so that ties are everywhere, with both zeros and an infinity."""
    generator = torch.Generator().manual_seed(seed + rows + cols)
    weight = torch.randint(-3, 4, (rows, cols), generator=generator).to(dtype)
    weight[weight == 0] = -0.0
    weight.view(-1)[torch.randperm(weight.numel(), generator=generator)[: weight.numel() // 8]] = 0.0
    weight[rows // 2, cols // 2] = float("-inf")
    scale = torch.randint(1, 4, (cols,), generator=generator).float() / 2
    return weight, scale


def assert_same(got, weight, scale):
    values, meta = op.reference(weight, scale)
    bits = BITS[weight.element_size()]
    assert torch.equal(got[0].cpu().view(bits), values.view(bits)) and torch.equal(got[1].cpu(), meta)


def simulate(weight, scale, **checks):
    """The CUDA backend simulated, outputs poisoned; returns (values, meta), the NaN flag, (kernel, stats)."""
    rows, cols = weight.shape
    values = torch.full((rows, cols // 2), float("nan"), dtype=weight.dtype)
    meta, nan = torch.full((rows, (cols + 7) // 8), 0xEE, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    module = gpusim.SimModule(**checks)
    op.launch(module, weight, op.NATIVE[weight.dtype], scale, values, meta, nan, 0, 0)
    return (values, meta), bool(nan), module.stats[0]


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_cuda(rows, cols, dtype):
    weight, scale = random_weight(rows, cols, dtype)
    for s in (scale, None):
        got, nan, (kernel, _) = simulate(weight, s, order="shuffle")
        assert_same(got, weight, s)
        assert not nan and kernel.endswith("_2") == (cols % 8 == 0 and dtype != torch.float32)


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_takes_views_at_odd_offsets(dtype):
    for offset in (1, 4):
        weight, scale = random_weight(7, 24, dtype)
        flat = torch.cat([torch.zeros(offset, dtype=dtype), weight.flatten()])
        scales = torch.cat([torch.zeros(1), scale])
        assert_same(simulate(flat[offset:].view(7, 24), scales[1:])[0], weight, scale)


@needs_nvcc
@pytest.mark.parametrize("where", [(0, 0), (2, 5), (3, 11)])
def test_cuda_reports_nan(where):
    weight, scale = random_weight(4, 12, torch.bfloat16)
    weight[where] = float("nan")
    assert simulate(weight, scale)[1]
    weight[where], scale[where[1]] = float("inf"), 0.0
    assert simulate(weight, scale)[1]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_ptx(dtype, monkeypatch):
    kernels = _native.triton_kernels("select24")
    monkeypatch.setattr(kernels, "_select", gpusim.SimJit(kernels._select))
    run = op._gpu(op._triton_select)
    for rows, cols in [(5, 2052), (33, 136)]:
        weight, scale = random_weight(rows, cols, dtype)
        assert_same(run(weight, scale), weight, scale)
    weight[3, 5] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        run(weight, scale)


@pytest.mark.skipif(not INTERPRETING, reason="test_triton_in_the_interpreter runs this with TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_interpreted(rows, cols, dtype):
    weight, scale = random_weight(rows, cols, dtype)
    assert_same(select24(weight, scale, backend="triton"), weight, scale)
    assert_same(select24(weight, backend="triton"), weight, None)
    weight[0, 1] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        select24(weight, backend="triton")


@needs_triton
def test_triton_in_the_interpreter():
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@needs_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_on_a_gpu(rows, cols, dtype, backend):
    weight, scale = random_weight(rows, cols, dtype)
    assert_same(select24(weight.cuda(), scale.cuda(), backend=backend), weight, scale)
    weight[0, 2] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        select24(weight.cuda(), backend=backend)
