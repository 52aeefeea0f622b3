"""subset_ffn, norm_linear and paged_attention_ against float64, in every instruction set of this machine."""

import os
import subprocess
import sys

import pytest
import torch

from persona_pruner import ops
from persona_pruner.errors import InputError
from persona_pruner.ops import _native
from persona_pruner.testing import assert_close_to_oracle

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
CPU = [isa for isa, needs in _native.ISAS.items() if needs <= _native.cpu_flags()]


def weight(rows, cols, kind, seed):
    """(weight, scales, the same as float64)."""
    full = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * max(cols, 1) ** -0.5
    if kind == torch.int8:
        values, scales = ops.quantize24(full)
        return values, scales, values.double() * scales.double()[:, None]
    full = full.to(kind)
    return full, None, full.double()


def draw(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(width, share, seed):
    mask = torch.rand(width, generator=torch.Generator().manual_seed(seed)) < share
    return mask.nonzero()[:, 0].to(torch.int32)


# width, hidden, rows of each segment
FFNS = [(1, 1, [1]), (37, 19, [1, 3]), (64, 32, [5]), (200, 72, [1, 2, 4, 8]), (130, 100, [0, 9, 0, 1]),
        (96, 33, [70, 3, 60]), (300, 64, [1] * 7)]  # fmt: skip


def ffn_case(width, hidden, rows, kind, dressed, seed=1):
    weights, scales, exact = zip(*(weight(width, hidden, kind, seed + i) for i in range(3)), strict=True)
    lists = [kept(width, (0.5, 1.0, 0.0, 0.25)[i % 4], seed + i) for i in range(len(rows))]
    starts = torch.tensor([0, *map(len, lists)]).cumsum(0)
    segments = torch.tensor([[r, starts[i], len(lists[i])] for i, r in enumerate(rows)])
    extra = {}
    if dressed:
        extra = {
            "biases": (draw(width, seed=11), draw(width, seed=12), draw(hidden, seed=13)),
            "norm": draw(hidden, seed=14), "eps": 1e-5, "residual": draw(sum(rows), hidden, seed=15),
        }  # fmt: skip
    return weights, scales, exact, torch.cat(lists), segments, extra


def widened(extra):
    def wide(value):
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        return value.double() if isinstance(value, torch.Tensor) else value

    return {name: wide(value) for name, value in extra.items()}


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_itself_only(kind):
    """In every bit: not on its neighbours, the segments, views or the number of threads."""
    weights, scales, _, channels, segments, extra = ffn_case(700, 96, [5, 11, 1], kind, True)
    x, before = draw(17, 96), torch.get_num_threads()
    want = ops.subset_ffn(x, *weights, channels, segments, scales=scales, **extra)
    first = torch.tensor([0, 5, 16])
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
        (lambda: ops.norm_linear(x, weights[0], torch.ones(3)), "bias"),
        (lambda: ops.norm_linear(x, weights[0][:, :3]), "fit"),
    ):
        with pytest.raises(InputError, match=match):
            wrong()


def test_nothing_at_all():
    weights = [torch.randn(8, 4) for _ in range(3)]
    assert ops.subset_ffn(torch.empty(0, 4), *weights).shape == (0, 4)
    none = ops.subset_ffn(torch.ones(2, 4), *weights, torch.empty(0, dtype=torch.int32), residual=torch.ones(2, 4))
    assert torch.equal(none, torch.ones(2, 4))
    assert ops.norm_linear(torch.empty(0, 4), weights[0]).shape == (0, 8)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 50, 576), (3, 17, 19), (7, 33, 64), (16, 40, 100), (29, 64, 33)])
def test_linear_against_float64(shape, kind, backend):
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


def attention_case(kind, heads, kv_heads, size, lengths, fresh):
    """Rows of these lengths, whose last `fresh` tokens are new; blocks lie in disorder, unused memory is poisoned."""
    generator = torch.Generator().manual_seed(2)
    width = max(-(-n // 16) for n in lengths)
    blocks = torch.randperm(len(lengths) * width + 3, generator=generator).to(torch.int32)
    tables = blocks[: len(lengths) * width].view(len(lengths), width)
    keys = torch.full((len(blocks), kv_heads, size, 16), torch.nan)
    values = torch.full((len(blocks), kv_heads, 16, size), torch.nan)
    for row, length in enumerate(lengths):
        for place in range(length - fresh[row]):
            block = tables[row, place // 16]
            keys[block, :, :, place % 16] = torch.randn(kv_heads, size, generator=generator)
            values[block, :, place % 16] = torch.randn(kv_heads, size, generator=generator)
    positions = torch.cat([torch.arange(n - f, n) for n, f in zip(lengths, fresh, strict=True)]).to(torch.int32)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(fresh)).to(torch.int32)
    qkv = torch.randn(len(rows), (heads + 2 * kv_heads) * size, generator=generator)
    angle = torch.arange(max(lengths))[:, None] / 100 ** (torch.arange(size // 2) / (size // 2))
    return qkv, angle.cos(), angle.sin(), positions, rows, tables, keys.to(kind), values.to(kind)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 21])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "lengths", "fresh"),
    [(4, 2, 8, [1], [1]), (9, 3, 64, [40, 17, 16], [1, 17, 3]), (5, 1, 72, [33, 70], [2, 1]), (6, 6, 30, [50], [37])],
)
def test_attention_against_float64(heads, kv_heads, size, lengths, fresh, window, kind):
    case = attention_case(kind, heads, kv_heads, size, lengths, fresh)
    norms = (draw(size, seed=3), draw(size, seed=4), 1e-6)
    tensors = {}
    for name in ("oracle", "plain", "cpu"):
        qkv, cos, sin, positions, rows, tables, keys, values = (t.clone() for t in case)
        if name == "oracle":
            qkv, cos, sin, n = qkv.double(), cos.double(), sin.double(), (norms[0].double(), norms[1].double(), 1e-6)
        else:
            n = norms
        backend = "cpu" if name == "cpu" else "reference"
        out = ops.paged_attention_(
            qkv, cos, sin, positions, rows, tables, keys, values, size**-0.5, window, *n, backend=backend
        )
        tensors[name] = out, keys, values
    # a key that rounds the other way into a 16-bit cache is an ulp of that type off
    floor = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}[kind]
    assert_close_to_oracle(tensors["cpu"][0], tensors["oracle"][0], tensors["plain"][0], floor)
    for got, want in zip(tensors["cpu"][1:], tensors["plain"][1:], strict=True):
        assert torch.equal(got.isnan(), want.isnan())  # what is not written stays as it was
        eps = torch.finfo(kind).eps
        torch.testing.assert_close(got, want, rtol=2 * eps, atol=4e-6, equal_nan=True)


def test_attention_does_not_depend_on_the_batch():
    case = attention_case(torch.bfloat16, 9, 3, 64, [40, 90, 16], [3, 1, 1])
    together = ops.paged_attention_(*(t.clone() for t in case), 0.125)
    qkv, cos, sin, positions, rows, tables, keys, values = (t.clone() for t in case)
    for t in range(5):
        part = slice(t, t + 1)
        alone = ops.paged_attention_(qkv[part], cos, sin, positions[part], rows[part], tables, keys, values, 0.125)
        assert torch.equal(alone[0], together[t])


@pytest.mark.parametrize("isa", [isa for isa in CPU if isa != _native.cpu_isa()])
def test_every_instruction_set_of_this_machine(isa):
    if os.environ.get("PERSONA_PRUNER_ISA"):
        pytest.skip("already inside a run for one instruction set")
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "float64 or row or batch",
        ],
        env=os.environ | {"PERSONA_PRUNER_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
