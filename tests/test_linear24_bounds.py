"""The CPU kernels read nothing outside their tensors, and corrupt packed weights never crash: 10,000 random ones."""

import pytest
import torch
from decode_ops import guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_pruner import ops
from persona_pruner.errors import InputError
from persona_pruner.ops import _native
from persona_pruner.ops.linear24 import check24, pack_linear24, quantize24
from persona_pruner.testing import assert_close_to_oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("shape", [(1, 3, 4), (5, 17, 100), (9, 34, 132), (16, 33, 520), (70, 19, 68), (23, 70, 1044)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
def test_nothing_is_read_behind_the_end(shape, dtype, int8):
    if isinstance(_native.cpu_module(), str):
        pytest.skip(_native.cpu_module())
    m, n, k = shape
    generator = torch.Generator().manual_seed(k)
    values, meta = ops.select24(torch.randn(n, k, generator=generator).to(torch.float32 if int8 else dtype))
    x, bias = torch.randn(m, k, generator=generator).to(dtype), torch.randn(n, generator=generator).to(dtype)
    scales = None
    if int8:
        values, scales = quantize24(values)
    want = ops.linear24(x, values, meta, bias, "cpu", scales=scales)
    given = [None if t is None else guarded(t) for t in (x, values, meta, bias, scales)]
    assert torch.equal(ops.linear24(*given[:4], backend="cpu", scales=given[4]), want)
    packed = ops.select24(guarded(ops.unpack24(values, meta)), backend="cpu") if not int8 else (values, meta)
    assert torch.equal(packed[0], values) and torch.equal(packed[1], meta)


def test_ten_thousand_corrupt_weights_are_refused_or_defined():
    """Random bytes as metadata, random bits as values: refused by the check, and a number or NaN in each product."""
    generator = torch.Generator().manual_seed(17)
    refused = 0
    for i in range(10_000):
        m, n, groups = (int(v) for v in torch.randint(1, 12, (3,), generator=generator))
        dtype = (*DTYPES, torch.int8)[i % 4]
        size = torch.empty((), dtype=dtype).element_size()
        raw = torch.randint(0, 256, (n, 2 * groups * size), dtype=torch.uint8, generator=generator)
        values = raw.view(dtype)
        meta = torch.randint(0, 256, (n, (groups + 1) // 2), dtype=torch.uint8, generator=generator)
        scales = torch.ones(n) if dtype == torch.int8 else None
        x = torch.ones(m, 4 * groups, dtype=torch.float32 if dtype == torch.int8 else dtype)
        try:
            pack_linear24(values, meta, scales)
        except InputError:
            refused += 1
        y = ops.linear24(x, values, meta, backend="cpu", scales=scales)
        assert y.shape == (m, n)
        if dtype in (torch.float32, torch.int8):  # every position of x is 1, so the metadata cannot matter
            total, size = values.double().sum(1), values.double().abs().sum(1)
            sane = size < 1e38
            assert ((y.double() - total)[:, sane].abs() <= 1e-5 * size[sane] + 1e-30).all()
    assert refused > 8_000


@st.composite
def products(draw):
    """x [M, K], a view with any stride, and a dense float32 weight [N, K]."""
    dtype = draw(st.sampled_from(DTYPES))
    m, n, k = draw(st.integers(0, 70)), draw(st.integers(1, 70)), 4 * draw(st.integers(1, 80))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    weight = torch.randn(n, k, generator=generator) * (torch.rand(n, k, generator=generator) < 0.8)
    step, start = draw(st.integers(1, 2)), draw(st.integers(0, 3))
    wide = (scale * torch.randn(m, start + step * k, generator=generator)).to(dtype)
    return wide[:, start : start + step * k : step], weight


@settings(max_examples=60, deadline=None, derandomize=True)
@given(products())
def test_product_for_any_shape_stride_and_value(drawn):
    x, weight = drawn
    values, meta = ops.select24(weight.to(x.dtype))
    check24(values, meta)
    dense = ops.unpack24(values, meta)
    got = ops.linear24(x, values, meta, backend="cpu")
    assert got.shape == (len(x), len(weight)) and got.dtype == x.dtype
    if len(x):
        oracle, size = x.double() @ dense.double().T, x.double().abs() @ dense.double().abs().T
        # Terms of a lone product may cancel, and PyTorch be nearly exact: half a float32 step of their size is allowed.
        floor = max(1e-6, 2**-24 * float(size.max() / oracle.abs().max())) if oracle.any() else 1e-6
        assert_close_to_oracle(got, oracle, x @ dense.T, floor)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(products())
def test_int8_product_for_any_shape_stride_and_value(drawn):
    x, weight = drawn
    values, meta = ops.select24(weight)
    values, scales = quantize24(values)
    check24(values, meta, scales)
    got = ops.linear24(x, values, meta, backend="cpu", scales=scales)
    assert got.shape == (len(x), len(weight)) and got.dtype == x.dtype
    grid = x.double().abs().amax(1, keepdim=True) / 127
    whole = (x.double() / grid).round().nan_to_num()
    exact = whole * grid @ ops.unpack24(values, meta, scales.double()).T
    # A tie of x's grid may round the other way in float32: three of them at most here, each worth a weight.
    slack = 3 * grid * 127 * scales.double() + exact.abs() * torch.finfo(x.dtype).eps + torch.finfo(x.dtype).tiny
    assert ((got.double() - exact).abs() <= slack).all()
