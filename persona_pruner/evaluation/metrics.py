"""The yardstick: how far a pruned model is from the dense one on held-out questions, and on neutral text.

drop = metric(pruned) - metric(dense), both on the dense model's own sampled answers; KL is KL(dense || pruned) at
every answer token, in nats, which is 0 for the dense model itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from persona_pruner.errors import InputError
from persona_pruner.packing import Example, Pack, answer_states, chunks, logits, pack, text_packs

BUDGET = 1536
CHUNK = 256


@dataclass(frozen=True)
class Reference:
    """Held-out examples, packed, with the dense model's final hidden states and NLL on them."""

    packs: list[Pack]
    states: list[Tensor]
    nll: float


@dataclass(frozen=True)
class Fidelity:
    """Means per answer token, nats: NLL of the dense answers, its drop against the dense model, KL(dense || this)."""

    nll: float
    nll_drop: float
    kl: float


def _log_probs(model: nn.Module, states: Tensor, target: Tensor, dense: Tensor | None) -> tuple[float, float]:
    """Sums over tokens of -log p(target) and of KL(dense || this)."""
    nll = kl = 0.0
    for part in chunks(len(target), CHUNK):
        own = torch.log_softmax(logits(model, states[part]), -1)
        nll -= own.gather(1, target[part, None]).sum().item()
        if dense is not None:
            wanted = torch.log_softmax(logits(model, dense[part]), -1)
            kl += (wanted.exp() * (wanted - own)).sum().item()
    return nll, kl


def _device(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device


@torch.inference_mode()
def dense_reference(model: nn.Module, examples: Sequence[Example]) -> Reference:
    """Runs the dense model on held-out examples, for `fidelity`. Raises InputError without answers."""
    if not any(example.answer for example in examples):
        raise InputError("there are no held-out answers to measure on")
    packs = [batch.to(_device(model)) for batch in pack(examples, BUDGET)]
    states = [answer_states(model, batch) for batch in packs]
    total = sum(_log_probs(model, s, b.target, None)[0] for s, b in zip(states, packs, strict=True))
    return Reference(packs, states, total / sum(len(b.target) for b in packs))


@torch.inference_mode()
def fidelity(model: nn.Module, reference: Reference, step: Callable[[int], None] = lambda done: None) -> Fidelity:
    """NLL, drop and KL of a model (pruned in place, or under `nn.masked`) that shares the dense model's head."""
    nll = kl = tokens = 0
    for batch, dense in zip(reference.packs, reference.states, strict=True):
        parts = _log_probs(model, answer_states(model, batch), batch.target, dense)
        nll, kl, tokens = nll + parts[0], kl + parts[1], tokens + len(batch.target)
        step(1)
    return Fidelity(nll / tokens, nll / tokens - reference.nll, kl / tokens)


@torch.inference_mode()
def text_nll(model: nn.Module, sequences: Sequence[list[int]]) -> float:
    """Mean NLL per token (nats) of plain texts, given as token ids: general ability. Raises InputError where no text
    has two tokens."""
    total = tokens = 0
    for batch in text_packs(sequences):
        batch = batch.to(_device(model))
        total += _log_probs(model, answer_states(model, batch), batch.target, None)[0]
        tokens += len(batch.target)
    if not tokens:
        raise InputError("there is no text of at least two tokens to measure on")
    return total / tokens
