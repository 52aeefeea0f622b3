"""norm_linear against float64, in every instruction set of this machine."""

import importlib
import os

import pytest
import torch
from decode_ops import KINDS, OTHER_ISAS, draw, each, guarded, run_tests, weight, widened

from persona_pruner import ops
from persona_pruner.errors import InputError
from persona_pruner.testing import assert_close_to_oracle

op = importlib.import_module("persona_pruner.ops.norm_linear")  # the name in the package is the function
# tokens, rows, columns; rows of a page and more are read side by side
SHAPES = [(1, 1, 1), (1, 50, 576), (3, 17, 19), (7, 33, 64), (16, 40, 100), (29, 64, 33), (7, 9, 4100)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, kind, backend):
    tokens, rows, cols = shape
    w, scales, exact = weight(rows, cols, kind, 3)
    plain_w = w.float() if scales is None else w.float() * scales[:, None]
    x, extra = draw(tokens, cols), {}
    for extra in ({}, {"norm": draw(cols, seed=8), "eps": 1e-6}, {"residual": draw(tokens, rows, seed=9)}):
        bias = draw(rows, seed=10) if extra else None
        wide = None if bias is None else bias.double()
        oracle = ops.norm_linear(x.double(), exact, wide, backend="reference", **widened(extra))
        plain = ops.norm_linear(x, plain_w, bias, backend="reference", **extra)
        got = ops.norm_linear(x, w, bias, scales=scales, backend=backend, **extra)
        assert_close_to_oracle(got, oracle, plain, 2e-6)
        if backend == "cpu" and tokens > 1:
            alone = {name: v[1:2] if name == "residual" else v for name, v in extra.items()}
            assert torch.equal(ops.norm_linear(x[1:2], w, bias, scales=scales, **alone)[0], got[1])


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads_or_strides(kind):
    w, scales, _ = weight(700, 200, kind, 4)  # enough for more than one thread
    x, before = draw(9, 200), torch.get_num_threads()
    want = ops.norm_linear(x, w, scales=scales, norm=draw(200), eps=1e-6)
    strided = torch.stack([x, x], 2)[..., 1], torch.stack([w, w])[1], draw(400).view(200, 2)[:, 0]
    strided[2].copy_(draw(200))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.norm_linear(x, w, scales=scales, norm=draw(200), eps=1e-6), want)
    finally:
        torch.set_num_threads(before)
    view, w, norm = strided
    assert torch.equal(ops.norm_linear(view, w, scales=scales, norm=norm, eps=1e-6), want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("normed", [False, True])
def test_nan_stays_in_its_row_and_infinity_is_a_number(normed, backend):
    w, x = weight(20, 24, torch.bfloat16, 2)[0], draw(4, 24)
    extra = {"norm": draw(24), "eps": 1e-6} if normed else {}
    want = ops.norm_linear(x, w, backend=backend, **extra)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    got = ops.norm_linear(x, w, backend=backend, **extra)
    assert got[1].isnan().all() and torch.equal(got[::3], want[::3])
    assert got[2].isnan().all() if normed else torch.equal(got[2].isinf(), w[:, 5] != 0)


@pytest.mark.parametrize("cols", [1, 8, 9, 19, 24, 40, 100])
def test_what_was_in_memory_before_does_not_show(cols):
    ops.norm_linear(torch.full((4, 256), torch.nan), torch.ones(8, 256))
    w, x = weight(20, cols, torch.float32, 2)[0], draw(4, cols)
    torch.testing.assert_close(ops.norm_linear(x, w), ops.norm_linear(x, w, backend="reference"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_at_all(backend):
    bias = torch.tensor([1.0, 2.0])
    assert ops.norm_linear(torch.empty(0, 4), torch.ones(8, 4), backend=backend).shape == (0, 8)
    assert ops.norm_linear(torch.ones(3, 4), torch.ones(0, 4), backend=backend).shape == (3, 0)
    got = ops.norm_linear(torch.empty(3, 0), torch.ones(2, 0), bias, norm=torch.ones(0), backend=backend)
    assert torch.equal(got, bias.expand(3, 2))


def test_what_is_refused():
    x, w = torch.randn(2, 4), torch.randn(8, 4)
    whole = w.to(torch.int8)
    for wrong, match in (
        (lambda: ops.norm_linear(x, w[:, :3]), "fit"),
        (lambda: ops.norm_linear(x[0], w), "fit"),
        (lambda: ops.norm_linear(x.bfloat16(), w.bfloat16()), "x must be float32"),
        (lambda: ops.norm_linear(x, w.double()), "float64"),
        (lambda: ops.norm_linear(x, w, torch.ones(3)), "bias"),
        (lambda: ops.norm_linear(x, w, norm=torch.ones(8)), "norm"),
        (lambda: ops.norm_linear(x, w, residual=torch.ones(2, 4)), "residual"),
        (lambda: ops.norm_linear(x, w, torch.ones(8).double()), "bias"),
        (lambda: ops.norm_linear(x, whole), "scales"),
        (lambda: ops.norm_linear(x, w, scales=torch.ones(8)), "scales"),
        (lambda: ops.norm_linear(x, whole, scales=torch.ones(4)), "scales"),
        (lambda: ops.norm_linear(x, w, backend="triton"), "no backend 'triton'"),
        (lambda: ops.norm_linear(x.double(), w.double(), backend="cpu"), "float64"),
    ):
        with pytest.raises(InputError, match=match):
            wrong()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_read_behind_the_end(shape, kind):
    tokens, rows, cols = shape
    w, scales, _ = weight(rows, cols, kind, 3)
    given = draw(tokens, cols), w, draw(rows, seed=10)
    extra = {"scales": scales, "norm": draw(cols, seed=8), "eps": 1e-6, "residual": draw(tokens, rows, seed=9)}
    want = ops.norm_linear(*given, backend="cpu", **extra)
    given, extra = each((given, extra), guarded)
    assert torch.equal(ops.norm_linear(*given, backend="cpu", **extra), want)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8])
def test_opcheck_and_compile(kind):
    w, scales, _ = weight(40, 32, kind, 3)
    x, bias, norm, residual = draw(5, 32), draw(40), draw(32), draw(5, 40)
    torch.library.opcheck(op._op, (x, w, bias, scales, norm, 1e-5, residual, None))
    torch.library.opcheck(op._op, (x[:0], w, None, scales, None, 0.0, None, "reference"))

    def layer(x):
        return 2 * ops.norm_linear(x + 1, w, bias, scales=scales, norm=norm, eps=1e-5, residual=residual)

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set_of_this_machine(isa):
    if os.environ.get("PERSONA_PRUNER_ISA"):
        pytest.skip("already inside a run for one instruction set")
    run_tests(__file__, ["float64", "threads", "nan", "behind"], PERSONA_PRUNER_ISA=isa)
