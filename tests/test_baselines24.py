"""2:4 baselines and the block-by-block replacement they are made with."""

import pytest
import torch

from persona_pruner import models
from persona_pruner.nn.sparse import block_linears
from persona_pruner.packing import hidden_states, pack
from persona_pruner.search.baselines import prune, two_four
from persona_pruner.search.layerwise import chosen_linears, replace_weights_
from persona_pruner.search.scores import Context
from persona_pruner.testing import FAMILIES, tiny_examples, tiny_model


@pytest.fixture
def packs():
    return pack(tiny_examples(8), budget=40)


def plain_keep(score):
    """bool: the best two of each four, ties to the first."""
    groups = score.reshape(len(score), -1, 4)
    order = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).reshape(score.shape)


def random_case(rows=6, columns=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) + 2 * torch.eye(columns)
    x = torch.randn(200, columns, generator=generator) @ mix
    return weight, x


def surgeon(weight, gram, damp):
    """SparseGPT by its definition: the inverse of H over the columns not yet passed is made anew for each column."""
    w, h = weight.double().clone(), gram.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h))
    for j in range(len(h)):
        if j % 4 == 0:
            pivots = torch.stack([torch.linalg.inv(h[k:, k:])[0, 0] for k in range(j, j + 4)])
            keep = plain_keep(w[:, j : j + 4].square() / pivots)
        inverse = torch.linalg.inv(h[j:, j:])
        lost = torch.where(keep[:, j % 4], 0.0, w[:, j])
        w[:, j:] -= lost[:, None] * inverse[0] / inverse[0, 0]
        w[:, j] = torch.where(keep[:, j % 4], w[:, j], 0.0)
    return w


@pytest.mark.parametrize("block", [4, 8, 128])
def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column(block):
    weight, x = random_case()
    gram = x.T @ x
    got = two_four.sparsegpt_weight(weight, gram, 0.01, block)
    want = surgeon(weight, gram, 0.01)
    assert torch.equal(got != 0, want != 0)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)
    assert ((got != 0).reshape(6, -1, 4).sum(-1) == 2).all()
    error = ((x @ (got - weight).T) ** 2).sum()
    assert error < 0.8 * ((x @ (two_four.wanda_weight(weight, gram) - weight).T) ** 2).sum()


def test_sparsegpt_on_uncorrelated_inputs_is_wanda():
    weight, _ = random_case()
    gram = torch.rand(24, generator=torch.Generator().manual_seed(3)).add(0.1).diag()
    got = two_four.sparsegpt_weight(weight, gram, 0.0)
    torch.testing.assert_close(got, weight * plain_keep(weight.abs() * gram.diagonal().sqrt()))


def test_silent_inputs_lose_their_weights():
    weight, x = random_case()
    x[:, :3] = 0
    got = two_four.sparsegpt_weight(weight, x.T @ x)
    assert (got[:, :3] == 0).all() and got.isfinite().all()


def test_magnitude_and_wanda_keep_two_of_four():
    weight, x = random_case()
    assert torch.equal(two_four.keep_two(weight), weight * plain_keep(weight.abs()))
    norm = x.norm(dim=0)
    assert torch.equal(two_four.wanda_weight(weight, x.T @ x), weight * plain_keep(weight.abs() * norm))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_h_is_what_enters_the_new_model(family, packs):
    """The blocks before have their new weights; within a block all linears are measured first."""
    model, asked = tiny_model(family), []

    def halve(weight, gram):
        asked.append((weight.clone(), gram))
        return 0.5 * weight

    told = []
    changed = replace_weights_(tiny_model(family), packs, halve, step=told.append)
    assert sum(told) == 3 and len(asked) == 3 * 4
    linears, halved = block_linears(model), block_linears(changed)
    assert all(torch.equal(halved[name].weight, 0.5 * linear.weight) for name, linear in linears.items())
    # the third block's H, with the first two blocks halved and the third as it was
    third = tiny_model(family)
    for number in (0, 1):
        third.model.layers[number].load_state_dict(changed.model.layers[number].state_dict())
    block, rows = third.model.layers[2], {}
    readers = (block.self_attn.q_proj, block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.down_proj)
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, i=i: rows.setdefault(i, []).append(args[0][0].double()))
        for i, linear in enumerate(readers)
    ]
    for batch in packs:
        hidden_states(third, batch)
    for hook in hooks:
        hook.remove()
    for place in range(4):
        x = torch.cat(rows[place])
        weight, gram = asked[8 + place]
        want = x.T @ x
        torch.testing.assert_close(gram.double(), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
        assert weight.shape[1] == readers[place].in_features
    assert asked[8][0].shape[0] == (4 + 2 + 2) * 8 and asked[10][0].shape[0] == 128


@pytest.mark.parametrize("name", ["magnitude-2:4", "wanda-2:4", "sparsegpt-2:4"])
def test_models(name, packs):
    model = tiny_model()
    before = {key: p.clone() for key, p in model.state_dict().items()}
    pruned = prune(name, Context(model, packs), 0.5)
    for linear in block_linears(pruned).values():
        assert ((linear.weight != 0).reshape(len(linear.weight), -1, 4).sum(-1) <= 2).all()
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())
    assert hidden_states(pruned, packs[0]).last_hidden_state.isfinite().all()
    if name == "magnitude-2:4":
        linear = model.model.layers[0].self_attn.o_proj
        want = linear.weight * plain_keep(linear.weight.abs())
        assert torch.equal(pruned.model.layers[0].self_attn.o_proj.weight, want)


def test_ffn_only(packs):
    model = tiny_model()
    assert len(chosen_linears(model, True)) == 9 and len(chosen_linears(model, False)) == 21
    for method in (two_four.magnitude, two_four.wanda, two_four.sparsegpt):
        pruned = method(Context(model, packs), ffn_only=True)
        for old, new in zip(models.decoder_layers(model), models.decoder_layers(pruned), strict=True):
            assert torch.equal(old.self_attn.q_proj.weight, new.self_attn.q_proj.weight)
            assert (new.mlp.up_proj.weight == 0).float().mean() == 0.5


def test_sparsegpt_is_nearer_to_the_dense_model_than_wanda(packs):
    model = tiny_model(dtype=torch.float32)
    wanted = hidden_states(model, packs[0]).last_hidden_state
    wanda, gpt = (
        (hidden_states(prune(name, Context(model, packs), 0.5), packs[0]).last_hidden_state - wanted).norm()
        for name in ("wanda-2:4", "sparsegpt-2:4")
    )
    assert gpt < wanda
