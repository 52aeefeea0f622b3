"""Channel scores: how much each FFN channel matters, by magnitude, by calibration activations or by gradients."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.nn import head_groups, heads_watched, masked
from persona_pruner.ops import column_sqnorm_
from persona_pruner.packing import Pack, answer_states, hidden_states
from persona_pruner.search.losses import cross_entropy, sampled_cross_entropy


def _zeros(model: nn.Module) -> list[Tensor]:
    device = model.get_input_embeddings().weight.device
    return [torch.zeros(width, dtype=torch.float32, device=device) for width in models.widths(model)]


def everything(model: nn.Module) -> list[Tensor]:
    """Masks that drop nothing."""
    return [torch.ones_like(zeros, dtype=torch.bool) for zeros in _zeros(model)]


@dataclass
class Context:
    """What a score may look at: the frozen model, packed calibration data, a seed, and whom to tell of progress.

    `seen` is handed the final hidden states [A, hidden] of every pack that a gradient score runs, which are the dense
    targets of the search: it need not run the dense model again for them. With `heads` a Fisher score goes on, behind
    the layers' channels, with the layers' head groups (`nn.heads`).
    """

    model: nn.Module
    packs: Sequence[Pack] = ()
    seed: int = 0
    step: Callable[[int], None] = lambda done: None
    seen: Callable[[Pack, Tensor], None] = lambda batch, states: None
    heads: bool = False


def random(context: Context) -> list[Tensor]:
    """Independent uniform scores: the floor every method must beat."""
    generator = torch.Generator().manual_seed(context.seed)
    return [torch.rand(len(zeros), generator=generator).to(zeros.device) for zeros in _zeros(context.model)]


def magnitude(context: Context) -> list[Tensor]:
    """L2 norm of a channel's weights: row of W_gate, row of W_up, column of W_down (Han et al. 2015, grouped)."""

    def norm(mlp: nn.Module) -> Tensor:
        rows = mlp.gate_proj.weight.float().square().sum(1) + mlp.up_proj.weight.float().square().sum(1)
        return (rows + mlp.down_proj.weight.float().square().sum(0)).sqrt()

    return [norm(mlp) for mlp in models.gated_mlps(context.model)]


@torch.no_grad()
def input_sqnorms(context: Context) -> list[Tensor]:
    """float32 [C] a layer: sum over calibration tokens of h^2, with h what enters down_proj."""
    sums = _zeros(context.model)

    def add(acc: Tensor, h: Tensor) -> None:  # what a hook returns would take the place of h
        column_sqnorm_(h, acc)

    hooks = [
        mlp.down_proj.register_forward_pre_hook(lambda _, args, acc=acc: add(acc, args[0]))
        for mlp, acc in zip(models.gated_mlps(context.model), sums, strict=True)
    ]
    try:
        for batch in context.packs:
            hidden_states(context.model, batch.to(sums[0].device))
            context.step(1)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def wanda(context: Context) -> list[Tensor]:
    """Wanda (Sun et al., ICLR 2024: |W| * ||x||_2) summed over the column of W_down that a channel owns."""
    mlps = models.gated_mlps(context.model)
    norms = input_sqnorms(context)
    return [norm.sqrt() * mlp.down_proj.weight.float().abs().sum(0) for mlp, norm in zip(mlps, norms, strict=True)]


def _gradient_scores(context: Context, sampled: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Taylor and Fisher sums of the cross-entropy, with labels from the data or sampled from the model; and the Fisher
    sums of head groups, if the context asks for them."""
    taylor, fisher = _zeros(context.model), _zeros(context.model)
    device = taylor[0].device
    groups = [torch.zeros(count, device=device) for count in head_groups(context.model)] if context.heads else []
    watched = heads_watched(context.model, groups) if groups else nullcontext()
    generator = torch.Generator(device).manual_seed(context.seed)
    with watched, masked(context.model, everything(context.model), taylor, fisher):
        for batch in context.packs:
            batch = batch.to(device)
            states = answer_states(context.model, batch)
            context.seen(batch, states.detach())
            if sampled:
                loss = sampled_cross_entropy(context.model, states, generator)
            else:
                loss = cross_entropy(context.model, states, batch.target)
            loss.backward()
            context.step(1)
    return taylor, fisher, groups


def taylor(context: Context) -> list[Tensor]:
    """LLM-Pruner (Ma et al., NeurIPS 2023), first order: |sum of weight * gradient| over a channel's group, which
    for a channel's mask m is |dLoss/dm| at m = 1. Simplified: the gate row's own term, which m does not see, is
    left out."""
    return [score.abs() for score in _gradient_scores(context, sampled=False)[0]]


def fisher(context: Context) -> list[Tensor]:
    """Diagonal Fisher information of a channel's mask: sum over tokens of (dLoss/dm)^2, labels drawn from the model
    itself, so that the score is the local curvature of KL(dense || masked). Comparable across layers."""
    _, channels, groups = _gradient_scores(context, sampled=True)
    return channels + groups


def predicted(packs: Sequence[Pack]) -> int:
    """Tokens that these packs predict."""
    return sum(len(batch.predict) for batch in packs)


def balanced(
    own: Sequence[Tensor],
    packs: Sequence[Pack],
    neutral: Sequence[Tensor],
    neutral_packs: Sequence[Pack],
    weight: float,
) -> list[Tensor]:
    """Scores of the persona's data plus those of neutral prose, which as a whole weighs `weight` times as much, however
    long it is. own, neutral: float32 [C] a layer, or groups, sums over the tokens of the packs beside them."""
    share = weight * predicted(packs) / predicted(neutral_packs)
    return [mine + share * other for mine, other in zip(own, neutral, strict=True)]


def repeats(own: int, neutral: int, weight: float) -> int:
    """How often neutral prose is taken where it cannot be weighed, to have about `weight` times as many predicted
    tokens as the persona's data: once at least. own, neutral: predicted tokens of either."""
    return max(1, round(weight * own / neutral)) if neutral else 1


SCORES: dict[str, Callable[[Context], list[Tensor]]] = {
    "random": random,
    "magnitude": magnitude,
    "wanda": wanda,
    "taylor": taylor,
    "fisher": fisher,
}


def channel_scores(method: str, context: Context) -> list[Tensor]:
    """Scores of one method, float32 [C] a layer. Raises InputError for an unknown method, and for head groups by
    another than fisher."""
    if context.heads and method != "fisher":
        raise InputError(f"score {method!r} knows channels only; fisher scores head groups too")
    if method not in SCORES:
        raise InputError(f"score {method!r} is not one of {', '.join(SCORES)}")
    return SCORES[method](context)
