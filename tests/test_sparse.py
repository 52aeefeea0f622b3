"""SparseLinear24 and sparsify_ against dense layers with zeros, in float64."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import persona_pruner as pp
from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.nn import SparseLinear24, ffn_bytes, input_norms, slim_, sparsify_
from persona_pruner.nn.sparse import block_linears, desparsify_, packed_layers
from persona_pruner.ops import check24, linear24, select24, unpack24
from persona_pruner.ops.linear24 import _op
from persona_pruner.testing import FAMILIES, assert_close_to_oracle, tiny_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = torch.arange(3, 43).reshape(2, 20)


def linear(k=24, n=10, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(k, n, bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def strided(x, how):
    """The same numbers with other strides."""
    if how == "offset":
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    if how == "columns":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


@settings(max_examples=150, deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (0,), (3,), (1, 1), (2, 5), (17,), (2, 0, 3), (70,)]),
    n=st.integers(1, 70),
    groups=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    int8=st.booleans(),
    bias=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    how=st.sampled_from(["plain", "offset", "columns", "transposed"]),
    graded=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_layer_is_the_dense_layer_with_zeros(lead, n, groups, dtype, int8, bias, scale, how, graded, seed):
    torch.manual_seed(seed)
    layer = SparseLinear24.from_linear(
        linear(4 * groups, n, bias, dtype, seed).requires_grad_(graded), dtype=torch.int8 if int8 else None
    )
    x = strided((scale * torch.randn(*lead, 4 * groups)).to(dtype), how)
    with torch.set_grad_enabled(graded):
        y = layer(x).detach()
    assert y.shape == (*lead, n) and y.dtype == dtype
    b = None if layer.bias is None else layer.bias.detach()
    if int8:

        def formula(x, b):
            return linear24(x, layer.values, layer.meta, b, "reference", scales=layer.scales)

        oracle, plain = formula(x.double(), None if b is None else b.double()), formula(x, b)
    else:
        dense = unpack24(layer.values, layer.meta)
        oracle = F.linear(x.double(), dense.double(), None if b is None else b.double())
        plain = F.linear(x, dense, b)
    assert_close_to_oracle(y, oracle, plain)


def test_from_linear_chooses_by_score_and_keeps_the_bias():
    dense, scale = linear(), torch.rand(24) * 9
    layer = SparseLinear24.from_linear(dense, scale)
    values, meta = select24(dense.weight, scale)
    assert torch.equal(layer.values, values) and torch.equal(layer.meta, meta) and layer.bias is dense.bias
    assert not torch.equal(layer.meta, SparseLinear24.from_linear(dense).meta)
    assert torch.equal(layer.dequantize(), layer.to_linear().weight) and layer.to_linear().bias is dense.bias
    assert ((layer.dequantize() == dense.weight) | (layer.dequantize() == 0)).all()
    half = SparseLinear24.from_linear(dense, scale, torch.bfloat16)  # chosen before rounding
    assert (
        torch.equal(half.meta, meta)
        and torch.equal(half.values, values.bfloat16())
        and half.bias.dtype == half.values.dtype
    )
    int8 = SparseLinear24.from_linear(dense, scale, torch.int8)
    step = int8.scales[:, None]
    assert int8.values.dtype == torch.int8 and ((int8.dequantize() - layer.dequantize()).abs() <= 0.501 * step).all()
    assert "int8" in repr(int8) and "in_features=24, out_features=10, bias=True" in repr(int8)
    assert int8.packed_bytes == 10 * 12 + 10 * 3 + 40 and layer.packed_bytes == 10 * 12 * 4 + 10 * 3


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(InputError, match="multiple of 4"):
        SparseLinear24.from_linear(linear(22))
    with pytest.raises(InputError, match="multiple of 4"):
        SparseLinear24(22, 3)
    with pytest.raises(InputError, match="float8"):
        SparseLinear24.from_linear(linear(), dtype=torch.float8_e4m3fn)
    with pytest.raises(InputError, match="int16"):
        SparseLinear24(8, 3, weight_dtype=torch.int16)
    bad = linear()
    bad.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        SparseLinear24.from_linear(bad)
    with pytest.raises(InputError, match="not 2:4"):
        SparseLinear24.from_linear(linear(), exact=True)
    layer = SparseLinear24.from_linear(linear())
    for x in (torch.randn(2, 20), torch.randn(()), torch.randint(9, (2, 24))):
        for graded in (False, True):
            with torch.set_grad_enabled(graded), pytest.raises(InputError, match="linear24: x"):
                layer(x)


@pytest.mark.parametrize("weight_dtype", [None, torch.int8])
def test_state_dict(weight_dtype):
    layer = SparseLinear24.from_linear(linear(), dtype=weight_dtype)
    x = torch.randn(3, 24)
    state = layer.state_dict()
    assert set(state) == {"values", "meta", "weight", "bias"} | ({"scales"} if weight_dtype else set())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for assign in (False, True):
        fresh = SparseLinear24(24, 10, weight_dtype=weight_dtype)
        with torch.no_grad():
            assert torch.equal(fresh(x), torch.zeros(3, 10))  # prepared before loading
            file.seek(0)
            fresh.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
            assert torch.equal(fresh(x), layer(x))
    for strict in (True, False):  # a packed state must not pass for a dense one, nor the other way round
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            nn.Linear(24, 10).load_state_dict(state, strict=strict)
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            fresh.load_state_dict(linear().state_dict(), strict=strict)


@torch.no_grad()
def test_moving_casting_and_copying():
    layer, x = SparseLinear24.from_linear(linear()), torch.randn(2, 3, 24)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), y)
    twin.values.zero_()
    assert torch.equal(twin(x), twin.bias.expand(2, 3, 10)) and torch.equal(layer(x), y)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        cast = copy.deepcopy(layer).to(dtype)
        assert cast.values.dtype == cast.bias.dtype == dtype and cast.meta.dtype == torch.uint8
        assert (cast(x.to(dtype)).double() - y.double()).abs().max() < 0.2
        mixed = cast(x)  # x of another type is cast and the result cast back
        assert mixed.dtype == x.dtype and torch.equal(mixed, cast(x.to(dtype)).float())
    int8 = SparseLinear24.from_linear(linear(), dtype=torch.int8)
    scales = int8.scales.clone()
    int8.half()
    assert int8.values.dtype == torch.int8 and torch.equal(int8.scales, scales) and int8.bias.dtype == torch.float16
    assert int8(x.half()).dtype == torch.float16
    assert layer.to("meta").values.is_meta and layer.to_empty(device="cpu").values.device.type == "cpu"


@torch.no_grad()
def test_new_tensors_are_used_at_once():
    layer, other, x = (
        SparseLinear24.from_linear(linear()),
        SparseLinear24.from_linear(linear(seed=1)),
        torch.randn(2, 24),
    )
    layer(x)
    layer.values, layer.meta = other.values, other.meta
    assert torch.allclose(layer(x) - layer.bias, other(x) - other.bias, atol=1e-5)
    before = layer(x)
    layer.meta = SparseLinear24.from_linear(linear(seed=2)).meta
    assert not torch.equal(layer(x), before)
    layer.meta = other.meta
    layer.bias = nn.Parameter(torch.zeros(10))
    assert torch.allclose(layer(x), other(x) - other.bias, atol=1e-5)
    layer._buffers["values"] = torch.zeros_like(other.values)  # as accelerate's hooks do
    assert torch.equal(layer(x), torch.zeros(2, 10))
    layer.bias.data = torch.ones(10)
    assert torch.equal(layer(x), torch.ones(2, 10))


def test_gradients():
    layer = SparseLinear24.from_linear(linear(dtype=torch.float64))
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: linear24(x, layer.values, layer.meta, b), (x, layer.bias))
    dense = layer.to_linear()
    dense.bias = nn.Parameter(layer.bias.detach().clone())
    for one in (layer, dense):
        one(x).square().sum().backward()
    assert torch.allclose(layer.bias.grad, dense.bias.grad)
    only_bias = SparseLinear24.from_linear(linear())
    only_bias(torch.randn(5, 24)).sum().backward()
    assert torch.equal(only_bias.bias.grad, torch.full((10,), 5.0))


@pytest.mark.parametrize("int8", [False, True])
def test_compiled(int8):
    layer = SparseLinear24.from_linear(linear(), dtype=torch.int8 if int8 else None)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24, requires_grad=True)
    y = compiled(x)
    assert torch.equal(y, layer(x))
    (wanted,) = torch.autograd.grad(layer(x).sum(), x)
    y.sum().backward()
    assert torch.allclose(x.grad, wanted) and torch.equal(layer.bias.grad, torch.full((10,), 3.0))


def test_opcheck():
    layer = SparseLinear24.from_linear(linear())
    int8 = SparseLinear24.from_linear(linear(), dtype=torch.int8)
    x, graded = torch.randn(2, 3, 24), torch.randn(5, 24, requires_grad=True)
    torch.library.opcheck(_op, (graded, layer.values, layer.meta, layer.bias.detach().requires_grad_()))
    torch.library.opcheck(_op, (graded, layer.values, layer.meta))
    torch.library.opcheck(_op, (x[:0], layer.values, layer.meta))
    torch.library.opcheck(_op, (x, int8.values, int8.meta, None, int8.scales))


# models


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_sparsified_model_is_the_dense_model_with_zeros(family):
    model = tiny_model(family)
    before, names = model(IDS).logits, list(block_linears(model))
    report = sparsify_(model)
    assert list(report.layers) == names == list(packed_layers(model)) and len(names) == 21
    assert report.ratio == pytest.approx(0.53125) and "21 linear layers" in str(report) and "0.53x" in str(report)
    assert not [name for name in names if "lm_head" in name or "embed" in name]
    zeros = desparsify_(copy.deepcopy(model))
    assert not packed_layers(zeros) and (model(IDS).logits - zeros(IDS).logits).abs().max() < 1e-3
    assert (model(IDS).logits - before).abs().max() > 0.1
    assert ffn_bytes(model) < 0.6 * ffn_bytes(zeros)


@torch.no_grad()
def test_scores_are_input_norms():
    model, seen = tiny_model(), {}
    for name, module in block_linears(model).items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    plain = copy.deepcopy(model)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with input_norms(model) as norms:
        model(IDS)
        model(IDS[:1, :5])
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert norms.keys() == seen.keys()
    for name, inputs in seen.items():
        wanted = torch.cat([x.flatten(0, -2) for x in inputs]).double().norm(dim=0)
        assert torch.allclose(norms[name].double(), wanted, rtol=1e-5)
    sparsify_(model, norms)
    for name, layer in packed_layers(model).items():
        values, meta = select24(plain.get_submodule(name).weight, norms[name])
        assert torch.equal(layer.values, values) and torch.equal(layer.meta, meta)


def test_dense_weights_are_freed_and_ties_stay():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    gone = [weakref.ref(module.weight) for module in block_linears(model).values()]
    alive = []

    class Watched(dict):
        def __getitem__(self, name):
            alive.append(sum(ref() is not None for ref in gone))
            return super().__getitem__(name)

    sparsify_(model, Watched({name: torch.ones(module.in_features) for name, module in block_linears(model).items()}))
    gc.collect()
    assert not [ref for ref in gone if ref() is not None]
    assert alive[-1] <= 2  # one by one: never all dense and all packed weights at once
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(InputError, match=r"lm_head\.weight is tied"):
        sparsify_(model, filter_fn=lambda name, linear: name == "lm_head")
    with pytest.raises(InputError, match="no linear layer to pack"):
        sparsify_(model)


def test_filter_dtype_and_slim_models():
    model = tiny_model()
    masks = [torch.arange(64) % 8 < 5 for _ in range(3)]
    slim_(model, masks)
    report = sparsify_(model, filter_fn=lambda name, linear: "mlp" in name, dtype=torch.int8)
    assert len(report.layers) == 9 and models.widths(model) == [40] * 3
    assert {layer.values.dtype for layer in packed_layers(model).values()} == {torch.int8}
    sparsify_(model, filter_fn=lambda name, linear: name.endswith("o_proj"), dtype=torch.bfloat16)
    assert model(IDS).logits.isfinite().all() and model(IDS).logits.dtype == torch.float32
    with pytest.raises(InputError, match="cut first, then pack"):
        slim_(model, [torch.ones(40, dtype=torch.bool)] * 3)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert sparsify_(plain, filter_fn=lambda name, linear: True).layers == ("0", "2")
    with pytest.raises(InputError, match="decoder layers"):
        sparsify_(nn.Sequential(nn.Linear(8, 8)))


def odd_width(model):
    slim_(model, [torch.arange(64) < 38] * 3)


def not_finite(model):
    model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.inf


@pytest.mark.parametrize(
    "spoil, scores, said",
    [
        (odd_width, None, "38 inputs; 2:4 packing needs a multiple of 4"),
        (not_finite, None, "up_proj.weight holds Inf or NaN"),
        (lambda model: None, {}, "scores has nothing for model.layers.0"),
        (lambda model: None, "short", "must be 32 finite numbers"),
    ],
)
def test_a_refusal_changes_nothing(spoil, scores, said):
    model = tiny_model()
    spoil(model)
    if scores == "short":
        scores = {name: torch.ones(module.in_features) for name, module in block_linears(model).items()}
        scores["model.layers.2.mlp.up_proj"] = torch.ones(3)
    with pytest.raises(InputError, match=said):
        sparsify_(model, scores)
    assert not packed_layers(model)


def test_exact():
    model = tiny_model()
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.q_proj: the weight is not 2:4"):
        sparsify_(model, exact=True)
    sparsify_(model)
    again = desparsify_(copy.deepcopy(model))
    sparsify_(again, exact=True)
    for (_, a), (_, b) in zip(packed_layers(model).items(), packed_layers(again).items(), strict=True):
        assert torch.equal(a.dequantize(), b.dequantize())


def test_public_names():
    assert pp.SparseLinear24 is SparseLinear24 and pp.sparsify_ is sparsify_ and callable(pp.save_packed)


# corrupt input


def test_ten_thousand_corrupt_inputs():
    """Random bytes as metadata, and tensors of wrong sizes and types: refused in a sentence, or the defined sum."""
    generator = torch.Generator().manual_seed(0)

    def draw(most):
        return int(torch.randint(most, (), generator=generator))

    def whole(shape, dtype):  # small integers, so that every sum is exact in float32
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    counts = {"refused": 0, "defined": 0, "corrupt": 0}
    with torch.no_grad():
        for case in range(10_000):
            m, n, groups, int8 = draw(4), 1 + draw(19), 1 + draw(12), case % 4 == 3
            meta = torch.randint(256, (n, (groups + 1) // 2), dtype=torch.uint8, generator=generator)
            values = whole((n, 2 * groups), torch.int8 if int8 else DTYPES[case % 3])
            scales = torch.ones(n) if int8 else None
            x = whole((m, 4 * groups), torch.float32 if int8 else values.dtype)
            if case % 5 == 0:  # also wrong beyond the bytes
                spoilt = draw(5)
                meta = meta[:, :-1] if spoilt == 0 else meta.long() if spoilt == 1 else meta
                values = values[:, :-1] if spoilt == 2 else values
                x = x[:, 1:] if spoilt == 3 else x
                scales = torch.ones(n + 1) if int8 and spoilt == 4 else scales
            if case % 2:
                layer = SparseLinear24(4, 1, bias=False)
                layer.values, layer.meta, layer.scales = values, meta, scales
                layer.weight = layer.weight.to(x.dtype)
            try:
                y = layer(x) if case % 2 else linear24(x, values, meta, scales=scales)
            except InputError:
                counts["refused"] += 1
                continue
            counts["defined"] += 1
            try:
                check24(values, meta, scales)
            except InputError:
                counts["corrupt"] += 1
            if int8:
                wanted = linear24(x, values, meta, scales=scales, backend="reference")
                assert torch.allclose(y, wanted, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(y, F.linear(x.float(), unpack24(values.float(), meta)).to(x.dtype))
    assert counts["refused"] > 500 and counts["corrupt"] > 7000 and sum(counts.values()) - counts["corrupt"] == 10_000
