"""subset_ffn against float64, in every instruction set of this machine; its Triton kernels: test_subset_ffn_gpu.py."""

import importlib
import os

import pytest
import torch
from decode_ops import KINDS, OTHER_ISAS, draw, each, ffn_case, guarded, kept, run_tests, widened

from persona_pruner import ops
from persona_pruner.errors import InputError
from persona_pruner.testing import assert_close_to_oracle

op = importlib.import_module("persona_pruner.ops.subset_ffn")  # the name in the package is the function

# width, hidden, rows of each segment; rows of a page and more are read side by side
FFNS = [(1, 1, [1]), (37, 19, [1, 3]), (64, 32, [5]), (200, 72, [1, 2, 4, 8]), (130, 100, [0, 9, 0, 1]),
        (96, 33, [70, 3, 60]), (300, 64, [1] * 7), (13, 4100, [1, 6])]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dressed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", FFNS)
def test_ffn_against_float64(shape, kind, dressed, backend):
    width, hidden, rows = shape
    for act in ("silu", "gelu_tanh"):
        weights, scales, exact, channels, segments, extra = ffn_case(width, hidden, rows, kind, dressed)
        x = draw(sum(rows), hidden)
        oracle = ops.subset_ffn(x.double(), *exact, channels, segments, act, backend="reference", **widened(extra))
        plain = [w.float() if s is None else w.float() * s[:, None] for w, s in zip(weights, scales, strict=True)]
        plain = ops.subset_ffn(x, *plain, channels, segments, act, backend="reference", **extra)
        got = ops.subset_ffn(x, *weights, channels, segments, act, scales=scales, backend=backend, **extra)
        assert_close_to_oracle(got, oracle, plain, 2e-6)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_ffn_in_the_weights_type(kind):
    weights, _, exact, channels, segments, _ = ffn_case(200, 72, [3, 1], kind, False)
    x = draw(4, 72).to(kind)
    got = ops.subset_ffn(x, *weights, channels, segments, backend="cpu")
    oracle = ops.subset_ffn(x.double(), *exact, channels, segments, backend="reference")
    h, row, plain = None, 0, torch.empty_like(x)
    for rows, first, count in segments.tolist():
        c, part = channels[first : first + count].long(), slice(row, row + rows)
        h = torch.nn.functional.silu(x[part] @ weights[0][c].T) * (x[part] @ weights[1][c].T)
        plain[part] = h @ weights[2][c]
        row += rows
    assert got.dtype == kind
    assert_close_to_oracle(got, oracle, plain)


@pytest.mark.parametrize("rows", [[5, 11, 1], [2, 1, 1, 2, 2, 3, 1, 1, 1, 3]], ids=["long", "short"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_itself_only(kind, rows):
    """In every bit: not on neighbours (short segments share tiles), the segments, views or the number of threads."""
    weights, scales, _, channels, segments, extra = ffn_case(700, 96, rows, kind, True)
    x, before = draw(17, 96), torch.get_num_threads()
    want = ops.subset_ffn(x, *weights, channels, segments, scales=scales, **extra)
    first = segments[:, 0].cumsum(0) - segments[:, 0]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.subset_ffn(x, *weights, channels, segments, scales=scales, **extra), want)
            for index, (rows, start, count) in enumerate(segments.tolist()):
                for t in {0, rows - 1}:
                    at = int(first[index]) + t
                    alone = {**extra, "residual": extra["residual"][at : at + 1]}
                    view = torch.stack([x[at], x[at]], 1)[None, :, 0]
                    row = ops.subset_ffn(view, *weights, channels[start : start + count], scales=scales, **alone)
                    assert torch.equal(row[0], want[at])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_whose_rows_lie_apart(kind):
    weights, scales, _, channels, segments, extra = ffn_case(130, 50, [1, 9], kind, True)
    x = draw(10, 50)
    want = ops.subset_ffn(x, *weights, channels, segments, scales=scales, **extra)
    together = torch.stack(weights, 1).unbind(1)
    apart = [torch.stack([w] * (2 + i), 2)[..., 0] for i, w in enumerate(weights)]
    for views in (together, apart, (weights[0], *together[1:])):
        assert torch.equal(ops.subset_ffn(x, *views, channels, segments, scales=scales, **extra), want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_stays_in_its_row_and_dropped_channels_are_not_read(backend):
    weights, _, _, _, _, _ = ffn_case(64, 32, [1], torch.float32, False)
    channels = kept(64, 0.5, 3)
    poisoned = [w.clone() for w in weights]
    dropped = torch.ones(64, dtype=torch.bool)
    dropped[channels.long()] = False
    for w in poisoned:
        w[dropped] = torch.nan
    x = draw(3, 32)
    want = ops.subset_ffn(x, *weights, channels, backend=backend)
    assert torch.equal(ops.subset_ffn(x, *poisoned, channels, backend=backend), want)
    x[1, 4] = torch.nan
    got = ops.subset_ffn(x, *weights, channels, backend=backend)
    assert got[1].isnan().all() and torch.equal(got[::2], want[::2])


def test_nan_stays_with_those_who_keep_its_channel():
    """In a tile that segments share, too; W_down^T has to be finite there, as the docstring says."""
    weights, _, _, channels, segments, _ = ffn_case(64, 32, [1, 1], torch.float32, False)  # half of the channels, all
    x = draw(2, 32)
    want = ops.subset_ffn(x, *weights, channels, segments, backend="cpu")
    alone = channels[int(segments[0, 2]) :]
    alone = int(alone[~torch.isin(alone, channels[: int(segments[0, 2])])][0])
    weights[0][alone] = torch.nan
    got = ops.subset_ffn(x, *weights, channels, segments, backend="cpu")
    assert got[1].isnan().all() and torch.equal(got[0], want[0])


def test_what_ffn_refuses():
    weights = [torch.randn(8, 4) for _ in range(3)]
    x, channels = torch.randn(2, 4), torch.tensor([1, 3, 5], dtype=torch.int32)
    for wrong, match in (
        (lambda: ops.subset_ffn(x[:, :3], *weights), "x must be"),
        (lambda: ops.subset_ffn(x.bfloat16(), *weights), "x must be float32"),
        (lambda: ops.subset_ffn(x, *weights, channels.long()), "int32"),
        (lambda: ops.subset_ffn(x, *weights, channels + 4), "outside"),
        (lambda: ops.subset_ffn(x, *weights, channels.flip(0)), "ascend"),
        (lambda: ops.subset_ffn(x, *weights, channels, torch.tensor([[1, 0, 3]])), "cover"),
        (lambda: ops.subset_ffn(x, *weights, channels, torch.tensor([[2, 1, 3]])), "lie"),
        (lambda: ops.subset_ffn(x, *weights, act="relu"), "relu"),
        (lambda: ops.subset_ffn(x, *(w.to(torch.int8) for w in weights)), "scales"),
        (lambda: ops.subset_ffn(x, *weights, norm=torch.ones(3)), "norm"),
        (lambda: ops.subset_ffn(x, *weights, residual=torch.ones(1, 4)), "residual"),
        (lambda: ops.subset_ffn(x, *weights, backend="cuda"), "no backend 'cuda'"),
        (lambda: ops.subset_ffn(x.double(), *(w.double() for w in weights), backend="cpu"), "float64"),
    ):
        with pytest.raises(InputError, match=match):
            wrong()


def test_nothing_at_all():
    weights = [torch.randn(8, 4) for _ in range(3)]
    assert ops.subset_ffn(torch.empty(0, 4), *weights).shape == (0, 4)
    none = ops.subset_ffn(torch.ones(2, 4), *weights, torch.empty(0, dtype=torch.int32), residual=torch.ones(2, 4))
    assert torch.equal(none, torch.ones(2, 4))
    assert torch.equal(ops.subset_ffn(torch.ones(2, 4), *(w[:0] for w in weights)), torch.zeros(2, 4))
    assert ops.subset_ffn(torch.ones(2, 0), *(w[:, :0] for w in weights)).shape == (2, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", FFNS)
def test_nothing_is_read_behind_the_end(shape, kind):
    width, hidden, rows = shape
    weights, scales, _, channels, segments, extra = ffn_case(width, hidden, rows, kind, True)
    x = draw(sum(rows), hidden)
    want = ops.subset_ffn(x, *weights, channels, segments, scales=scales, backend="cpu", **extra)
    x, weights, scales, channels, segments, extra = each((x, weights, scales, channels, segments, extra), guarded)
    got = ops.subset_ffn(x, *weights, channels, segments, scales=scales, backend="cpu", **extra)
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", [torch.float32, torch.int8])
def test_opcheck_and_compile(kind):
    weights, scales, _, channels, segments, extra = ffn_case(64, 32, [3, 2], kind, True)
    rest = extra["norm"], extra["eps"], extra["residual"]
    x = draw(5, 32)
    torch.library.opcheck(op._op, (x, weights, channels, segments, "silu", scales, extra["biases"], *rest, None))
    torch.library.opcheck(op._op, (x, weights, None, None, "gelu_tanh", scales, [None] * 3, None, 0.0, None, None))

    def block(x, channels, segments):
        return 2 * ops.subset_ffn(x + 1, *weights, channels, segments, scales=scales, **extra)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, channels, segments), block(x, channels, segments))
    with pytest.raises(InputError, match="outside"):  # what depends on numbers is checked when it runs
        compiled(x, channels + 64, segments)


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set_of_this_machine(isa):
    if os.environ.get("PERSONA_PRUNER_ISA"):
        pytest.skip("already inside a run for one instruction set")
    run_tests(__file__, ["float64", "row", "behind"], PERSONA_PRUNER_ISA=isa)
