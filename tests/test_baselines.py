"""Baselines by their defining formulas, each computed apart with plain PyTorch on a tiny model."""

import copy

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.packing import Example, hidden_states, logits, pack, text_packs
from persona_pruner.search.baselines import BASELINES, adapt_pruner, channels, depth, prune, slicegpt
from persona_pruner.search.baselines.size import budget, nonzero, parameters, removed
from persona_pruner.search.masks import kept_width, top_k
from persona_pruner.search.scores import Context
from persona_pruner.synthesis.generate import generate
from persona_pruner.testing import tiny_examples, tiny_model

CHANNELS = [name for name, method in BASELINES.items() if not method.two_four]


@pytest.fixture
def packs():
    packs = pack(tiny_examples(8), budget=40)
    assert len(packs) > 2
    return packs


def inputs(model, packs, module_of):
    """Rows that enter a module of each block, float64."""
    found = [[] for _ in models.decoder_layers(model)]
    hooks = [
        module_of(block).register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0][0].double()))
        for block, rows in zip(models.decoder_layers(model), found, strict=True)
    ]
    for batch in packs:
        hidden_states(model, batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(rows) for rows in found]


def loss_of(model, packs):
    """Mean cross-entropy a token, from plain logits."""
    total = tokens = 0.0
    for batch in packs:
        states = hidden_states(model, batch).last_hidden_state[0, batch.predict]
        total += cross_entropy(logits(model, states), batch.target, reduction="sum")
        tokens += len(batch.target)
    return total / tokens


def same_weights(model, masks, pruned):
    for old, new, mask in zip(models.gated_mlps(model), models.gated_mlps(pruned), masks, strict=True):
        assert torch.equal(new.gate_proj.weight, old.gate_proj.weight[mask])
        assert torch.equal(new.up_proj.weight, old.up_proj.weight[mask])
        assert torch.equal(new.down_proj.weight, old.down_proj.weight[:, mask])


@pytest.mark.parametrize("name", CHANNELS)
def test_a_pruned_copy_runs_generates_and_keeps_to_the_budget(name, packs):
    model = tiny_model(num_hidden_layers=8)
    before = {key: p.clone() for key, p in model.state_dict().items()}
    pruned = prune(name, Context(model, packs), 0.5)
    left, allowed = parameters(pruned), budget(model, 0.5)
    if name == "depth":
        block = sum(p.numel() for p in models.decoder_layers(model)[0].parameters())
        assert abs(left - allowed) <= block / 2
    elif name == "flap":
        assert left - 8 * 32 == allowed - 8 * 32  # the biases were there before
    elif name == "slicegpt":
        assert left <= allowed
    else:
        assert left == allowed
    out = hidden_states(pruned, packs[0]).last_hidden_state
    assert out.shape[-1] == 32 and out.isfinite().all()
    assert not torch.allclose(out, hidden_states(model, packs[0]).last_hidden_state)
    texts = generate(pruned, [[5, 6, 7, 8], [5, 6, 9]], {2}, 5, temperature=0.0)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert texts[0][0] == pruned(ids).logits[0, -1].argmax()
    assert pruned.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 6)
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_size():
    model = tiny_model()
    table = 512 * 32
    assert parameters(model) == sum(p.numel() for p in model.parameters()) - table
    assert removed(model, 0.25) == 3 * 16 * (3 * 32 + 2)  # two biases a channel
    assert parameters(prune("magnitude", Context(model), 0.25)) == budget(model, 0.25)
    untied = tiny_model(tie_word_embeddings=False)
    assert parameters(untied) == parameters(model)
    model.model.layers[0].mlp.up_proj.weight[3:5] = 0
    assert nonzero(model) == parameters(model) - 2 * 32


def test_what_cannot_be_done(packs):
    model = tiny_model()
    with pytest.raises(InputError, match="method 'luck' is not one of random, magnitude, wanda"):
        prune("luck", Context(model, packs), 0.5)
    with pytest.raises(InputError, match="method flap needs calibration data"):
        prune("flap", Context(model), 0.5)
    with pytest.raises(InputError, match=r"wanda-2:4 removes half of the weights; ratio 0\.25"):
        prune("wanda-2:4", Context(model, packs), 0.25)
    with pytest.raises(InputError, match="SliceGPT needs blocks with one norm"):
        prune("slicegpt", Context(tiny_model("gemma3"), packs), 0.5)
    with pytest.raises(InputError, match="would remove every block"):
        depth.without(model, [0, 1, 2])


def test_random_and_magnitude():
    model = tiny_model()
    one, again, other = (prune("random", Context(model, seed=seed), 0.5) for seed in (1, 1, 2))
    gates = [pruned.model.layers[0].mlp.gate_proj.weight for pruned in (one, again, other)]
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])
    mlps = models.gated_mlps(model)
    norms = [
        torch.cat([m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight.T], 1).double().norm(dim=1) for m in mlps
    ]
    same_weights(model, [top_k(n, 32) for n in norms], prune("magnitude", Context(model), 0.5))


def test_wanda(packs):
    model = tiny_model()
    rows = inputs(model, packs, lambda block: block.mlp.down_proj)
    downs = [mlp.down_proj.weight.double() for mlp in models.gated_mlps(model)]
    want = [h.square().sum(0).sqrt() * w.abs().sum(0) for h, w in zip(rows, downs, strict=True)]
    same_weights(model, [top_k(score, 48) for score in want], prune("wanda", Context(model, packs), 0.25))


def test_flap(packs):
    model = tiny_model()
    pruned = prune("flap", Context(model, packs), 0.5)
    rows = inputs(model, packs, lambda block: block.mlp.down_proj)
    mlps = models.gated_mlps(model)
    raw = [h.var(0) * m.down_proj.weight.double().norm(dim=0).square() for h, m in zip(rows, mlps, strict=True)]
    flat = torch.cat([(score - score.mean()) / score.std() for score in raw])
    masks = top_k(flat, 3 * 32).split(64)
    assert len({int(mask.sum()) for mask in masks}) > 1
    same_weights(model, masks, pruned)
    for h, old, new, mask in zip(rows, mlps, models.gated_mlps(pruned), masks, strict=True):
        bias = old.down_proj.bias.double() + old.down_proj.weight.double()[:, ~mask] @ h.mean(0)[~mask]
        torch.testing.assert_close(new.down_proj.bias.double(), bias, rtol=1e-4, atol=1e-5)


def test_flap_gives_a_bias_to_layers_without_one(packs):
    model = tiny_model(mlp_bias=False)
    pruned = prune("flap", Context(model, packs), 0.5)
    assert all(mlp.down_proj.bias.abs().max() > 0 for mlp in models.gated_mlps(pruned))
    assert all(mlp.down_proj.bias is None for mlp in models.gated_mlps(model))


def group_taylor(model, packs):
    """sum of |w * dLoss/dw| over a channel's weights, by plain autograd in float64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    tokens = sum(len(batch.target) for batch in packs)
    (loss_of(model, packs) * tokens).backward()
    out = []
    for mlp in models.gated_mlps(model):
        gate, up, down = ((p.weight * p.weight.grad).abs() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        out.append((gate.sum(1) + up.sum(1) + down.sum(0)).detach())
    return out


def test_llm_pruner(packs):
    model, want = tiny_model(), group_taylor(tiny_model(), packs)
    for got, score in zip(channels.weight_taylor(model, packs), want, strict=True):
        torch.testing.assert_close(got.double(), score, rtol=2e-3, atol=1e-4 * score.max().item())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_llm_pruner_leaves_the_ends_alone():
    scores = [torch.rand(64, generator=torch.Generator().manual_seed(i)) for i in range(16)]
    masks = channels.between(scores, 0.25)
    kept = [int(mask.sum()) for mask in masks]
    assert kept[:2] == [64, 64] and kept[-1] == 64 and sum(kept) == 16 * 48 and max(kept[2:-1]) - min(kept[2:-1]) <= 1
    assert torch.equal(masks[5], top_k(scores[5], kept[5]))
    assert {int(mask.sum()) for mask in channels.between(scores[:1], 0.5)} == {32}


def test_few_sequences_are_drawn_by_the_seed():
    texts = text_packs([[5, 6, 7 + i] for i in range(30)])
    one, again, other = (channels.few(texts, seed) for seed in (0, 0, 1))
    rows = [[batch.rows for batch in chosen] for chosen in (one, again, other)]
    assert rows[0] == rows[1] != rows[2] and len({*rows[0]}) == channels.SAMPLES
    assert len(channels.few(texts, 0, sequences=3)) == 3 and len(channels.few(texts[:2], 0, sequences=3)) == 2
    packs = pack([Example([1], [2, 3])] * 12, budget=9)  # four in each
    assert [len(channels.few(packs, 0, sequences=n)) for n in (1, 4, 5, 12, 99)] == [1, 1, 2, 3, 3]


def test_depth(packs):
    model = tiny_model("qwen3", num_hidden_layers=6)
    losses = depth.block_losses(model, packs)
    for number, got in enumerate(losses):
        cutout = depth.without(model, [number])
        assert got == pytest.approx(loss_of(cutout, packs).item(), rel=1e-4)
        assert len(cutout.model.layers) == cutout.config.num_hidden_layers == 5
        assert [layer.self_attn.layer_idx for layer in cutout.model.layers] == [*range(5)]
    pruned = prune("depth", Context(model, packs), 0.75)
    gone = sorted(range(6), key=losses.__getitem__)[: 6 - len(pruned.model.layers)]
    rest = [model.model.layers[i].mlp.gate_proj.weight for i in range(6) if i not in gone]
    assert gone and all(torch.equal(a.mlp.gate_proj.weight, b) for a, b in zip(pruned.model.layers, rest, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_slicegpt_with_the_whole_stream_is_the_model(family, packs):
    model = tiny_model(family)
    turns = slicegpt.rotations(Context(model, packs))
    whole = slicegpt.sliced(model, turns, 32)
    for batch in packs:
        want = hidden_states(model, batch).last_hidden_state
        torch.testing.assert_close(hidden_states(whole, batch).last_hidden_state, want, rtol=1e-3, atol=2e-3)


def test_slicegpt_components_and_weights(packs):
    model = tiny_model()
    turns = slicegpt.rotations(Context(model, packs))
    assert len(turns) == 7
    x = inputs(model, packs, lambda block: block.post_attention_layernorm)[1]
    unit = x / (x.square().mean(1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    turned = unit @ turns[3].double()
    gram = turned.T @ turned  # diagonal, and falling
    assert (gram - gram.diagonal().diag()).abs().max() < 1e-4 * gram.max()
    assert (gram.diagonal().diff() <= 1e-4 * gram.max()).all()
    pruned = slicegpt.sliced(model, turns, 20)
    block, old = pruned.model.layers[1], model.model.layers[1]
    gain = old.post_attention_layernorm.weight
    torch.testing.assert_close(block.mlp.up_proj.weight, (old.mlp.up_proj.weight * gain) @ turns[3][:, :20])
    torch.testing.assert_close(block.mlp.down_proj.weight, turns[4][:, :20].T @ old.mlp.down_proj.weight)
    torch.testing.assert_close(block.past_attention.weight, turns[3][:, :20].T @ turns[2][:, :20])
    assert block.norm.full == 32


def test_slicegpt_width_counts_shortcuts():
    model = tiny_model(num_hidden_layers=8, mlp_bias=False)
    width = slicegpt.stream_width(model, 0.5)
    turns = [torch.eye(32)] * 17
    assert parameters(slicegpt.sliced(model, turns, width)) <= budget(model, 0.5)
    assert parameters(slicegpt.sliced(model, turns, width + 1)) > budget(model, 0.5)
    with pytest.raises(InputError, match="cannot reach ratio"):
        slicegpt.stream_width(tiny_model(intermediate_size=8192, hidden_size=8, head_dim=2), 0.999)


def test_adapt_pruner_importance(packs):
    model = tiny_model(num_hidden_layers=5)
    before = inputs(model, packs, lambda block: block)
    hidden = []
    for batch in packs:
        hidden_states(model, batch)
    hooks = [b.register_forward_hook(lambda _, args, out: hidden.append(out[0].double())) for b in model.model.layers]
    for batch in packs:
        hidden_states(model, batch)
    for hook in hooks:
        hook.remove()
    after = [torch.cat(hidden[layer::5]) for layer in range(5)]
    raw = -torch.stack([cosine_similarity(a, b, dim=-1).mean() for a, b in zip(before, after, strict=True)])
    want = (raw - raw.mean()) / (raw - raw.mean()).abs().max()
    torch.testing.assert_close(adapt_pruner.importance(model, packs).double(), want, rtol=1e-3, atol=1e-4)


def test_adapt_pruner_rounds(packs):
    ranks = torch.tensor([1.0, 0.0, -1.0])
    widths = adapt_pruner.spread([1000, 1000, 1000], 2850, ranks, 0.05)
    assert sum(widths) == 2850 and widths == pytest.approx([970, 950, 930], abs=1)
    assert adapt_pruner.spread([2, 1000, 1], 500, ranks, 0.5)[2] == 1
    model = tiny_model()
    pruned = prune("adapt-pruner", Context(model, packs), 0.5)
    assert sum(models.widths(pruned)) == 3 * kept_width(64, 0.5)
    first = adapt_pruner.spread([64] * 3, 192 - 10, adapt_pruner.importance(model, packs), 10 / 192)
    scores = channels.weight_taylor(model, packs)
    gone = [~top_k(score, width) for score, width in zip(scores, first, strict=True)]
    for layer, mask in enumerate(gone):  # what went in the first round is not in the end either
        kept = {tuple(row.tolist()) for row in pruned.model.layers[layer].mlp.gate_proj.weight}
        old = model.model.layers[layer].mlp.gate_proj.weight[mask]
        assert not any(tuple(row.tolist()) in kept for row in old)
