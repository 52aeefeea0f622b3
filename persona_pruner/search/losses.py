"""Losses over the vocabulary, in chunks of tokens: logits are never all in memory, and frozen heads get no gradient."""

import torch
from torch import Tensor, nn

from persona_pruner.packing import chunks, logits

CHUNK = 256  # tokens a chunk: 50 MB of float32 logits at a vocabulary of 49,152


class _HeadLoss(torch.autograd.Function):
    """Sum of a token-wise loss on logits = head(states); `grad(logits, slice)` gives (loss, d_logits)."""

    @staticmethod
    def forward(ctx, states: Tensor, model: nn.Module, grad) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        slopes = torch.empty_like(states)
        for part in chunks(len(states), CHUNK):
            with torch.enable_grad():
                piece = states[part].detach().requires_grad_()
                out = logits(model, piece)
            loss, slope = grad(out.detach(), part)
            total += loss
            (slopes[part],) = torch.autograd.grad(out, piece, slope)
        ctx.save_for_backward(slopes)
        return total

    @staticmethod
    def backward(ctx, d_total: Tensor):
        (slopes,) = ctx.saved_tensors
        return slopes * d_total.to(slopes.dtype), None, None


def divergence(model: nn.Module, states: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher || student), in nats, float32 scalar, differentiable in `states`.

    states, teacher: final hidden states [A, hidden]; the teacher's logits are made anew chunk by chunk, which costs one
    product with the head and saves [A, vocabulary] floats.
    """

    def grad(out: Tensor, part: slice):
        with torch.no_grad():
            target = torch.log_softmax(logits(model, teacher[part]), -1)
            own = torch.log_softmax(out, -1)
            weight = target.exp()
            return (weight * (target - own)).sum(), own.exp_().sub_(weight)

    return _HeadLoss.apply(states, model, grad)


def cross_entropy(model: nn.Module, states: Tensor, target: Tensor) -> Tensor:
    """Sum over tokens of -log p(target), float32 scalar, differentiable in `states` [A, hidden]; target int64 [A]."""

    def grad(out: Tensor, part: slice):
        own = torch.log_softmax(out, -1)
        index = target[part, None]
        loss = -own.gather(1, index).sum()
        slope = own.exp_()
        return loss, slope.scatter_add_(1, index, torch.full_like(index, -1, dtype=slope.dtype))

    return _HeadLoss.apply(states, model, grad)


@torch.no_grad()
def sample_labels(model: nn.Module, states: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [A]: one token drawn from the model's own distribution at each place (the true Fisher's labels)."""
    parts = [torch.softmax(logits(model, states[part]), -1) for part in chunks(len(states), CHUNK)]
    return torch.cat([torch.multinomial(p, 1, generator=generator)[:, 0] for p in parts])
