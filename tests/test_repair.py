"""Refitted W_down: against torch.linalg.lstsq, and what it does to the layers' outputs."""

import pytest
import torch

from persona_pruner import models
from persona_pruner.packing import hidden_states, pack
from persona_pruner.search import repair
from persona_pruner.search.repair import PROMPT_WEIGHT, grams, refit, repaired_down
from persona_pruner.testing import FAMILIES, tiny_examples, tiny_model


def random_masks(model, share=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(width, generator=generator) < share for width in models.widths(model)]


def inputs_of(model, packs):
    """What enters each down_proj [tokens, C] and the weight of each token, over all packs."""
    inputs = [[] for _ in models.gated_mlps(model)]
    hooks = [
        mlp.down_proj.register_forward_hook(lambda _, args, out, rows=rows: rows.append(args[0][0]))
        for mlp, rows in zip(models.gated_mlps(model), inputs, strict=True)
    ]
    for batch in packs:
        hidden_states(model, batch)
    for hook in hooks:
        hook.remove()
    weight = torch.cat([torch.where(batch.segment == 0, PROMPT_WEIGHT, 1.0) for batch in packs])
    return [torch.cat(rows) for rows in inputs], weight


@pytest.fixture
def packs():
    return pack(tiny_examples(60), budget=120)


def test_refit_without_ridge_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(500, 24, generator=generator), torch.randn(10, 24, generator=generator)
    h = h @ torch.randn(24, 24, generator=generator)  # channels that can stand in for each other
    mask = torch.rand(24, generator=generator) < 0.5
    got = refit(weight, h.T @ h, mask, ridge=0.0)
    want = torch.linalg.lstsq(h[:, mask].double(), (h @ weight.T).double()).solution.T
    assert got.dtype == torch.float32 and (got[:, ~mask] == 0).all()
    torch.testing.assert_close(got[:, mask].double(), want, rtol=1e-3, atol=1e-3)
    assert (got[:, mask] - weight[:, mask]).abs().max() > 0.1


def test_ridge_pulls_towards_the_weights():
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(500, 24, generator=generator), torch.randn(10, 24, generator=generator)
    mask, ridge = torch.arange(24) % 2 == 0, 0.3
    gram = h.T @ h
    got = refit(weight, gram, mask, ridge)
    # The same as least squares with sqrt(r) more rows that ask for the weights as they are.
    root = (ridge * gram.diagonal().mean()).sqrt()
    rows = torch.cat([h[:, mask], root * torch.eye(12)]).double()
    asked = torch.cat([h @ weight.T, root * weight[:, mask].T]).double()
    want = torch.linalg.lstsq(rows, asked).solution.T
    torch.testing.assert_close(got[:, mask].double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(refit(weight, gram, mask, 1e6)[:, mask], weight[:, mask], rtol=1e-3, atol=1e-3)


def test_refit_of_nothing_and_of_everything():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, False, True, True, False, True])
    silent = refit(weight, torch.zeros(6, 6), mask, 0.1)  # channels that never fired: weights stay
    torch.testing.assert_close(silent, weight * mask)
    gram = torch.eye(6) + 0.3
    torch.testing.assert_close(refit(weight, gram, torch.ones(6, dtype=torch.bool), 0.1), weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_grams_are_weighted_sums_of_the_dense_inputs(family, packs):
    model, told = tiny_model(family), []
    got = grams(model, packs, [0, 2], told.append)
    inputs, weight = inputs_of(model, packs)
    assert set(got) == {0, 2} and sum(told) == len(packs)
    for index, gram in got.items():
        want = inputs[index].double().T @ (inputs[index].double() * weight[:, None])
        torch.testing.assert_close(gram.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert not any(mlp.down_proj._forward_pre_hooks for mlp in models.gated_mlps(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_repair_lowers_every_layers_error(family, packs):
    model = tiny_model(family)
    masks = random_masks(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    (downs,) = repaired_down(model, packs, [masks], ridge=0.01)
    inputs, weight = inputs_of(model, packs)
    for mlp, h, down, mask in zip(models.gated_mlps(model), inputs, downs, masks, strict=True):
        assert (down[:, ~mask] == 0).all() and down.dtype == mlp.down_proj.weight.dtype
        dense = mlp.down_proj.weight

        def error(new, h=h, dense=dense):
            return float((((h @ (new - dense).T) ** 2).sum(1) * weight).sum())

        assert error(down) < 0.9 * error(dense * mask)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_several_masks_share_the_pass_and_layers_may_take_many(packs, monkeypatch):
    model, told = tiny_model(), []
    choices = [random_masks(model, seed=seed) for seed in (1, 2)]
    both = repaired_down(model, packs, choices, step=told.append)
    assert sum(told) == len(packs)
    (second,) = repaired_down(model, packs, choices[1:])
    assert all(torch.equal(a, b) for a, b in zip(both[1], second, strict=True))
    monkeypatch.setattr(repair, "BUDGET", 4 * 64 * 64 + 1)  # one layer's H
    told.clear()
    again = repaired_down(model, packs, choices, step=told.append)
    assert sum(told) == 3 * len(packs)
    for one, other in zip(both, again, strict=True):
        assert len(other) == 3 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_low_precision(packs):
    model = tiny_model(dtype=torch.bfloat16)
    masks = random_masks(model)
    (downs,) = repaired_down(model, packs, [masks])
    (wide,) = repaired_down(tiny_model(), packs, [masks])
    for down, oracle in zip(downs, wide, strict=True):
        assert down.dtype == torch.bfloat16
        assert (down.float() - oracle).norm() < 0.1 * oracle.norm()


def test_float16_sums_do_not_overflow(packs):
    model = tiny_model(dtype=torch.float16, mlp_bias=False)
    with torch.no_grad():
        for mlp in models.gated_mlps(model):
            mlp.up_proj.weight.mul_(256)
            mlp.down_proj.weight.div_(256)
    got = grams(model, packs, [0])[0]
    inputs, weight = inputs_of(model, packs)
    want = inputs[0].double().T @ (inputs[0].double() * weight[:, None])
    assert want.abs().max() > 10 * torch.finfo(torch.float16).max
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2 * want.abs().max().item())
