"""2:4 baselines: two of every four weights along a row stay. They give a dense copy with zeros."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from persona_pruner.ops import select24, unpack24
from persona_pruner.search.layerwise import chosen_linears, replace_weights_
from persona_pruner.search.scores import Context

DAMP = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 128  # columns whose errors are handed on together


def keep_two(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """The weight with zeros in the place of the two of every four that have the least |w| * scale."""
    return unpack24(*select24(weight.contiguous(), scale))


def wanda_weight(weight: Tensor, gram: Tensor) -> Tensor:
    """Score |w| * ||x||_2, the norm over calibration tokens."""
    return keep_two(weight, gram.diagonal().clamp_min(0).sqrt())


def sparsegpt_weight(weight: Tensor, gram: Tensor, damp: float = DAMP, block: int = BLOCK) -> Tensor:
    """Column by column: in every group of four columns those two weights of a row go whose w^2 / U_jj^2 is least,
    and the weights to the right make up for it, w -= (w_j / U_jj) U_j, with U the upper Cholesky factor of the inverse
    of H + damp * mean(diag H) I. weight [out, in], gram float32 [in, in]; in is a multiple of 4."""
    out = weight.float().clone()
    square = gram.clone()
    dead = square.diagonal() == 0
    square[dead, dead] = 1
    out[:, dead] = 0
    square.diagonal().add_(damp * square.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
    upper = torch.linalg.cholesky(inverse, upper=True)
    columns = out.shape[1]
    for first in range(0, columns, block):
        last = min(first + block, columns)
        piece, own = out[:, first:last], upper[first:last, first:last]
        errors = torch.zeros_like(piece)
        for j in range(last - first):
            if j % 4 == 0:
                score = (piece[:, j : j + 4] / own.diagonal()[j : j + 4]).square()
                dropped = torch.ones_like(score, dtype=torch.bool)
                dropped.scatter_(1, score.argsort(dim=1, descending=True, stable=True)[:, :2], False)
            lost = torch.where(dropped[:, j % 4], piece[:, j], 0.0)
            errors[:, j] = lost / own[j, j]
            piece[:, j] -= lost
            piece[:, j + 1 :] -= errors[:, j, None] * own[j, j + 1 :]
        out[:, last:] -= errors @ upper[first:last, last:]
    return out.to(weight.dtype)


def _pruned(context: Context, replace: Callable[[Tensor, Tensor], Tensor], ffn_only: bool) -> nn.Module:
    model = copy.deepcopy(context.model)
    return replace_weights_(model, context.packs, replace, ffn_only, context.step)


def magnitude(context: Context, ratio: float = 0.5, ffn_only: bool = False) -> nn.Module:
    """The two largest of every four weights, in all linears of the blocks (Mishra et al., 2021)."""
    model = copy.deepcopy(context.model)
    with torch.no_grad():
        for linear in chosen_linears(model, ffn_only).values():
            linear.weight.copy_(keep_two(linear.weight))
    return model


def wanda(context: Context, ratio: float = 0.5, ffn_only: bool = False) -> nn.Module:
    """Wanda (Sun et al., ICLR 2024) with the 2:4 pattern: the two of every four with the largest |w| * ||x||_2, block
    after block. Linears of one block are measured before any of them is pruned."""
    return _pruned(context, wanda_weight, ffn_only)


def sparsegpt(context: Context, ratio: float = 0.5, ffn_only: bool = False) -> nn.Module:
    """SparseGPT (Frantar and Alistarh, ICML 2023) with the 2:4 pattern (`sparsegpt_weight`), block after block.
    Linears of one block are measured before any of them is pruned."""
    return _pruned(context, sparsegpt_weight, ffn_only)
