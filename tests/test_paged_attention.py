"""paged_attention_ against float64, in every instruction set of this machine."""

import importlib
import os

import pytest
import torch
from decode_ops import OTHER_ISAS, attention_case, draw, each, guarded, run_tests

from persona_pruner import ops
from persona_pruner.errors import InputError
from persona_pruner.testing import assert_close_to_oracle

op = importlib.import_module("persona_pruner.ops.paged_attention")
# heads, key heads, size of a head, length of each row, how many of its tokens are new
SHAPES = [
    (4, 2, 8, [1], [1]),
    (9, 3, 64, [40, 17, 16], [1, 17, 3]),
    (5, 1, 72, [33, 70], [2, 1]),
    (6, 6, 30, [50], [37]),
]


def copies(case):
    return [t.clone() for t in case]


def test_the_formula_is_causal_attention():
    """The reference, on one row whose tokens are all new, against torch's attention and rotation by complex numbers."""
    heads, kv_heads, size, length = 6, 2, 8, 35
    qkv, cos, sin, *rest = attention_case(torch.float32, heads, kv_heads, size, [length], [length])
    keys, values = (t.double() for t in rest[-2:])
    out = op.reference(qkv.double(), cos.double(), sin.double(), *rest[:-2], keys, values, 0.3, None, None, None, 0.0)
    q, k, v = qkv.double().view(length, -1, size).transpose(0, 1).split([heads, kv_heads, kv_heads])
    turn = torch.complex(cos.double(), sin.double())

    def rotated(x):
        y = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([y.real, y.imag], -1)

    want = torch.nn.functional.scaled_dot_product_attention(
        rotated(q)[None], rotated(k)[None], v[None], is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, want[0].transpose(0, 1).flatten(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 21])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, window, kind):
    case, size = attention_case(kind, *shape), shape[2]
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


def test_a_token_does_not_depend_on_the_batch():
    case = attention_case(torch.bfloat16, 9, 3, 64, [40, 90, 16], [3, 1, 1])
    together = ops.paged_attention_(*(t.clone() for t in case), 0.125)
    qkv, cos, sin, positions, rows, tables, keys, values = (t.clone() for t in case)
    for t in range(5):
        part = slice(t, t + 1)
        alone = ops.paged_attention_(qkv[part], cos, sin, positions[part], rows[part], tables, keys, values, 0.125)
        assert torch.equal(alone[0], together[t])


def test_threads_and_strides_do_not_change_bits():
    case = attention_case(torch.bfloat16, 8, 2, 64, [300, 90], [2, 40])
    want, before = ops.paged_attention_(*copies(case), 0.125), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.paged_attention_(*copies(case), 0.125), want)
    finally:
        torch.set_num_threads(before)
    views = [torch.stack([t, t], -1)[..., 0] for t in case[:6]]
    assert torch.equal(ops.paged_attention_(*views, *copies(case[6:]), 0.125), want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_reaches_the_tokens_that_see_it_only(backend):
    qkv, *rest = attention_case(torch.float32, 4, 2, 8, [20, 20], [3, 3])
    clean = ops.paged_attention_(qkv, *copies(rest), 0.3, backend=backend)
    qkv[1, 4 * 8] = torch.nan  # the key of the first row's second new token, first key head
    got = ops.paged_attention_(qkv, *copies(rest), 0.3, backend=backend)
    seen = torch.zeros(6, 4 * 8, dtype=torch.bool)
    seen[1:3, : 2 * 8] = True
    assert torch.equal(got.isnan(), seen) and torch.equal(got[~seen], clean[~seen])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_at_all(backend):
    qkv, cos, sin, positions, rows, tables, keys, values = attention_case(torch.float32, 4, 2, 8, [5], [1])
    args = qkv[:0], cos, sin, positions[:0], rows[:0], tables, keys, values, 0.3
    assert ops.paged_attention_(*args, backend=backend).shape == (0, 32)


def test_what_is_refused():
    names = "qkv", "cos", "sin", "positions", "rows", "tables", "keys", "values"
    case = dict(zip(names, attention_case(torch.bfloat16, 4, 2, 8, [20], [3]), strict=True))
    norm = torch.ones(8)
    for change, match in (
        ({"keys": case["keys"][..., :8]}, "keys must be"),
        ({"values": case["values"].float()}, "keys must be"),
        ({"values": case["values"][:-1]}, "keys must be"),
        ({"qkv": case["qkv"][:, :-8]}, "does not fit"),
        ({"qkv": case["qkv"][:, : 4 * 8]}, "does not fit"),
        ({"qkv": case["qkv"].bfloat16()}, "float32"),
        ({"rows": case["rows"].long()}, "int32"),
        ({"positions": case["positions"][:-1]}, "positions"),
        ({"cos": case["cos"][:, :-1]}, "cos and sin"),
        ({"sin": case["sin"][:-1]}, "cos and sin"),
        ({"tables": case["tables"][0]}, "tables"),
        ({"q_norm": norm[:-1]}, "q_norm"),
        ({"k_norm": norm.bfloat16()}, "k_norm"),
        ({"backend": "triton"}, "no backend 'triton'"),
        ({"keys": case["keys"].mT.contiguous().mT, "backend": "cpu"}, "contiguous"),
        ({"keys": case["keys"].to(torch.int8), "values": case["values"].to(torch.int8), "backend": "cpu"}, "no kernel"),
    ):
        with pytest.raises(InputError, match=match):
            ops.paged_attention_(**{**case, "scale": 0.3, **change})
    odd = attention_case(torch.float32, 2, 1, 8, [3], [1])
    with pytest.raises(InputError, match="even"):
        ops.paged_attention_(odd[0][:, : 4 * 7], *odd[1:6], odd[6][:, :, :7], odd[7][..., :7], 0.3)


@pytest.mark.parametrize("kind", op.FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_read_behind_the_end(shape, kind):
    case, norms = attention_case(kind, *shape), (draw(shape[2], seed=3), draw(shape[2], seed=4))
    mine, theirs = copies(case), each(case, guarded)
    want = ops.paged_attention_(*mine, 0.3, 9, *norms, 1e-6, backend="cpu")
    got = ops.paged_attention_(*theirs, 0.3, 9, *each(norms, guarded), 1e-6, backend="cpu")
    assert torch.equal(got, want)
    for a, b in zip(theirs[6:], mine[6:], strict=True):
        assert torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))


def test_opcheck_and_compile():
    case = [t.nan_to_num() for t in attention_case(torch.bfloat16, 4, 2, 8, [40, 17], [2, 1])]  # NaN is not itself
    norms = draw(8, seed=3), draw(8, seed=4), 1e-6
    torch.library.opcheck(op._op, (*copies(case), 0.3, None, None, None, 0.0, None))
    torch.library.opcheck(op._op, (*copies(case), 0.3, 7, *norms, "reference"))

    def attend(qkv, *rest):
        return 2 * ops.paged_attention_(qkv + 1, *rest, 0.3, 7, *norms)

    mine, theirs = copies(case), copies(case)
    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(*theirs), attend(*mine))
    assert torch.equal(mine[6], theirs[6]) and torch.equal(mine[7], theirs[7]) and not torch.equal(mine[6], case[6])


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set_of_this_machine(isa):
    if os.environ.get("PERSONA_PRUNER_ISA"):
        pytest.skip("already inside a run for one instruction set")
    run_tests(__file__, ["float64", "batch", "threads", "nan", "behind"], PERSONA_PRUNER_ISA=isa)
