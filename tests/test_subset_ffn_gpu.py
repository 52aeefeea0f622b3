"""subset_ffn on a GPU: its Triton kernels, interpreted, compiled for every target, and their PTX executed.

The simulator checks bounds, races and reads of unwritten shared memory; the numbers are compared with float64.
PERSONA_PRUNER_SLOW=1 runs a larger grid.
"""

import importlib
import itertools
import os

import gpusim
import pytest
import torch
from decode_ops import KINDS, draw, ffn_case, run_tests, widened

from persona_pruner import ops
from persona_pruner.ops import _native
from persona_pruner.testing import assert_close_to_oracle

op = importlib.import_module("persona_pruner.ops.subset_ffn")  # the name in the package is the function
INTERPRETING = _native.interpreting()
needs_triton = pytest.mark.skipif(
    isinstance(_native.triton_kernels("subset_ffn"), str) or INTERPRETING, reason="triton is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
# width, hidden, rows of each segment (shares of the channels: half, all, none, a quarter)
SHAPES = [(70, 72, [1]), (200, 136, [3, 2, 4, 8]), (64, 64, [17, 0, 1]), (33, 36, [40])]
# weights, x, shape, act, whether dressed; widths over 256 are split
CASES = [
    (BF16, F32, SHAPES[0], "silu", True),
    (F32, F32, SHAPES[1], "gelu_tanh", False),
    (I8, F32, SHAPES[1], "silu", True),
    (F16, F16, SHAPES[2], "silu", False),
    (BF16, BF16, SHAPES[3], "silu", True),
    (F16, F32, SHAPES[3], "gelu_tanh", False),
    (BF16, F32, (600, 64, [1]), "silu", True),
]
if os.environ.get("PERSONA_PRUNER_SLOW"):
    CASES += [
        (kind, x, shape, act, dressed)
        for kind, shape, act, dressed in itertools.product(KINDS, SHAPES, ("silu", "gelu_tanh"), (False, True))
        for x in {F32, F32 if kind == I8 else kind}
    ]


def check(run, kind, x_type, shape, act, dressed, apart=False, device="cpu"):
    width, hidden, rows = shape
    weights, scales, exact, channels, segments, extra = ffn_case(width, hidden, rows, kind, dressed)
    if dressed:
        extra["residual"] = extra["residual"].to(x_type)
    x = draw(sum(rows), hidden).to(x_type)
    oracle = ops.subset_ffn(x.double(), *exact, channels, segments, act, backend="reference", **widened(extra))
    plain = [w.float() if s is None else w.float() * s[:, None] for w, s in zip(weights, scales, strict=True)]
    plain = [w.to(x_type) for w in plain]
    plain = torch_ffn(x, plain, channels, segments, act, extra)
    given = torch.stack(weights, 1).unbind(1) if apart else weights
    rest = extra.get("biases", op.NONE), extra.get("norm"), extra.get("eps", 0.0), extra.get("residual")
    got = run(x, given, channels, segments, act, scales, *rest)
    assert got.dtype == x_type
    assert_close_to_oracle(got, oracle, plain, 2e-6)
    return got


def torch_ffn(x, weights, channels, segments, act, extra):
    """What one would write, in the dtype of x throughout."""
    kind, row, parts = x.dtype, 0, []
    n = x if "norm" not in extra else op.rms_norm(x.float(), extra["norm"], extra["eps"]).to(kind)
    bg, bu, bd = (None if b is None else b.to(kind) for b in extra.get("biases", op.NONE))
    for rows, first, count in segments.tolist():
        c = channels[first : first + count].long()
        gate, up = (
            torch.nn.functional.linear(n[row : row + rows], w[c], None if b is None else b[c])
            for w, b in zip(weights, (bg, bu), strict=False)
        )
        gate = torch.nn.functional.silu(gate) if act == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
        parts.append((gate * up) @ weights[2][c])
        row += rows
    y = torch.cat(parts)
    for term in (bd, extra.get("residual")):
        y = y if term is None else y + term
    return y


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).removeprefix("torch.") for part in case))
def test_triton_ptx(case, monkeypatch):
    kernels = _native.triton_kernels("subset_ffn")
    simulated = {name: gpusim.SimJit(getattr(kernels, name)) for name in ("_hidden", "_down")}
    for name, kernel in simulated.items():
        monkeypatch.setattr(kernels, name, kernel)
    with gpusim.poisoned():
        got = check(op._triton_run, *case)
        assert [len(kernel.stats) for kernel in simulated.values()] == [1, 1]
        assert torch.equal(check(op._triton_run, *case, apart=True), got)


def test_the_launch_covers_every_row_once():
    segments = torch.tensor([[3, 0, 7], [0, 7, 2], [40, 2, 5], [16, 0, 0]])
    tiles = op._tiles(segments, 16).tolist()
    assert tiles == [[0, 3, 0, 7], [3, 16, 2, 5], [19, 16, 2, 5], [35, 8, 2, 5], [43, 16, 0, 0]]
    assert op._tiles(segments[:0], 16).shape == (0, 4)


@needs_triton
def test_channels_are_split_where_rows_are_few():
    kernels = _native.triton_kernels("subset_ffn")
    assert kernels.splits(1, 64, 300, 4) == 2 and kernels.splits(1, 576, 768, 132) == 6
    assert kernels.splits(40, 576, 768, 132) == 1 and kernels.splits(1, 64, 8, 132) == 1


@needs_triton
@pytest.mark.parametrize("target", ["80", "90", "100", "gfx942"])
def test_triton_compiles_ahead_of_time(target):
    """Without spilled registers, with tensor cores where the types have them."""
    gpu_check = importlib.import_module("persona_pruner.benchmarks.gpu_check")
    kernels = _native.triton_kernels("subset_ffn")
    with gpusim.recorded(kernels) as calls:
        labels = list(gpu_check.subset_ffn_triton(kernels))
    assert len(calls) == 2 * len(labels)
    for number, (function, args, options) in enumerate(calls):
        found = gpu_check.triton_inspect(gpusim.triton_compile(function, args, options, target))
        assert not found["spills"], (function.__name__, labels[number // 2])
        if "x bfloat16" in labels[number // 2]:
            assert found["mma"], (function.__name__, labels[number // 2])


@pytest.mark.skipif(not INTERPRETING, reason="test_triton_in_the_interpreter runs this with TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted(kind):
    def run(*args):
        x, weights, channels, segments, act, scales, biases, norm, eps, residual = args
        extra = {"scales": scales, "biases": biases, "norm": norm, "eps": eps, "residual": residual}
        return ops.subset_ffn(x, *weights, channels, segments, act, backend="triton", **extra)

    for shape, act, dressed in zip(SHAPES, ("silu", "gelu_tanh") * 2, (True, False, False, True), strict=True):
        check(run, kind, F32, shape, act, dressed)


@pytest.mark.skipif(not INTERPRETING, reason="test_triton_in_the_interpreter runs this with TRITON_INTERPRET=1")
def test_interpreted_nan_and_infinity():
    """As in plain PyTorch: in their own row, and act(-inf) is NaN where an Inf of x gives one."""
    weights, _, _, channels, segments, _ = ffn_case(64, 32, [3, 2], F32, False)
    x = draw(5, 32)
    want = ops.subset_ffn(x, *weights, channels, segments, backend="triton")
    x[1, 4], x[3, 7] = torch.nan, torch.inf
    got = ops.subset_ffn(x, *weights, channels, segments, backend="triton")
    assert torch.equal(got[[0, 2, 4]], want[[0, 2, 4]]) and not got[[1, 3]].isfinite().any()


@needs_triton
def test_triton_in_the_interpreter():
    run_tests(__file__, ["test_interpreted"], TRITON_INTERPRET="1")


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_on_the_gpu(case):
    def run(*args):
        moved = [op_device(arg) for arg in args]
        moved[3] = args[3]  # segments stay on the CPU
        return op._triton_run(*moved).cpu()

    def op_device(value):
        if isinstance(value, torch.Tensor):
            return value.cuda()
        return [op_device(v) for v in value] if isinstance(value, list | tuple) else value

    check(run, *case)
