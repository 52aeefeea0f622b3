"""Block-by-block repair: its formula on the last block, what it does to held-out answers, and what it leaves alone."""

import copy
import math
from functools import partial

import pytest
import torch

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.evaluation.metrics import dense_reference, fidelity
from persona_pruner.nn import slim_copy
from persona_pruner.nn.sparse import block_linears
from persona_pruner.packing import hidden_states, pack
from persona_pruner.prefix_attention import prefix_attention
from persona_pruner.search.baselines import prune, two_four
from persona_pruner.search.layerwise import block_inputs, run_block
from persona_pruner.search.masks import top_k_per_layer
from persona_pruner.search.repair import PROMPT_WEIGHT, TILT, repair_, ridge_solve, tilted
from persona_pruner.search.scores import Context, input_sqnorms
from persona_pruner.testing import FAMILIES, tiny_examples, tiny_model


@pytest.fixture
def case():
    dense, examples = tiny_model(), tiny_examples(60)
    packs = pack(examples, 240)
    masks = top_k_per_layer(input_sqnorms(Context(dense, packs)), 0.5)
    return dense, examples, packs, masks


def seen(model, packs):
    """Of the last block: what enters o_proj, the stream before the FFN, what enters the FFN and down_proj, and the
    stream behind it, float64 [tokens, ...]."""
    block = models.decoder_layers(model)[-1]
    rows = {name: [] for name in ("a", "n", "h", "out", "ffn")}

    def note(module, entered=None, gave=None):
        def hook(_, args, out):
            if entered:
                rows[entered].append(args[0][0])
            if gave:
                rows[gave].append(out[0])

        return module.register_forward_hook(hook)

    hooks = [
        note(block.self_attn.o_proj, "a"),
        note(block.mlp, "n", "ffn"),
        note(block.mlp.down_proj, "h"),
        note(block, gave="out"),
    ]
    with torch.no_grad():
        for batch in packs:
            hidden_states(model, batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(found).double() for name, found in rows.items()}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_last_block_is_least_squares(case, share):
    dense, _, packs, masks = case
    slim = repair_(slim_copy(dense, masks), dense, packs, ridge=1e-3, share=share)
    ours, theirs = seen(slim, packs), seen(dense, packs)
    weight = torch.cat([torch.where(batch.segment == 0, PROMPT_WEIGHT, 1.0) for batch in packs]).double()[:, None]
    block, slim_block = models.decoder_layers(dense)[-1], models.decoder_layers(slim)[-1]

    def want(entered, target, start):
        gram = entered.T @ (entered * weight)
        r = 1e-3 * gram.diagonal().mean()
        right = (target * weight).T @ entered + r * start.double()
        return right @ torch.linalg.inv(gram + r * torch.eye(len(gram), dtype=torch.float64))

    wide = block.self_attn.o_proj.weight.detach()
    given = ours["a"] @ wide.double().T
    before = (ours["out"] - ours["ffn"]) - ours["a"] @ slim_block.self_attn.o_proj.weight.detach().double().T
    target = given + share * (theirs["out"] - theirs["ffn"] - before - given)
    got = slim_block.self_attn.o_proj.weight.detach().double()
    torch.testing.assert_close(got, want(ours["a"], target, wide), rtol=1e-3, atol=1e-3)

    with torch.no_grad():
        whole = block.mlp(ours["n"].float()).double()
    target = whole + share * (theirs["out"] - (ours["out"] - ours["ffn"]) - whole) - block.mlp.down_proj.bias.double()
    start = block.mlp.down_proj.weight.detach()[:, masks[-1]]
    got = slim_block.mlp.down_proj.weight.detach().double()
    torch.testing.assert_close(got, want(ours["h"], target, start), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_nearer_to_dense_than_the_mask(case, family):
    dense, (_, examples, packs, masks) = tiny_model(family), case
    reference, told = dense_reference(dense, examples), []
    slim = slim_copy(dense, masks)
    before = fidelity(slim, reference).kl
    repair_(slim, dense, packs, step=told.append)
    assert fidelity(slim, reference).kl < 0.9 * before
    assert sum(told) == len(models.decoder_layers(dense))


def test_only_what_writes_into_the_stream_changes(case):
    dense, _, packs, masks = case
    before, start = copy.deepcopy(dense.state_dict()), slim_copy(dense, masks)
    slim = repair_(copy.deepcopy(start), dense, packs)
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    old = start.state_dict()
    changed = {name for name, tensor in slim.state_dict().items() if not torch.equal(old[name], tensor)}
    assert changed and all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    assert not any(module._forward_hooks for model in (dense, slim) for module in model.modules())


def test_a_pattern_that_changes_nothing(case):
    """Every linear of every block goes through `replace` with what it is fed, tokens weighted."""
    dense, _, packs, masks = case
    given = []

    def same(weight, gram):
        given.append((weight.shape, gram))
        return weight

    start = slim_copy(dense, masks)
    slim = repair_(copy.deepcopy(start), dense, packs, replace=same)
    plain = repair_(copy.deepcopy(start), dense, packs).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in slim.state_dict().items())
    block = models.decoder_layers(slim)[-1]
    attention, mlp = block.self_attn, block.mlp
    rows = [sum(m.out_features for m in group) for group in ((attention.q_proj, attention.k_proj, attention.v_proj),)]
    rows += [attention.o_proj.out_features, 2 * mlp.gate_proj.out_features, mlp.down_proj.out_features]
    blocks = len(models.decoder_layers(slim))
    assert [shape[0] for shape, _ in given] == rows * blocks
    weight = torch.cat([torch.where(batch.segment == 0, PROMPT_WEIGHT, 1.0) for batch in packs]).double()[:, None]
    ours = seen(slim, packs)
    for (_, gram), name in zip(given[-3:], ("a", "n", "h"), strict=True):
        torch.testing.assert_close(gram.double(), ours[name].T @ (ours[name] * weight), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_of_four(case, family):
    dense, (_, examples, packs, masks) = tiny_model(family), case
    reference = dense_reference(dense, examples)
    published = prune("sparsegpt-2:4", Context(dense, packs), 0.5)
    slim = repair_(copy.deepcopy(dense), dense, packs, replace=two_four.sparsegpt_weight)
    for linear in block_linears(slim).values():
        assert int((linear.weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) == 2
    assert fidelity(slim, reference).kl < fidelity(published, reference).kl
    cut = repair_(slim_copy(dense, masks), dense, packs, replace=two_four.sparsegpt_weight, ffn_only=True)
    for name, linear in block_linears(cut).items():
        sparse = int((linear.weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) == 2
        assert sparse == (".mlp." in name)
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            assert torch.equal(linear.weight, dense.get_submodule(name).weight)


def test_nothing_removed_changes_nothing_much(case):
    dense, _, packs, _ = case
    slim = repair_(copy.deepcopy(dense), dense, packs)
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(slim.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_bfloat16(case):
    dense, examples, packs, masks = case
    dense = dense.to(torch.bfloat16)
    slim = repair_(slim_copy(dense, masks), dense, packs)
    assert slim.dtype == torch.bfloat16
    reference = dense_reference(dense, examples)
    assert fidelity(slim, reference).kl < fidelity(slim_copy(dense, masks), reference).kl


def test_other_streams_have_no_share(case):
    """Gemma norms what a block adds, Granite scales it: each block is mended alone, and a share is refused."""
    scaled = tiny_model()
    for block in models.decoder_layers(scaled):
        block.register_forward_hook(lambda _, args, out: out * 0.5)
    for dense in (tiny_model("gemma3"), scaled):
        slim = slim_copy(dense, case[3])
        got = repair_(copy.deepcopy(slim), dense, case[2]).state_dict()
        want = repair_(copy.deepcopy(slim), dense, case[2], share=0.0).state_dict()
        assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())
        with pytest.raises(InputError, match="needs blocks that add"):
            repair_(slim, dense, case[2], share=0.5)


def test_attention_of_another_kind_is_refused(case):
    other = tiny_model()
    models.decoder_layers(other)[1].self_attn = torch.nn.Identity()
    with pytest.raises(InputError, match=r"needs self_attn\.o_proj in every block"):
        repair_(copy.deepcopy(other), other, case[2])


def test_no_data_is_refused(case):
    with pytest.raises(InputError, match="needs examples"):
        repair_(slim_copy(case[0], case[3]), case[0], [])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_families(case, family, dtype):
    dense = tiny_model(family, dtype=dtype)
    slim = repair_(slim_copy(dense, case[3]), dense, case[2])
    assert slim.dtype == dtype and all(p.isfinite().all() for p in slim.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_block_inputs_carry_a_whole_pass(case, family):
    dense, packs = tiny_model(family), case[2]
    blocks = models.decoder_layers(dense)
    wrapped = blocks[1].forward = partial(type(blocks[1]).forward, blocks[1])  # as libraries that move weights do
    first, rest = block_inputs(dense, packs)
    assert [vars(block).get("forward") for block in blocks] == [None, wrapped, None]
    for number, (batch, x) in enumerate(zip(packs, first, strict=True)):
        with torch.no_grad(), prefix_attention(dense.get_decoder()):
            for block, others in zip(blocks, rest, strict=True):
                x = run_block(block, x, others[number])
            got = dense.get_decoder().norm(x)
        with torch.no_grad():
            torch.testing.assert_close(got, hidden_states(dense, batch).last_hidden_state, rtol=0, atol=0)


def test_ridge_solve_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    a, weight = torch.randn(500, 24, generator=generator), torch.randn(10, 24, generator=generator)
    a = a @ torch.randn(24, 24, generator=generator)  # channels that can stand in for each other
    y = torch.randn(500, 10, generator=generator)
    want = torch.linalg.lstsq(a.double(), y.double()).solution.T
    torch.testing.assert_close(ridge_solve(y.T @ a, a.T @ a, weight, 0.0).double(), want, rtol=1e-3, atol=1e-3)
    # With ridge the same as least squares with sqrt(r) more rows that ask for the weights as they are.
    root = (0.3 * (a.T @ a).diagonal().mean()).sqrt()
    rows, asked = torch.cat([a, root * torch.eye(24)]), torch.cat([y, root * weight.T])
    want = torch.linalg.lstsq(rows.double(), asked.double()).solution.T
    torch.testing.assert_close(ridge_solve(y.T @ a, a.T @ a, weight, 0.3).double(), want, rtol=1e-4, atol=1e-4)
    silent = torch.zeros(24, 24)  # channels that never fired: weights stay
    torch.testing.assert_close(ridge_solve(torch.zeros(10, 24), silent, weight, 0.1), weight)


def test_later_blocks_are_favoured():
    scores = [torch.tensor([1.0, 2.0]) for _ in range(5)]
    found = tilted(scores)
    assert torch.equal(found[2], scores[2])
    assert (found[4] / found[0]).tolist() == pytest.approx([math.exp(TILT)] * 2)
    assert torch.equal(tilted(scores[:1])[0], scores[0] * math.exp(-TILT / 2))
