"""Gumbel-softmax and soft top-k by their formulas."""

import pytest
import torch

from persona_pruner.errors import InputError
from persona_pruner.evaluation.metrics import dense_reference, fidelity
from persona_pruner.nn import masked
from persona_pruner.search import relaxed, ste
from persona_pruner.search.scores import Context, channel_scores
from persona_pruner.testing import tiny_examples, tiny_model


def scores(layers=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, generator=generator, requires_grad=True) for _ in range(layers)]


def test_soft_masks_sum_to_what_is_kept():
    found = relaxed.soft_masks(scores(), 0.25, "layer", 0.5, None)
    assert all(mask.sum().item() == pytest.approx(48, abs=1e-3) for mask in found)
    wide = relaxed.soft_masks(scores(), 0.25, "global", 0.5, None)
    assert sum(mask.sum().item() for mask in wide) == pytest.approx(144, abs=1e-2)
    assert wide[0].sum().item() != pytest.approx(48, abs=0.05)
    leaf = scores()[0]
    (mask,) = relaxed.soft_masks([leaf], 0.5, "layer", 0.3, None)
    theta = leaf[0].item() - 0.3 * mask[0].logit().item()
    torch.testing.assert_close(mask, torch.sigmoid((leaf - theta) / 0.3), rtol=1e-3, atol=1e-4)
    mask.sum().backward()
    torch.testing.assert_close(leaf.grad, mask.detach() * (1 - mask.detach()) / 0.3)  # theta is held
    (cold,) = relaxed.soft_masks([leaf.detach()], 0.5, "layer", 1e-4, None)
    assert torch.equal(cold > 0.5, leaf >= leaf.sort(descending=True).values[31])


def test_gumbel_noise_is_logistic():
    leaf = [torch.zeros(20000)]
    (mask,) = relaxed.soft_masks(leaf, 0.5, "layer", 1.0, torch.Generator().manual_seed(0))
    noise = mask.logit()  # theta is 0 for equal scores and half kept
    assert noise.mean().abs() < 0.05 and noise.var().item() == pytest.approx(torch.pi**2 / 3, rel=0.05)
    again = relaxed.soft_masks(leaf, 0.5, "layer", 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], mask)


@pytest.mark.parametrize("kind", relaxed.KINDS)
def test_a_search_lowers_the_divergence(kind):
    model, examples = tiny_model(), tiny_examples(8)
    start = channel_scores("random", Context(model))
    settings = ste.Settings(ratio=0.5, steps=30, lr=0.3, budget=400, multiple=1)
    teacher = ste.teacher_states(model, examples, 400)
    reference = dense_reference(model, examples)

    def kl(masks):
        with masked(model, masks):
            return fidelity(model, reference).kl

    before = kl(relaxed.search(model, examples, start, ste.Settings(ratio=0.5, steps=0), teacher, kind))
    masks = relaxed.search(model, examples, start, settings, teacher, kind)
    assert [int(mask.sum()) for mask in masks] == [32] * 3 and kl(masks) < 0.8 * before
    again = relaxed.search(model, examples, start, settings, teacher, kind)
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_an_unknown_relaxation():
    with pytest.raises(InputError, match="relaxation 'hard' is not one of gumbel, soft-top-k"):
        relaxed.search(tiny_model(), tiny_examples(2), scores(), ste.Settings(), [], "hard")
