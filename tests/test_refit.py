"""Block-by-block repair: its formula on the last block, what it does to held-out answers, and what it leaves alone."""

import copy

import pytest
import torch

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.evaluation.metrics import dense_reference, fidelity
from persona_pruner.packing import hidden_states, pack
from persona_pruner.search.masks import top_k_per_layer
from persona_pruner.search.refit import refit_
from persona_pruner.search.repair import PROMPT_WEIGHT, repaired_down
from persona_pruner.search.scores import Context, input_sqnorms
from persona_pruner.study.own import cut
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
    slim = refit_(cut(dense, masks), dense, packs, ridge=1e-3, share=share)
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


def test_nearer_to_dense_than_one_shot(case):
    dense, examples, packs, masks = case
    reference = dense_reference(dense, examples)
    one_shot = fidelity(cut(dense, masks, repaired_down(dense, packs, [masks])[0]), reference).kl
    told = []
    slim = refit_(cut(dense, masks), dense, packs, step=told.append)
    assert fidelity(slim, reference).kl < 0.9 * one_shot
    assert sum(told) == len(models.decoder_layers(dense))


def test_only_what_writes_into_the_stream_changes(case):
    dense, _, packs, masks = case
    before, start = copy.deepcopy(dense.state_dict()), cut(dense, masks)
    slim = refit_(copy.deepcopy(start), dense, packs)
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    old = start.state_dict()
    changed = {name for name, tensor in slim.state_dict().items() if not torch.equal(old[name], tensor)}
    assert changed and all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    assert not any(module._forward_hooks for model in (dense, slim) for module in model.modules())


def test_nothing_removed_changes_nothing_much(case):
    dense, _, packs, _ = case
    slim = refit_(copy.deepcopy(dense), dense, packs)
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(slim.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_bfloat16(case):
    dense, examples, packs, masks = case
    dense = dense.to(torch.bfloat16)
    slim = refit_(cut(dense, masks), dense, packs)
    assert slim.dtype == torch.bfloat16
    reference = dense_reference(dense, examples)
    assert fidelity(slim, reference).kl < fidelity(cut(dense, masks), reference).kl


def test_other_streams_are_refused(case):
    scaled = tiny_model()
    for block in models.decoder_layers(scaled):
        block.register_forward_hook(lambda _, args, out: out * 0.5)
    for dense in (tiny_model("gemma3"), scaled):
        with pytest.raises(InputError, match="block-by-block repair needs blocks that add"):
            refit_(copy.deepcopy(dense), dense, case[2])


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma3"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_families(case, family, dtype):
    dense = tiny_model(family, dtype=dtype)
    slim = refit_(cut(dense, case[3]), dense, case[2])
    assert slim.dtype == dtype and all(p.isfinite().all() for p in slim.parameters())
