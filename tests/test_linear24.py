"""linear24, select24 and unpack24 on the CPU: the reference against float64, the C++ kernels against the reference."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from persona_pruner import ops
from persona_pruner.errors import InputError
from persona_pruner.ops import _native
from persona_pruner.ops.linear24 import Packed24, check24, pack_linear24, positions24, quantize24
from persona_pruner.testing import assert_close_to_oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# M for one-row, small-batch and blocked kernels; N and K on and off every tile; K with half a metadata byte
SHAPES = [
    (1, 1, 4),
    (1, 17, 20),
    (3, 64, 64),
    (5, 33, 576),
    (8, 100, 132),
    (16, 48, 1536),
    (17, 130, 60),
    (70, 96, 260),
    (41, 67, 1044),  # panels of every width that an instruction set has, and a rest; pieces of K
    (83, 18, 132),
]
CPU = [isa for isa, needs in _native.ISAS.items() if needs - {"AuthenticAMD"} <= _native.cpu_flags()]


def weight24(n, k, dtype, seed=0):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return ops.select24(weight)


def inputs(m, k, dtype, seed=1):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(weight, col_scale=None):
    """Best two of each four by abs(w) * scale, ties to the lower column; a nibble past K is pattern 4."""
    n, k = weight.shape
    values, meta = torch.zeros(n, k // 2, dtype=weight.dtype), torch.zeros(n, (k + 7) // 8, dtype=torch.uint8)
    for row, group in itertools.product(range(n), range(k // 4)):
        four = weight[row, 4 * group : 4 * group + 4]
        score = four.float().abs()
        if col_scale is not None:
            score = score * col_scale[4 * group : 4 * group + 4]
        first, second = sorted(sorted(range(4), key=lambda i: (-score[i].item(), i))[:2])
        values[row, 2 * group], values[row, 2 * group + 1] = four[first], four[second]
        meta[row, group // 2] |= (first | second << 2) << (4 * (group % 2))
    if k % 8:
        meta[:, -1] |= 4 << 4
    return values, meta


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_selection_by_hand(backend, dtype, scaled):
    torch.manual_seed(3)
    for n, k in ((1, 4), (5, 12), (7, 68), (3, 132)):
        weight = torch.randn(n, k).to(dtype)
        weight[0, :4] = torch.tensor([0.5, -0.5, 0.5, 0.5])  # ties
        weight[-1, -4:] = torch.tensor([-0.0, 0.0, 0.0, -0.0])
        scale = torch.rand(k) if scaled else None
        values, meta = ops.select24(weight, scale, backend=backend)
        want_values, want_meta = by_hand(weight, scale)
        assert torch.equal(meta, want_meta)
        assert torch.equal(values.view(torch.uint8), want_values.view(torch.uint8))  # bits: -0.0 stays -0.0
        check24(values, meta)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_among_ties_infinities_and_negative_scales(backend, dtype):
    torch.manual_seed(5)
    for k in (4, 8, 12, 16, 28, 132):
        weight = torch.randint(-2, 3, (9, k)).to(dtype)
        weight[weight == 0] = -0.0
        weight[0, 0] = torch.inf
        scale = torch.randint(-1, 2, (k,)).float()
        scale[0] = -1
        for given in (None, scale):
            values, meta = ops.select24(weight, given, backend=backend)
            want_values, want_meta = by_hand(weight, given)
            assert torch.equal(meta, want_meta)
            assert torch.equal(values.view(torch.uint8), want_values.view(torch.uint8))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_selection_refuses_nan_and_odd_widths(backend):
    weight = torch.ones(4, 8)
    weight[2, 5] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        ops.select24(weight, backend=backend)
    with pytest.raises(InputError, match="multiple of 4"):
        ops.select24(torch.ones(4, 6), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_restores_what_was_kept(dtype):
    torch.manual_seed(4)
    weight = torch.randn(9, 44).to(dtype)
    values, meta = ops.select24(weight)
    dense = ops.unpack24(values, meta)
    kept = dense != 0
    assert torch.equal(dense[kept], weight[kept]) and int(kept.sum()) == 9 * 22
    again_values, again_meta = ops.select24(dense)
    assert torch.equal(again_values, values) and torch.equal(again_meta, meta)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_against_float64(backend, shape, dtype, bias):
    m, n, k = shape
    values, meta = weight24(n, k, dtype)
    x, extra = inputs(m, k, dtype), (inputs(1, n, dtype, 2)[0] if bias else None)
    dense = ops.unpack24(values, meta)
    oracle = torch.nn.functional.linear(x.double(), dense.double(), None if extra is None else extra.double())
    plain = torch.nn.functional.linear(x, dense, extra)
    got = ops.linear24(x, values, meta, extra, backend=backend)
    assert got.dtype == dtype and got.shape == (m, n)
    assert_close_to_oracle(got, oracle, plain)
    assert torch.equal(got, ops.linear24(x, pack_linear24(values, meta), bias=extra, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_against_its_formula(shape, dtype):
    m, n, k = shape
    values, meta = weight24(n, k, torch.float32)
    quantized, scales = quantize24(values)
    x = inputs(m, k, dtype)
    sx = x.double().abs().amax(1, keepdim=True) / 127
    exact = (x.double() / sx).round() * sx @ ops.unpack24(quantized, meta, scales.double()).T
    for backend in ("reference", "cpu"):
        got = ops.linear24(x, quantized, meta, scales=scales, backend=backend).double()
        # ties of x's grid may round the other way in float32 (three at most here), the result is rounded to dtype once
        slack = 3 * sx * (scales.double() * 127)[None] + exact.abs() * torch.finfo(dtype).eps + 1e-6
        assert ((got - exact).abs() <= slack).all()
        unquantized = x.double() @ ops.unpack24(values, meta).double().T
        assert (got - unquantized).norm() <= 0.03 * unquantized.norm() + 1e-6


def test_leading_shapes_views_and_nothing():
    values, meta = weight24(24, 40, torch.float32)
    dense = ops.unpack24(values, meta)
    wide = inputs(12, 100, torch.float32)
    for x in (
        wide[:, 3:43],
        wide[::2, :40],
        wide[:8, :40].view(2, 4, 40),
        wide[0, :40],
        wide[:0, :40],
        wide[:, :40][:1],
    ):
        got = ops.linear24(x, values, meta, backend="cpu")
        assert got.shape == (*x.shape[:-1], 24)
        torch.testing.assert_close(got, x @ dense.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        ops.linear24(wide[:3, :40].t().contiguous().t(), values, meta), ops.linear24(wide[:3, :40], values, meta)
    )


def test_infinity_in_a_pruned_column_stays_out():
    values, meta = weight24(16, 16, torch.float32)
    x = inputs(1, 16, torch.float32)
    x[0, 5] = torch.inf
    touched = (positions24(meta, 4)[:, 1] == 1).any(1)
    for backend in ("reference", "cpu"):
        got = ops.linear24(x, values, meta, backend=backend)[0]
        assert torch.equal(~got.isfinite(), touched) and touched.any() and not touched.all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_of_input_and_bias(backend):
    values, meta = weight24(10, 24, torch.float32)
    dense = ops.unpack24(values, meta)
    x, bias = inputs(6, 24, torch.float32).requires_grad_(), torch.randn(10, requires_grad=True)
    slope = torch.randn(6, 10)
    got = torch.autograd.grad(ops.linear24(x, values, meta, bias, backend=backend), (x, bias), slope)
    want = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias), (x, bias), slope)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_refused():
    values, meta = weight24(8, 16, torch.float32)
    x = inputs(2, 16, torch.float32)
    for bad, match in (
        (lambda: ops.linear24(x[:, :12], values, meta), "16"),
        (lambda: ops.linear24(x.bfloat16(), values, meta), "dtype|bfloat16"),
        (lambda: ops.linear24(x, values, meta[:, :1]), "meta"),
        (lambda: ops.linear24(x, values, meta, torch.ones(7)), "bias"),
        (lambda: ops.linear24(x, values, meta, backend="cuda"), "cuda"),
        (lambda: ops.linear24(x, values, meta, backend="none"), "none"),
        (lambda: ops.linear24(x, values.requires_grad_(), meta), "gradient"),
    ):
        with pytest.raises(InputError, match=match):
            bad()


def test_corrupt_metadata_is_defined_everywhere():
    """Any byte stands for two positions; equal ones add up; `check24` and the handle refuse them."""
    generator = torch.Generator().manual_seed(9)
    for trial in range(300):
        n, k, m = (int(torch.randint(1, 40, (), generator=generator)) for _ in range(3))
        k *= 4
        values = torch.randn(n, k // 2, generator=generator)
        meta = torch.randint(0, 256, (n, (k + 7) // 8), generator=generator, dtype=torch.uint8)
        x = torch.randn(m, k, generator=generator)
        want = x.double() @ ops.unpack24(values, meta).double().T
        got = ops.linear24(x, values, meta, backend="cpu").double()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=lambda text, t=trial: f"trial {t}: {text}")
    with pytest.raises(InputError, match="meta"):
        pack_linear24(torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.uint8))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_bits(threads):
    values, meta = weight24(200, 320, torch.bfloat16)
    x = inputs(33, 320, torch.bfloat16)
    before = torch.get_num_threads()
    want = ops.linear24(x, values, meta, backend="cpu")
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ops.linear24(x, values, meta, backend="cpu"), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", [isa for isa in CPU if isa != _native.cpu_isa()])
def test_every_instruction_set_of_this_machine(isa):
    if os.environ.get("PERSONA_PRUNER_ISA"):
        pytest.skip("already inside a run for one instruction set")
    names = ["selection", "product", "int8", "corrupt", "infinity"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", " or ".join(names)],
        env=os.environ | {"PERSONA_PRUNER_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_handle_is_only_a_name_on_the_cpu():
    values, meta = weight24(8, 16, torch.float32)
    handle = pack_linear24(values, meta)
    assert isinstance(handle, Packed24) and handle.shape == (8, 16) and handle.values.data_ptr() == values.data_ptr()
