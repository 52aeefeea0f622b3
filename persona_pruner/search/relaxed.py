"""The two relaxations that the paper compares its straight-through search with: Gumbel-softmax and soft top-k.

Both run the model under a soft mask m = sigmoid((s - theta) / t + noise) in [0, 1], with theta so that the masks of a
layer (or of the model) sum to the number of channels to keep, and t falling from step to step; the gradient goes
through the sigmoid and theta is held. Gumbel-softmax (Jang et al., ICLR 2017; for two classes the difference of two
Gumbel variables is logistic) adds that noise, soft top-k does not. The mask that comes out is the hard top-k of s.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from persona_pruner.errors import InputError
from persona_pruner.nn import masked
from persona_pruner.packing import Example, answer_states
from persona_pruner.search import masks as choice
from persona_pruner.search import ste
from persona_pruner.search.losses import divergence

KINDS = ("gumbel", "soft-top-k")
WARM, COLD = 1.0, 0.1  # temperature at the first and last step, in deviations of the starting scores


def threshold(scores: Tensor, keep: int, temperature: float) -> Tensor:
    """theta so that sum of sigmoid((scores - theta) / temperature) is `keep`, by bisection."""
    low, high = scores.min() - 40 * temperature, scores.max() + 40 * temperature
    for _ in range(60):
        middle = (low + high) / 2
        above = torch.sigmoid((scores - middle) / temperature).sum() > keep
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def soft_masks(
    scores: Sequence[Tensor], ratio: float, scope: str, temperature: float, generator: torch.Generator | None
) -> list[Tensor]:
    """Soft masks, differentiable in the scores; with a generator, noise is drawn from it."""
    widths = [len(layer) for layer in scores]
    keep = [choice.kept_width(width, ratio) for width in widths]
    groups = [torch.cat(list(scores))] if scope == "global" else list(scores)
    out = []
    for group, count in zip(groups, [sum(keep)] if scope == "global" else keep, strict=True):
        theta = threshold(group.detach(), count, temperature)
        noise = 0.0
        if generator is not None:
            noise = torch.rand(len(group), generator=generator).clamp(1e-6, 1 - 1e-6).logit().to(group.device)
        out.append(torch.sigmoid((group - theta) / temperature + noise))
    return list(out[0].split(widths)) if scope == "global" else out


def search(
    model: nn.Module,
    examples: Sequence[Example],
    scores: Sequence[Tensor],
    settings: ste.Settings,
    teacher: Sequence[Tensor],
    kind: str,
) -> list[Tensor]:
    """Masks (bool [C] a layer) after `settings.steps` steps of Adam on KL to the dense model, from channel scores.

    Raises InputError for an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"relaxation {kind!r} is not one of {', '.join(KINDS)}")
    leaves = [layer.requires_grad_() for layer in ste.standardised(scores, settings.scope)]
    optimizer = torch.optim.Adam(leaves, lr=settings.lr, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(settings.seed) if kind == "gumbel" else None
    stream = ste.batches(examples, settings.budget, settings.seed)
    for step in range(settings.steps):
        _, batch = next(stream)
        batch = batch.to(leaves[0].device)
        temperature = WARM * (COLD / WARM) ** (step / max(settings.steps - 1, 1))
        masks = soft_masks(leaves, settings.ratio, settings.scope, temperature, generator)
        with masked(model, masks):
            states = answer_states(model, batch)
            loss = divergence(model, states, torch.cat([teacher[row] for row in batch.rows]))
            (loss / len(batch.target)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = [leaf.detach() for leaf in leaves]
    return choice.choose(found, settings.ratio, settings.scope, settings.multiple)
