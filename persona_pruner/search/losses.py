"""Losses over the vocabulary, in chunks of tokens: logits are never all in memory, and frozen heads get no gradient."""

import torch
from torch import Tensor, nn

from persona_pruner.packing import chunks, logits

CHUNK = 25 << 20  # bytes of float32 logits a chunk, of which half a dozen live at once: 136 tokens of 49,152 words


class _HeadLoss(torch.autograd.Function):
    """Sum of a token-wise loss on logits = head(states); `grad(logits, slice)` gives (loss, d_logits)."""

    @staticmethod
    def forward(ctx, states: Tensor, model: nn.Module, grad) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        slopes = torch.empty_like(states)
        words = len(model.get_output_embeddings().weight)
        for part in chunks(len(states), max(1, CHUNK // (4 * words))):
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
    return _HeadLoss.apply(states, model, lambda out, part: _nll(out, target[part]))


def sampled_cross_entropy(model: nn.Module, states: Tensor, generator: torch.Generator) -> Tensor:
    """`cross_entropy` with labels drawn from the model's own distribution, whose gradients give the true Fisher."""

    return _HeadLoss.apply(states, model, lambda out, part: _nll(out, draw(out, generator)))


def draw(out: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [A]: one token drawn from softmax of each row of logits [A, vocabulary].

    One uniform number and a search for each row; torch.multinomial draws a number for each word of the vocabulary,
    which took a sixth of the Fisher pass.
    """
    mass = torch.softmax(out, -1).cumsum_(-1)
    point = torch.rand(len(out), 1, generator=generator, device=out.device) * mass[:, -1:]
    return torch.searchsorted(mass, point, right=True)[:, 0].clamp_(max=out.shape[-1] - 1)


def _nll(out: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    own = torch.log_softmax(out, -1)
    index = target[:, None]
    loss = -own.gather(1, index).sum()
    return loss, own.exp_().scatter_add_(1, index, own.new_full(index.shape, -1))
