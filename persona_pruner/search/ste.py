"""Straight-through mask search (Persona-Pruner, arXiv 2606.14695, stage 2).

Weights are frozen; every FFN channel has one score. The forward pass runs under the binary mask of the top-k scores,
the gradient of that mask passes straight through to the scores, dropped channels included. Beyond the paper: scores
start from Fisher information on the persona's data and the loss is KL to the dense model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from persona_pruner.errors import InputError
from persona_pruner.nn import masked
from persona_pruner.packing import Example, Pack, answer_states, pack
from persona_pruner.search import masks as choice
from persona_pruner.search.losses import cross_entropy, divergence
from persona_pruner.search.scores import everything, repeats

LOSSES = ("kl", "ce")


@dataclass(frozen=True)
class Settings:
    """Settings of the search. `lr` is in standard deviations of the starting scores, which are standardised. 0.045:
    without `means` 3% to 11% less held-out KL than 0.08; with them 0.025 is better still (docs/levers.md)."""

    ratio: float = 0.25
    scope: str = "layer"
    loss: str = "kl"
    steps: int = 24
    lr: float = 0.045
    budget: int = 1536
    seed: int = 0
    multiple: int = choice.MULTIPLE


@dataclass
class State:
    """Where a search stands: scores and Adam's moments (float32 [C] a layer), steps done, loss of each step."""

    scores: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    done: int = 0
    losses: list[float] = field(default_factory=list)
    flips: list[int] = field(default_factory=list)

    def to_tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, for safetensors."""
        parts = {"scores": self.scores, "first": self.first, "second": self.second}
        named = {f"{part}.{layer}": t for part, layers in parts.items() for layer, t in enumerate(layers)}
        curve = {"losses": torch.tensor(self.losses, dtype=torch.float64), "flips": torch.tensor(self.flips)}
        return named | curve

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> "State":
        """The state that `to_tensors` made these from."""
        layers = range(sum(name.startswith("scores.") for name in tensors))
        parts = [[tensors[f"{part}.{layer}"].to(device) for layer in layers] for part in ("scores", "first", "second")]
        losses, flips = tensors["losses"].tolist(), tensors["flips"].tolist()
        return cls(*parts, done=len(losses), losses=losses, flips=flips)


def standardised(scores: Sequence[Tensor], scope: str) -> list[Tensor]:
    """log scores with mean 0 and deviation 1, per layer or over the model, the unit that `lr` counts in."""
    logs = [layer.float().clamp_min(1e-30).log() for layer in scores]
    if scope == "global":
        flat = torch.cat(logs)
        return [(layer - flat.mean()) / flat.std().clamp_min(1e-6) for layer in logs]
    return [(layer - layer.mean()) / layer.std().clamp_min(1e-6) for layer in logs]


def start(scores: Sequence[Tensor], scope: str) -> State:
    """The state before the first step, from channel scores of any kind."""
    begun = standardised(scores, scope)
    return State(begun, [torch.zeros_like(s) for s in begun], [torch.zeros_like(s) for s in begun])


def batches(examples: Sequence[Example], budget: int, seed: int) -> Iterator[tuple[int, Pack]]:
    """(epoch, pack) without end, examples shuffled anew each epoch."""
    epoch = 0
    while True:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for batch in pack(examples, budget, order):
            yield epoch, batch
        epoch += 1


class Targets:
    """Dense final hidden states [answer tokens, hidden] of every example, in the model's dtype: what KL is taken to."""

    def __init__(self, examples: Sequence[Example]):
        self.lengths = [len(example.answer) for example in examples]
        self.states: list[Tensor | None] = [None] * len(examples)

    def add(self, batch: Pack, states: Tensor) -> None:
        """Takes the states [A, hidden] of a pack of the examples."""
        for row, part in zip(batch.rows, states.split([self.lengths[row] for row in batch.rows]), strict=True):
            self.states[row] = part.clone()

    def missing(self) -> list[int]:
        return [row for row, state in enumerate(self.states) if state is None]


@torch.no_grad()
def teacher_states(
    model: nn.Module,
    examples: Sequence[Example],
    budget: int,
    step: Callable[[int], None] = lambda done: None,
    targets: Targets | None = None,
) -> list[Tensor]:
    """The states of `Targets` by a pass of the dense model, bit for bit those that a gradient score sees. With
    `targets` only those that are missing there are computed, and put there."""
    targets = targets or Targets(examples)
    with masked(model, everything(model)):
        for batch in pack(examples, budget, targets.missing()):
            batch = batch.to(model.get_input_embeddings().weight.device)
            targets.add(batch, answer_states(model, batch))
            step(1)
    return targets.states


def weighed(
    examples: Sequence[Example], teacher: Sequence[Tensor | None], neutral: int, weight: float
) -> tuple[list[Example], list[Tensor | None]]:
    """Examples and their dense states for a search, the last `neutral` of them, which are neutral prose, as often as
    `repeats` says."""
    own = len(examples) - neutral
    count = [sum(len(example.answer) for example in part) for part in (examples[:own], examples[own:])]
    again = repeats(*count, weight) - 1
    return [*examples, *[*examples[own:]] * again], [*teacher, *[*teacher[own:]] * again]


def search(
    model: nn.Module,
    examples: Sequence[Example],
    state: State,
    settings: Settings,
    teacher: Sequence[Tensor] | None = None,
    after_step: Callable[[State], None] = lambda state: None,
    means: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Runs the steps that `state` has not done yet, updating it in place, and returns the masks (bool [C] a layer).

    With `means`, float32 [C] a layer, a dropped channel gives its mean instead of nothing (`nn.MaskedMLP`).
    `after_step` may store the state to go on later: the data order depends on the seed alone.
    Raises InputError for an unknown loss, for KL without the teacher's states, and for examples without answers.
    """
    if settings.loss not in LOSSES:
        raise InputError(f"loss {settings.loss!r} is not one of {', '.join(LOSSES)}")
    if settings.loss == "kl" and teacher is None:
        raise InputError("the KL loss needs the teacher's hidden states (teacher_states)")
    if not all(example.answer for example in examples) or not examples:
        raise InputError("the search needs examples, each with an answer")
    device = state.scores[0].device
    leaves = [torch.ones_like(scores) for scores in state.scores]
    kept = choice.choose(state.scores, settings.ratio, settings.scope, settings.multiple)
    stream = batches(examples, settings.budget, settings.seed)
    for step in range(settings.steps):
        _, batch = next(stream)
        if step < state.done:
            continue
        for leaf, mask in zip(leaves, kept, strict=True):
            leaf.copy_(mask)
            leaf.grad = None
            leaf.requires_grad_()
        batch = batch.to(device)
        with masked(model, leaves, means=means):
            states = answer_states(model, batch)
            if settings.loss == "kl":
                loss = divergence(model, states, torch.cat([teacher[row] for row in batch.rows]))
            else:
                loss = cross_entropy(model, states, batch.target)
            (loss / len(batch.target)).backward()
        _adam(state, [leaf.grad for leaf in leaves], settings.lr * _cosine(step, settings.steps))
        for leaf in leaves:
            leaf.requires_grad_(False)
        new = choice.choose(state.scores, settings.ratio, settings.scope, settings.multiple)
        state.losses.append(loss.item() / len(batch.target))
        state.flips.append(sum(int((a & ~b).sum()) for a, b in zip(kept, new, strict=True)))
        state.done, kept = step + 1, new
        after_step(state)
    return kept


def _cosine(step: int, steps: int) -> float:
    return 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * step / max(steps, 1))))


@torch.no_grad()
def _adam(state: State, grads: Sequence[Tensor], lr: float, beta1: float = 0.9, beta2: float = 0.99) -> None:
    """One step of Adam (Kingma and Ba 2015), on plain lists so that the whole state can be stored as tensors."""
    count = state.done + 1
    for score, first, second, grad in zip(state.scores, state.first, state.second, grads, strict=True):
        first.lerp_(grad, 1 - beta1)
        second.lerp_(grad.square(), 1 - beta2)
        step = (first / (1 - beta1**count)) / (second / (1 - beta2**count)).sqrt().add_(1e-12)
        score -= lr * step
