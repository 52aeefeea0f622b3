"""Closed-form repair: W_down refitted on the kept channels, so that each FFN's output stays close to the dense one.

With H = sum over tokens of h h^T (h enters down_proj in the dense model) and S the kept channels, the least-squares
refit with ridge lambda * mean(diag H), which pulls towards the weights as they are, is

    W'_S = (W H[:, S] + r W_S) (H[S, S] + r I)^-1
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from persona_pruner import models
from persona_pruner.packing import Pack, hidden_states

BUDGET = 4 << 30  # bytes of H at a time; more layers than fit take further passes over the data
PROMPT_WEIGHT = 0.02  # of a shared-prefix token: it stands in every pack, and answers are what must stay right


def prompt_weights(batch: Pack) -> Tensor:
    """float32 [T, 1]: how much each token of a pack counts."""
    return torch.where(batch.segment == 0, PROMPT_WEIGHT, 1.0)[:, None]


@torch.no_grad()
def grams(
    model: nn.Module, packs: Sequence[Pack], layers: Sequence[int], step: Callable[[int], None] = lambda done: None
) -> dict[int, Tensor]:
    """float32 [C, C] of each layer asked for: weighted sum over tokens of h h^T in the dense model."""
    mlps = models.gated_mlps(model)
    device = mlps[0].down_proj.weight.device
    sums = {i: torch.zeros((mlps[i].down_proj.in_features,) * 2, device=device) for i in layers}
    weight = torch.empty(0)

    def add(index: int, h: Tensor) -> None:
        rows = h.reshape(-1, h.shape[-1]) * weight
        rows = rows.float() if rows.dtype == torch.float16 else rows  # squares pass 65,504 easily
        sums[index] += (rows.T @ rows).float()

    hooks = [mlps[i].down_proj.register_forward_pre_hook(lambda _, args, i=i: add(i, args[0])) for i in layers]
    try:
        for batch in packs:
            batch = batch.to(device)
            weight = prompt_weights(batch).sqrt().to(model.dtype)
            hidden_states(model, batch)
            step(1)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def ridge_solve(cross: Tensor, gram: Tensor, weight: Tensor, r: Tensor | float) -> Tensor:
    """(cross + r W) (gram + r I)^-1, float32 [out, in]: least squares pulled towards `weight` [out, in]."""
    square = gram + r * torch.eye(len(gram), device=gram.device)
    return torch.cholesky_solve((cross + r * weight).T, torch.linalg.cholesky(square)).T


def refit(weight: Tensor, gram: Tensor, mask: Tensor, ridge: float) -> Tensor:
    """W_down [out, C] refitted to the kept channels of `mask`; dropped columns are zero. float32."""
    kept = mask.nonzero()[:, 0]
    wide = weight.float()
    r = ridge * gram.diagonal().mean().clamp_min(1e-12)
    out = torch.zeros_like(wide)
    out[:, kept] = ridge_solve(wide @ gram[:, kept], gram[kept][:, kept], wide[:, kept], r)
    return out


def repaired_down(
    model: nn.Module,
    packs: Sequence[Pack],
    choices: Sequence[Sequence[Tensor]],
    ridge: float = 0.1,
    step: Callable[[int], None] = lambda done: None,
) -> list[list[Tensor]]:
    """For each of several masks: new W_down of every layer (the model's dtype, zero in dropped columns).

    H is gathered once for all of them. `step` is told of every pack done; layers whose H do not fit `BUDGET`
    together take another pass over the data.
    """
    mlps = models.gated_mlps(model)
    per_pass = max(1, BUDGET // (4 * max(models.widths(model)) ** 2))
    out: list[list[Tensor]] = [[] for _ in choices]
    for first in range(0, len(mlps), per_pass):
        layers = range(first, min(first + per_pass, len(mlps)))
        for index, gram in grams(model, packs, layers, step).items():
            weight = mlps[index].down_proj.weight
            for masks, downs in zip(choices, out, strict=True):
                downs.append(refit(weight, gram, masks[index].to(weight.device), ridge).to(weight.dtype))
    return out
