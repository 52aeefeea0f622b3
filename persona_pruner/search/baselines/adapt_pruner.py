"""Adapt-Pruner: layers that change their input little lose more channels, a few at a time."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from persona_pruner import models
from persona_pruner.nn import slim_
from persona_pruner.packing import Pack, hidden_states
from persona_pruner.search.baselines.channels import SAMPLES, few, weight_taylor
from persona_pruner.search.masks import kept_width, top_k
from persona_pruner.search.scores import Context

ROUND = 0.05  # share of the channels that go in one round, as in the paper
AMPLITUDE = 0.02  # how far a layer's sparsity in a round may be from the mean


@torch.no_grad()
def importance(model: nn.Module, packs: Sequence[Pack]) -> Tensor:
    """float32 [layers] with mean 0 and largest absolute value 1: minus the mean cosine similarity of what enters and
    what leaves a block."""
    blocks = models.decoder_layers(model)
    sums, count = torch.zeros(len(blocks)), 0

    def add(layer: int, args: tuple, out) -> None:
        out = out[0] if isinstance(out, tuple) else out
        sums[layer] += cosine_similarity(args[0].float(), out.float(), dim=-1).sum().item()

    hooks = [block.register_forward_hook(lambda _, args, out, i=i: add(i, args, out)) for i, block in enumerate(blocks)]
    try:
        for batch in packs:
            hidden_states(model, batch.to(model.get_input_embeddings().weight.device))
            count += len(batch.input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    centred = -(sums / count) + (sums / count).mean()
    return centred / centred.abs().max().clamp_min(1e-12)


def spread(widths: Sequence[int], remaining: int, importance: Tensor, share: float) -> list[int]:
    """Widths after a round that leaves `remaining` channels in all: layer i loses the share `share` - A * importance_i
    of its channels, evened out so that the total is exact. Every layer keeps at least one."""
    lost = (share - AMPLITUDE * importance).clamp(0, 1)
    wanted = torch.tensor(widths, dtype=torch.float64) * (1 - lost)
    new = (wanted * remaining / wanted.sum()).floor().long().clamp_min(1)
    new = torch.minimum(new, torch.tensor(widths))
    while (short := remaining - int(new.sum())) != 0:  # rounding, and layers at a limit
        room = torch.tensor(widths) - new if short > 0 else new - 1
        order = (wanted - new).argsort(descending=short > 0, stable=True)
        able = [i for i in order.tolist() if room[i] > 0][: abs(short)]
        new[able] += 1 if short > 0 else -1
    return new.tolist()


def prune(context: Context, ratio: float) -> nn.Module:
    """Adapt-Pruner (Pan et al., 2025): in rounds of 5% of the channels, each layer's sparsity is S - A * I, with I its
    importance (`importance`) and A = 0.02, and within a layer the channels with the least sum of |w * dLoss/dw| go;
    importance and gradients are measured anew each round. Simplified: FFN channels only, and nothing is trained
    between or after the rounds."""
    packs = few(context.packs, context.seed, sequences=SAMPLES)
    model = copy.deepcopy(context.model)
    total = sum(models.widths(model))
    target = sum(kept_width(width, ratio) for width in models.widths(model))
    while (now := sum(models.widths(model))) > target:
        remaining = max(target, now - max(1, round(ROUND * total)))
        widths = models.widths(model)
        keep = spread(widths, remaining, importance(model, packs), 1 - remaining / now)
        found: list[Tensor] = weight_taylor(model, packs, context.step)
        model = slim_(model, [top_k(scores, width) for scores, width in zip(found, keep, strict=True)])
    return model
