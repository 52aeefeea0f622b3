"""Masked, repaired and slimmed MLPs do the same."""

import copy

import pytest
import torch

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.nn import MaskedMLP, ffn_bytes, masked, slim_, slim_copy
from persona_pruner.testing import FAMILIES, tiny_model

IDS = torch.arange(3, 33).reshape(2, 15)


def random_masks(model, share=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(width, generator=generator) < share for width in models.widths(model)]


def plainly_masked(model, masks):
    """The dense model with the dropped columns of W_down set to zero, nothing of the package in between."""
    copied = copy.deepcopy(model)
    for layer, mask in zip(copied.model.layers, masks, strict=True):
        layer.mlp.down_proj.weight[:, ~mask] = 0
    return copied


@pytest.mark.parametrize("family", FAMILIES)
def test_all_forms_agree(family):
    model = tiny_model(family, **({"mlp_bias": True} if family == "llama" else {}))
    masks = random_masks(model)
    dense, want = model(IDS).logits, plainly_masked(model, masks)(IDS).logits
    assert (dense - want).abs().max() > 0.1
    with masked(model, masks) as wrapped:
        assert all(isinstance(mlp, MaskedMLP) for mlp in wrapped)
        torch.testing.assert_close(model(IDS).logits, want, rtol=0, atol=1e-5)
    assert torch.equal(model(IDS).logits, dense)
    slimmed = slim_copy(model, masks)
    torch.testing.assert_close(slimmed(IDS).logits, want, rtol=0, atol=1e-5)
    assert models.widths(slimmed) == [int(mask.sum()) for mask in masks]
    assert torch.equal(model(IDS).logits, dense)


def test_biases_are_really_there():
    llama, qwen = tiny_model(), tiny_model("qwen2")
    assert llama.model.layers[0].mlp.down_proj.bias.abs().min() > 0
    assert qwen.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    slimmed = slim_(tiny_model(), random_masks(llama))
    assert all(mlp.gate_proj.bias.shape == (mlp.gate_proj.out_features,) for mlp in models.gated_mlps(slimmed))


def test_slim_sizes_and_config():
    model = tiny_model()
    mask = torch.arange(64) % 4 != 0
    slimmed = slim_(copy.deepcopy(model), [mask] * 3)
    assert slimmed.config.intermediate_size == 48 and slimmed.model.layers[0].mlp.intermediate_size == 48
    assert not any(p.requires_grad for p in slimmed.parameters())
    assert ffn_bytes(model) == 3 * 4 * (3 * 64 * 32 + 64 * 2 + 32)
    assert ffn_bytes(slimmed) == 3 * 4 * (3 * 48 * 32 + 48 * 2 + 32)
    mixed = slim_(copy.deepcopy(model), [mask, mask, ~mask])
    assert models.widths(mixed) == [48, 48, 16] and mixed.config.intermediate_size == 64
    assert [mlp.intermediate_size for mlp in models.gated_mlps(mixed)] == [48, 48, 16]
    everything = slim_(copy.deepcopy(model), [torch.ones(64, dtype=torch.bool)] * 3)
    assert torch.equal(everything(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model = tiny_model(dtype=dtype)
    masks = random_masks(model)
    slimmed = slim_(copy.deepcopy(model), masks)
    assert slimmed.dtype == dtype
    oracle = plainly_masked(model.float(), masks)(IDS).logits
    assert (slimmed(IDS).logits.float() - oracle).abs().max() < 0.05 * oracle.abs().max()


@pytest.mark.parametrize(
    "masks, why",
    [
        ([torch.ones(63, dtype=torch.bool)] * 3, r"widths \[63\], the model has \[64\]"),
        ([torch.ones(64, dtype=torch.bool)] * 2, "the model has"),
        ([torch.ones(64, dtype=torch.bool)] * 2 + [torch.zeros(64, dtype=torch.bool)], "keeps no channel"),
    ],
)
def test_slim_refuses_and_leaves_the_model(masks, why):
    model = tiny_model()
    before = model(IDS).logits
    with pytest.raises(InputError, match=why):
        slim_(model, masks)
    assert torch.equal(model(IDS).logits, before) and models.widths(model) == [64] * 3


def test_the_model_comes_back_after_an_error():
    model = tiny_model()
    before, mlps = model(IDS).logits, models.gated_mlps(model)
    with pytest.raises(KeyboardInterrupt), masked(model, random_masks(model)):
        raise KeyboardInterrupt
    assert models.gated_mlps(model) == mlps and torch.equal(model(IDS).logits, before)
    with pytest.raises(ValueError), masked(model, random_masks(model)[:2]):
        pass
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_means_in_the_place_of_what_is_dropped(family):  # in Llama's there are biases already
    model = tiny_model(family)
    masks = random_masks(model)
    means = [torch.randn(64) for _ in masks]
    plain, before = copy.deepcopy(model), model(IDS).logits
    for layer, mask, mean in zip(models.gated_mlps(plain), masks, means, strict=True):
        layer.down_proj.register_forward_pre_hook(lambda _, args, m=mask, c=mean: (torch.where(m, args[0], c),))
    wanted = plain(IDS).logits
    with masked(model, masks, means=means):
        assert (model(IDS).logits - wanted).abs().max() < 1e-5
    slimmed = slim_copy(model, masks, means)
    assert (slimmed(IDS).logits - wanted).abs().max() < 1e-5 and torch.equal(model(IDS).logits, before)
    assert models.widths(slimmed) == [int(mask.sum()) for mask in masks]


def test_the_gradient_of_a_mask_with_means():
    model = tiny_model()
    masks, x = random_masks(model), torch.randn(7, 32, dtype=torch.float64)
    mlp, mask, mean = copy.deepcopy(models.gated_mlps(model)[1]).double(), masks[1].double(), torch.randn(64).double()
    plain = lambda m: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * m + mean * (1 - m))  # noqa: E731
    grads = []
    for forward in (plain, lambda m: MaskedMLP(mlp, m, "silu", means=mean)(x)):
        leaf = mask.clone().requires_grad_()
        forward(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[0].abs().max()


def test_the_mask_is_differentiable_and_dropped_channels_have_a_gradient():
    model = tiny_model()
    leaves = [mask.float().requires_grad_() for mask in random_masks(model)]
    with masked(model, leaves):
        model(IDS).logits.square().sum().backward()
    for leaf in leaves:
        assert leaf.grad[leaf == 0].abs().min() > 0
    assert all(p.grad is None for p in model.parameters())
