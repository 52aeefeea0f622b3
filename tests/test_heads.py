"""Head groups: what is left of a cut model is what the dense one computes without them, and scores by their formula."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.nn import attentions, cut_heads_, group_cost, head_groups, heads_watched, slim_copy
from persona_pruner.packing import hidden_states, logits, pack
from persona_pruner.search.baselines.channels import moments
from persona_pruner.search.losses import draw
from persona_pruner.search.scores import Context, channel_scores
from persona_pruner.testing import FAMILIES, tiny_examples, tiny_model

IDS = torch.arange(3, 33).reshape(2, 15)


def some(model):
    """One group fewer in every layer but the last: another one each time."""
    counts = head_groups(model)
    kept = [torch.arange(count) != layer % count for layer, count in enumerate(counts)]
    return [*kept[:-1], torch.ones(counts[-1], dtype=torch.bool)]


def without(model, kept, means=None):
    """The dense model whose o_proj does not see the groups, or sees them at their means."""
    copied = copy.deepcopy(model)
    for layer, (block, mask) in enumerate(zip(copied.model.layers, kept, strict=True)):
        output = block.self_attn.o_proj
        gone = ~mask.repeat_interleave(output.in_features // len(mask))
        stand_in = torch.where(gone, means[layer] if means else 0.0, 0.0)
        output.register_forward_pre_hook(lambda _, args, gone=gone, to=stand_in: (torch.where(gone, to, args[0]),))
    return copied


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_is_the_dense_one_without_its_groups(family):
    model = tiny_model(family)
    kept = some(model)
    generator = torch.Generator().manual_seed(1)
    means = [torch.randn(a.o_proj.in_features, generator=generator) / 4 for a in attentions(model)]
    for given in (None, means):
        cut = cut_heads_(copy.deepcopy(model), kept, given)
        want = without(model, kept, given)(IDS).logits
        assert (model(IDS).logits - want).abs().max() > 0.1
        torch.testing.assert_close(cut(IDS).logits, want, rtol=0, atol=1e-4)
    assert head_groups(cut) == [int(mask.sum()) for mask in kept]
    lost = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for n, p in cut.named_parameters() if not n.endswith("o_proj.bias")
    )
    biases = sum(p.numel() // 2 for n, p in model.named_parameters() if n.endswith(("q_proj.bias", "k_proj.bias")))
    channel = 3 * model.config.hidden_size
    assert abs(lost - 2 * group_cost(model) * channel) <= 4 * biases


def test_it_generates_and_channels_can_be_cut_too():
    model = tiny_model()
    cut = slim_copy(cut_heads_(copy.deepcopy(model), some(model)), [torch.arange(64) < 40] * 3)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    said = cut.generate(IDS[:1], **greedy)
    again = cut.generate(IDS[:1], use_cache=False, **greedy)
    assert torch.equal(said, again) and said.shape[1] > IDS.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_of_groups(family):
    packs = pack(tiny_examples(6), budget=40)
    generator = torch.Generator().manual_seed(3)
    model, plain = tiny_model(family), tiny_model(family).double()
    want = [torch.zeros(count, dtype=torch.float64) for count in head_groups(plain)]
    for batch in packs:
        with torch.no_grad():
            states = hidden_states(model, batch).last_hidden_state[0, batch.predict]
            labels = draw(logits(model, states), generator)
        masks, hooks = [], []
        for attention, total in zip(attentions(plain), want, strict=True):
            mask = torch.ones(1, len(batch.input_ids), len(total), 1, dtype=torch.float64, requires_grad=True)

            def gate(_, args, mask=mask):
                return ((args[0].unflatten(-1, (mask.shape[2], -1)) * mask).flatten(2),)

            hooks.append(attention.o_proj.register_forward_pre_hook(gate))
            masks.append(mask)
        out = plain.lm_head(hidden_states(plain, batch).last_hidden_state[0, batch.predict])
        nn.functional.cross_entropy(out, labels, reduction="sum").backward()
        for hook, mask, total in zip(hooks, masks, want, strict=True):
            hook.remove()
            total += mask.grad.square().sum((0, 1, 3))
    found = channel_scores("fisher", Context(model, packs, seed=3, heads=True))
    assert [len(part) for part in found] == [*models.widths(model), *head_groups(model)]
    assert all(part.dtype == torch.float32 for part in found)
    for got, wanted in zip(found[3:], want, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=1e-4 * wanted.max().item())
    channels = channel_scores("fisher", Context(model, packs, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(channels, found, strict=False)) and len(channels) == 3
    with pytest.raises(InputError, match="channels only"):
        channel_scores("taylor", Context(model, packs, heads=True))


def test_watching_keeps_no_graph_alive():
    model = tiny_model()
    seen = []
    hook = model.model.layers[2].self_attn.o_proj.register_forward_hook(
        lambda _, args, out: seen.append(weakref.ref(args[0]))
    )
    gc.disable()
    try:
        with heads_watched(model, [torch.zeros(count) for count in head_groups(model)]):
            model(IDS).logits.sum().backward()
        assert seen[0]() is None
    finally:
        gc.enable()
        hook.remove()
    assert not any(a.o_proj._forward_pre_hooks for a in attentions(model))


def test_means_of_what_enters_o_proj():
    model, packs = tiny_model(), pack(tiny_examples(4), budget=40)
    linears = [attention.o_proj for attention in attentions(model)]
    rows = [[] for _ in linears]
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, to=to: to.append(args[0][0].double()))
        for linear, to in zip(linears, rows, strict=True)
    ]
    for batch in packs:
        hidden_states(model, batch)
    for hook in hooks:
        hook.remove()
    for got, entered in zip(moments(Context(model, packs), linears)[0], rows, strict=True):
        torch.testing.assert_close(got.double(), torch.cat(entered).mean(0), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_cut():
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    every = [torch.ones(count, dtype=torch.bool) for count in head_groups(model)]
    for kept, said in (
        (every[:-1], "head groups a layer"),
        ([torch.ones(5, dtype=torch.bool)] * 3, "head groups a layer"),
        ([~every[0], *every[1:]], "keeps no head group"),
    ):
        with pytest.raises(InputError, match=said):
            cut_heads_(model, kept)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.model.layers[1].self_attn.o_proj = nn.Sequential(nn.Linear(4, 4))
    assert attentions(model) == [] and head_groups(model) == []
    with pytest.raises(InputError, match="the model has none"):
        cut_heads_(model, every)
    model = tiny_model("qwen3")  # a norm of each head; in OLMo 2 it is one of all heads together
    assert len(head_groups(model)) == 3
    model.model.layers[2].self_attn.q_norm = nn.RMSNorm(model.model.layers[2].self_attn.q_proj.out_features)
    assert head_groups(model) == []
