"""Recovery after the cut: a few steps of KL to the dense model on the persona's own data, by LoRA or on the weights.

KL is taken at every token of a question and its answer, not at the answer's alone: the dense model says as much of the
one as of the other, and a small set of examples goes further. The head is shared and frozen.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from persona_pruner.errors import InputError
from persona_pruner.nn.sparse import block_linears
from persona_pruner.packing import Example, hidden_states
from persona_pruner.search.losses import divergence
from persona_pruner.search.ste import batches

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _train(
    model: nn.Module,
    dense: nn.Module,
    examples: Sequence[Example],
    steps: int,
    budget: int,
    seed: int,
    update: Callable[[int], None],
    step: Callable[[int], None],
) -> list[float]:
    """Loss in nats a token of every step; `update` is called after each backward pass with the number of the step."""
    device = model.get_input_embeddings().weight.device
    losses = []
    stream = batches(examples, budget, seed)
    for number in range(steps):
        _, batch = next(stream)
        batch = batch.to(device)
        own = batch.segment > 0  # not the shared prompt
        with torch.no_grad():
            teacher = hidden_states(dense, batch).last_hidden_state[0, own]
        loss = divergence(model, hidden_states(model, batch).last_hidden_state[0, own], teacher)
        (loss / len(teacher)).backward()
        losses.append(loss.item() / len(teacher))
        update(number)
        step(1)
    return losses


def _anneal(optimizer: torch.optim.Optimizer, lr: float, number: int, steps: int) -> None:
    """Sets the learning rate of a step: up over the first tenth, then down along a cosine."""
    warm = max(1, steps // 10)
    share = (number + 1) / warm
    if number >= warm:
        share = 0.5 + 0.5 * math.cos(math.pi * (number - warm) / max(1, steps - warm))
    for group in optimizer.param_groups:
        group["lr"] = lr * share


def lora_(
    model: nn.Module,
    dense: nn.Module,
    examples: Sequence[Example],
    steps: int,
    lr: float = 2e-3,
    rank: int = 8,
    budget: int = 1536,
    seed: int = 0,
    step: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """LoRA (Hu et al., ICLR 2022) on all linears of the blocks of a slim model, trained and merged into its weights, in
    place. Returns the loss of every step. Raises InputError without the extra `peft`."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("LoRA recovery needs the extra `peft` (pip install persona-pruner[peft])") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS)))
    leaves = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=lr, weight_decay=0.0)

    def update(number: int) -> None:
        _anneal(optimizer, lr, number, steps)
        optimizer.step()
        optimizer.zero_grad()

    losses = _train(model, dense, examples, steps, budget, seed, update, step)
    wrapped.merge_and_unload()
    model.requires_grad_(False)
    return losses


@contextmanager
def _open(weights: Iterable[nn.Parameter]):
    """Within the context the weights take gradients."""
    weights = list(weights)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def distill_(
    model: nn.Module,
    dense: nn.Module,
    examples: Sequence[Example],
    steps: int,
    lr: float = 1e-4,
    budget: int = 1536,
    seed: int = 0,
    step: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Trains the nonzero weights of the blocks' linears, in place; zeros stay zeros, so that 2:4 stays 2:4. AdamW on
    float32 copies: steps of this size would be lost in bfloat16. Returns the loss of every step."""
    with _open(linear.weight for linear in block_linears(model).values()) as weights:
        kept = [weight.detach() != 0 for weight in weights]
        masters = [weight.detach().float() for weight in weights]
        optimizer = torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

        @torch.no_grad()
        def update(number: int) -> None:
            for master, weight, mask in zip(masters, weights, kept, strict=True):
                master.grad = weight.grad.float() * mask
                weight.grad = None
            _anneal(optimizer, lr, number, steps)
            optimizer.step()
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)

        return _train(model, dense, examples, steps, budget, seed, update, step)


def recover_(way: str, *arguments, **options) -> list[float]:
    """`distill_` where `way` is "weights", `lora_` where it is "lora"."""
    return {"weights": distill_, "lora": lora_}[way](*arguments, **options)
