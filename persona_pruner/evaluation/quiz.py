"""General ability by multiple choice: which ending of a question the model finds most likely."""

from collections.abc import Sequence

import torch
from torch import nn

from persona_pruner.packing import Example, answer_states, chunks, logits, pack
from persona_pruner.synthesis import bank
from persona_pruner.synthesis.prompts import encode

BUDGET = 1536
CHUNK = 256


def _example(tokenizer, question: str, choice: str) -> Example:
    """The question as prompt, " choice" as answer: what the tokens of the whole text add to those of the question."""
    start, whole = encode(tokenizer, question), encode(tokenizer, f"{question} {choice}")
    shared = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))
    shared = max(1, min(shared, len(whole) - 1))
    return Example(whole[:shared], whole[shared:])


@torch.inference_mode()
def log_likelihoods(model: nn.Module, examples: Sequence[Example]) -> list[float]:
    """log p(answer | prompt) in nats of every example."""
    device = model.get_input_embeddings().weight.device
    out = [0.0] * len(examples)
    for batch in pack(examples, BUDGET):
        batch = batch.to(device)
        states = answer_states(model, batch)
        found = torch.empty(len(batch.target))
        for part in chunks(len(found), CHUNK):
            own = torch.log_softmax(logits(model, states[part]), -1)
            found[part] = own.gather(1, batch.target[part, None])[:, 0].cpu()
        parts = found.split([len(examples[row].answer) for row in batch.rows])
        for row, part in zip(batch.rows, parts, strict=True):
            out[row] = part.sum().item()
    return out


def quiz_accuracy(model: nn.Module, tokenizer, items: Sequence[dict] | None = None) -> float:
    """Share of questions whose right ending has the highest log-likelihood per UTF-8 byte.

    items: {"question", "choices", "answer" (index)}, by default the 60 that come with the package. Dividing by bytes
    keeps short endings from winning by being short and does not depend on the tokenizer (`acc_norm` of lm-eval).
    """
    items = bank.quiz() if items is None else items
    rows = [_example(tokenizer, item["question"], choice) for item in items for choice in item["choices"]]
    found, right = iter(log_likelihoods(model, rows)), 0
    for item in items:
        scores = [next(found) / len(choice.encode()) for choice in item["choices"]]
        right += scores.index(max(scores)) == item["answer"]
    return right / len(items)
