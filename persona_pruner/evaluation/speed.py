"""Decode speed of whole models, side by side in one run."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn


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


@torch.inference_mode()
def decode_speeds(models: Sequence[nn.Module], prompt: Sequence[int], tokens: int = 32, rounds: int = 3) -> list[float]:
    """Tokens per second of each model when it decodes one conversation, the median over rounds taken in turn."""
    ids = torch.tensor([list(prompt)], device=models[0].get_input_embeddings().weight.device)
    for model in models:
        _decode(model, ids, 2)
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for times, model in zip(seconds, models, strict=True):
            times.append(_decode(model, ids, tokens))
    return [tokens / statistics.median(times) for times in seconds]
