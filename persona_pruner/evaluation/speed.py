"""Decode speed of whole models, side by side in one run."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from persona_pruner.errors import InputError
from persona_pruner.fleet import DENSE, Fleet, Sampling

MOST_COPIED = 4 << 30  # bytes of weights


def _decode(model: nn.Module, prompt: torch.Tensor, tokens: int) -> float:
    """Seconds for `tokens` further greedy tokens after the prompt and one token, by transformers' generate."""
    config = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    times = []
    for count in (1, 1 + tokens):
        begun = time.perf_counter()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=count, max_new_tokens=count, **config
        )
        times.append(time.perf_counter() - begun)
    return times[1] - times[0]


def _fleet_decode(fleet: Fleet, prompt: Sequence[int], tokens: int) -> float:
    """The same in the fleet's engine."""
    fleet.submit(DENSE, prompt, Sampling(1 + tokens, temperature=0))
    while not fleet.step():
        pass
    begun = time.perf_counter()
    while not fleet.idle:
        fleet.step()
    return time.perf_counter() - begun


def _in_turn(decoders: Sequence[Callable[[int], float]], tokens: int, rounds: int) -> list[float]:
    """Tokens per second of functions that take so many tokens' seconds, the median over rounds taken in turn."""
    for decode in decoders:
        decode(2)
    seconds: list[list[float]] = [[] for _ in decoders]
    for _ in range(rounds):
        for times, decode in zip(seconds, decoders, strict=True):
            times.append(decode(tokens))
    return [tokens / statistics.median(times) for times in seconds]


@torch.inference_mode()
def decode_speeds(models: Sequence[nn.Module], prompt: Sequence[int], tokens: int = 16, rounds: int = 3) -> list[float]:
    """Tokens per second of each model when transformers decodes one conversation with it."""
    ids = torch.tensor([list(prompt)], device=models[0].get_input_embeddings().weight.device)
    return _in_turn([lambda n, model=model: _decode(model, ids, n) for model in models], tokens, rounds)


def fleet_speeds(
    models: Sequence[nn.Module], tokenizer, prompt: Sequence[int], tokens: int = 16, rounds: int = 3
) -> list[float]:
    """The same when the fleet's engine does, that of `chat` and `serve`. It copies the weights: raises InputError where
    they have more than `MOST_COPIED` bytes, and for what it cannot run."""
    if sum(p.nbytes for model in models for p in model.parameters()) > MOST_COPIED:
        raise InputError(f"copies of these models have more than {MOST_COPIED >> 30} GB")
    fleets = [Fleet(model, tokenizer) for model in models]
    for fleet in fleets:
        fleet.stop_ids = set()
    return _in_turn([lambda n, fleet=fleet: _fleet_decode(fleet, prompt, n) for fleet in fleets], tokens, rounds)
