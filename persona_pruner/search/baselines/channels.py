"""Baselines that remove FFN channels: random, magnitude, Wanda, FLAP and LLM-Pruner."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from persona_pruner import models
from persona_pruner.nn import slim_copy
from persona_pruner.packing import Pack, answer_states, hidden_states
from persona_pruner.search import masks as choice
from persona_pruner.search import scores
from persona_pruner.search.losses import cross_entropy
from persona_pruner.search.masks import top_k
from persona_pruner.search.scores import Context

FIRST, LAST = 4 / 32, 2 / 32  # shares of the blocks that LLM-Pruner leaves alone: its setting for 32 blocks
SAMPLES = 10  # calibration sequences of LLM-Pruner and others


def random(context: Context, ratio: float) -> nn.Module:
    """Channels drawn at random in every layer."""
    return slim_copy(context.model, choice.top_k_per_layer(scores.random(context), ratio))


def magnitude(context: Context, ratio: float) -> nn.Module:
    """The channels with the largest L2 norm of their weights in every layer (Han et al., NeurIPS 2015, by groups)."""
    return slim_copy(context.model, choice.top_k_per_layer(scores.magnitude(context), ratio))


def wanda(context: Context, ratio: float) -> nn.Module:
    """Wanda (Sun et al., ICLR 2024), structured: score = ||h||_2 * sum of |W_down| over the channel's column, in every
    layer. Simplified: the paper scores single weights and compares them within a row; a channel is the column's sum."""
    return slim_copy(context.model, choice.top_k_per_layer(scores.wanda(context), ratio))


@torch.no_grad()
def moments(context: Context, linears: Sequence[nn.Linear] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """(mean, unbiased variance) over calibration tokens of what enters every layer's down_proj, or these linears of
    the model: float32 [in] each."""
    linears = linears or [mlp.down_proj for mlp in models.gated_mlps(context.model)]
    sums = [torch.zeros(2, linear.in_features, dtype=torch.float64) for linear in linears]

    def add(acc: Tensor, h: Tensor) -> None:
        rows = h.reshape(-1, h.shape[-1]).double()
        acc += torch.stack([rows.sum(0), rows.square().sum(0)]).cpu()

    hooks = [
        linear.register_forward_pre_hook(lambda _, args, acc=acc: add(acc, args[0]))
        for linear, acc in zip(linears, sums, strict=True)
    ]
    count = 0
    try:
        for batch in context.packs:
            hidden_states(context.model, batch.to(linears[0].weight.device))
            count += len(batch.input_ids)
            context.step(1)
    finally:
        for hook in hooks:
            hook.remove()
    means = [acc[0] / count for acc in sums]
    spreads = [(acc[1] - count * mean.square()) / max(count - 1, 1) for acc, mean in zip(sums, means, strict=True)]
    device = linears[0].weight.device
    return [m.float().to(device) for m in means], [s.clamp_min(0).float().to(device) for s in spreads]


@torch.no_grad()
def flap(context: Context, ratio: float) -> nn.Module:
    """FLAP (An et al., AAAI 2024): score of a channel = Var(h) * ||its column of W_down||_2^2, standardised within its
    layer, the best of the whole model kept, and a bias W_down[:, dropped] mean(h[dropped]) that stands in for what was
    dropped. Simplified: attention heads are left whole, and every layer keeps at least a sixteenth of its channels.
    The biases are not counted as parameters."""
    means, spreads = moments(context)
    mlps = models.gated_mlps(context.model)
    raw = [s * mlp.down_proj.weight.float().square().sum(0) for s, mlp in zip(spreads, mlps, strict=True)]
    masks = choice.top_k_global([(s - s.mean()) / s.std().clamp_min(1e-12) for s in raw], ratio)
    return slim_copy(context.model, masks, means)


def weight_taylor(model: nn.Module, packs: Sequence[Pack], step=lambda done: None) -> list[Tensor]:
    """float32 [C] a layer: sum over a channel's weights (rows of W_gate and W_up, column of W_down) of |w * dLoss/dw|,
    Loss being the cross-entropy summed over all packs."""
    mlps = models.gated_mlps(model)
    weights = [[mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight] for mlp in mlps]
    flat = [weight for layer in weights for weight in layer]
    before = [weight.requires_grad for weight in flat]
    try:
        for weight in flat:
            weight.requires_grad_(True)
        for batch in packs:
            batch = batch.to(flat[0].device)
            cross_entropy(model, answer_states(model, batch), batch.target).backward()
            step(1)
        products = [[(w.detach().float() * w.grad.float()).abs() for w in layer] for layer in weights]
    finally:
        for weight, wanted in zip(flat, before, strict=True):
            weight.requires_grad_(wanted)
            weight.grad = None
    return [gate.sum(1) + up.sum(1) + down.sum(0) for gate, up, down in products]


def few(packs: Sequence[Pack], seed: int, sequences: int | None = None) -> list[Pack]:
    """The `SAMPLES` packs that a method with few calibration sequences takes, drawn by the seed; or only the first of
    them, until they hold `sequences`: a pack of persona data has a dozen, and a method that passes over its data for
    every block or round need not see a hundred and more."""
    order = torch.randperm(len(packs), generator=torch.Generator().manual_seed(seed))
    chosen = [packs[i] for i in order[:SAMPLES].tolist()]
    if sequences:
        held = accumulate(len(batch.rows) for batch in chosen)
        chosen = chosen[: 1 + sum(total < sequences for total in held)]
    return chosen


def llm_pruner(context: Context, ratio: float) -> nn.Module:
    """LLM-Pruner (Ma et al., NeurIPS 2023), element-wise first order: score of a channel = sum over the weights of its
    coupled group (row of W_gate, row of W_up, column of W_down) of |w * dLoss/dw| on ten calibration sequences, or
    packs of persona data. The first eighth and the last sixteenth of the blocks are left alone as in the paper; the
    others lose more, so that the ratio over all is kept. Simplified: attention heads are left whole, and no LoRA
    follows."""
    found = weight_taylor(context.model, few(context.packs, context.seed), context.step)
    return slim_copy(context.model, between(found, ratio))


def between(found: Sequence[Tensor], ratio: float) -> list[Tensor]:
    """Masks that keep the first and last blocks whole and as many channels in all as `top_k_per_layer`."""
    total = sum(choice.kept_width(len(s), ratio) for s in found)
    inside = range(round(FIRST * len(found)), len(found) - round(LAST * len(found)))
    outside = sum(len(s) for layer, s in enumerate(found) if layer not in inside)
    if not inside or total - outside < len(inside):  # too much is asked of too few blocks
        return choice.top_k_per_layer(found, ratio)
    shares = torch.linspace(0, total - outside, len(inside) + 1).round().long().diff().tolist()
    keep = dict(zip(inside, shares, strict=True))
    return [top_k(s, keep.get(layer, len(s))) for layer, s in enumerate(found)]
