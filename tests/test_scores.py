"""Channel scores by their defining formulas, computed with plain autograd."""

import pytest
import torch
from torch import nn

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.packing import hidden_states, logits, pack
from persona_pruner.search.losses import draw
from persona_pruner.search.scores import SCORES, Context, balanced, channel_scores, repeats
from persona_pruner.testing import FAMILIES, tiny_examples, tiny_model


class PlainMLP(nn.Module):
    """The MLP as transformers computes it, with a mask for each token and channel."""

    def __init__(self, mlp, mask):
        super().__init__()
        self.mlp, self.mask = mlp, mask

    def forward(self, x):
        self.h = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        return self.mlp.down_proj(self.h * self.mask)


def plain(model, packs, labels):
    """(Wanda norms squared, sum of d/dm, sum of (d/dm)^2) a layer, with m of every token a leaf; float64."""
    model = model.double()
    layers = model.model.layers
    norms, first, second = ([torch.zeros(64, dtype=torch.float64) for _ in layers] for _ in range(3))
    for batch, target in zip(packs, labels, strict=True):
        mlps = [layer.mlp for layer in layers]
        masks = [torch.ones(1, len(batch.input_ids), 64, dtype=torch.float64, requires_grad=True) for _ in layers]
        for layer, mask in zip(layers, masks, strict=True):
            layer.mlp = PlainMLP(layer.mlp, mask)
        states = hidden_states(model, batch).last_hidden_state[0, batch.predict]
        torch.nn.functional.cross_entropy(model.lm_head(states), target, reduction="sum").backward()
        for index, (layer, mask) in enumerate(zip(layers, masks, strict=True)):
            norms[index] += layer.mlp.h.detach().square().sum((0, 1))
            first[index] += mask.grad.sum((0, 1))
            second[index] += mask.grad.square().sum((0, 1))
            layer.mlp = mlps[index]
    return norms, first, second


def close(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32 and a.shape == (64,)
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=1e-4 * b.abs().max().item())


@pytest.fixture
def packs():
    packs = pack(tiny_examples(6), budget=40)
    assert len(packs) > 1
    return packs


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_and_taylor(family, packs):
    model, told = tiny_model(family), []
    context = Context(model, packs, step=told.append)
    wanda, taylor = channel_scores("wanda", context), channel_scores("taylor", context)
    norms, first, _ = plain(tiny_model(family), packs, [batch.target for batch in packs])
    downs = [mlp.down_proj.weight.double().abs().sum(0) for mlp in models.gated_mlps(model)]
    close(wanda, [norm.sqrt() * down for norm, down in zip(norms, downs, strict=True)])
    close(taylor, [score.abs() for score in first])
    assert sum(told) == 2 * len(packs)


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_a_token_with_sampled_labels(family, packs):
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(11)
    labels = []
    for batch in packs:  # drawn as the formula says: from the model's own distribution
        states = hidden_states(model, batch).last_hidden_state[0, batch.predict]
        labels.append(draw(logits(model, states), generator))
    got = channel_scores("fisher", Context(model, packs, seed=11))
    close(got, plain(tiny_model(family), packs, labels)[2])
    assert not torch.equal(got[0], channel_scores("fisher", Context(model, packs, seed=12))[0])


def test_magnitude_and_random():
    model = tiny_model()
    got = channel_scores("magnitude", Context(model))
    mlp = model.model.layers[1].mlp
    rows = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], 1)
    torch.testing.assert_close(got[1], rows.norm(dim=1))
    one, again, other = (channel_scores("random", Context(model, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0], again[0]) and not torch.equal(one[0], other[0]) and not torch.equal(one[0], one[1])
    with pytest.raises(InputError, match="score 'luck' is not one of random, magnitude, wanda, taylor, fisher"):
        channel_scores("luck", Context(model))


@pytest.mark.parametrize("method", SCORES)
def test_the_model_is_as_before(method, packs):
    model = tiny_model()
    mlps, before = models.gated_mlps(model), {name: p.clone() for name, p in model.state_dict().items()}
    logits_before, random_state = model(packs[0].input_ids[None]).logits, torch.get_rng_state()
    scores = channel_scores(method, Context(model, packs))
    assert models.gated_mlps(model) == mlps
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(mlp.down_proj._forward_pre_hooks for mlp in mlps)
    assert torch.equal(model(packs[0].input_ids[None]).logits, logits_before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(score.requires_grad for score in scores) and all((score >= 0).all() for score in scores)
    again = channel_scores(method, Context(model, packs))
    assert all(torch.equal(a, b) for a, b in zip(scores, again, strict=True))


def test_hooks_are_gone_after_an_error(packs):
    model = tiny_model()

    def stop(done):
        raise KeyboardInterrupt

    for method in ("wanda", "taylor", "fisher"):
        with pytest.raises(KeyboardInterrupt):
            channel_scores(method, Context(model, packs, step=stop))
        assert not any(mlp.down_proj._forward_pre_hooks for mlp in models.gated_mlps(model))


def test_neutral_prose_counts_for_a_share_whatever_its_length():
    own, neutral = [torch.tensor([1.0, 2.0])], [torch.tensor([10.0, 40.0])]
    mine, texts = pack(tiny_examples(6)), pack(tiny_examples(2, seed=5))
    count = [sum(len(batch.predict) for batch in packs) for packs in (mine, texts)]
    (found,) = balanced(own, mine, neutral, texts, 0.3)
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0]) + 0.3 * count[0] / count[1] * torch.tensor([10.0, 40.0]))
    (twice,) = balanced(own, mine, [2 * neutral[0]], [*texts, *texts], 0.3)
    torch.testing.assert_close(twice, found)


def test_neutral_prose_is_repeated_up_to_its_weight():
    assert [repeats(1000, 100, weight) for weight in (0, 0.1, 0.24, 0.26, 1)] == [1, 1, 2, 3, 10]
    assert repeats(50, 100, 0.4) == repeats(50, 0, 0.4) == 1
