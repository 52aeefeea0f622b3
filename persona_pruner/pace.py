"""Sizes of a sculpt that fit a time.

Nearly all that a sculpt does is passing tokens through one model, so one measured pass tells what the rest will take.
"""

import math
import time

from torch import nn

from persona_pruner.config import SculptConfig
from persona_pruner.packing import Example, pack
from persona_pruner.search.repair import TOKENS
from persona_pruner.search.scores import Context, channel_scores

SCALED = (
    "own_questions",
    "bank_questions",
    "bank_candidates",
    "score_examples",
    "steps",
    "recovery_steps",
    "neutral_texts",
    "neutral_examples",
)
LEAST = {"neutral_texts": 4, "neutral_examples": 4}  # fewer say little, whatever the time
PASSAGES = 5  # neutral texts of the measured pass, a thousand tokens
EIGHTHS = 8  # shares of the sizes are whole eighths, so that a noisy clock seldom gives another run
# What stages of the demo took, in tokens passed forward and backward in the same time. The same to a quarter on an
# EPYC with AVX2 alone in float32 (6.3 ms a token, 2026-11-28) and on one with AVX512-BF16 in bfloat16 (2.7 ms,
# 2026-11-27), two cores each; of the two the larger is taken, NUMBERS is an estimate.
QUESTION = 20  # tokens of a question
DRAFT = 34  # a question of its own
CANDIDATE = 94  # a bank question's sensitivity
ANSWER = 1.5  # times `answer_tokens`
STEP = 1.14  # times the tokens of a search step: the dense model's logits are made anew
RECOVERY = 2.4  # times the tokens of a recovery step, which takes slopes for weights and updates them: an estimate
REFIT = 1.15  # times the tokens of an example
TARGET = 0.4  # times the tokens of an example that gives no scores
PASSAGE = 190  # tokens of a neutral text among the data
NEUTRAL = 70  # a neutral text: 170 tokens, forward alone
NUMBERS, COMPARED = 14_000, 32_000  # what else is measured and said in the end, without and with baselines
MODELS, ALL_MODELS = 3, 8  # that see the neutral texts, without and with baselines


def tokens(config: SculptConfig, prompt: int) -> float:
    """Tokens passed forward and backward in the time of what comes after the held-out questions; `prompt`: those of the
    persona's prompt, which stands once in every pack."""

    def packed(examples: int, budget: int) -> float:
        own = config.answer_tokens + QUESTION
        return examples * own * (1 + prompt / max(budget - prompt, own))

    examples = config.own_questions + config.bank_questions
    scored = min(examples, config.score_examples)
    total = config.own_questions * DRAFT
    total += examples * config.answer_tokens * ANSWER if config.answers == "self" else 0
    total += config.bank_candidates * CANDIDATE if config.filter and config.bank_questions else 0
    if config.ratio:
        total += packed(scored, config.budget) + config.steps * config.budget * STEP
        total += TARGET * packed(examples - scored, config.budget) if config.steps else 0
    total += REFIT * packed(examples, TOKENS) if config.repair else 0
    passes = (config.ratio > 0) * (1 + TARGET * (config.steps > 0)) + REFIT * config.repair
    total += config.neutral_examples * PASSAGE * passes
    total += config.recovery_steps * config.budget * RECOVERY
    models, numbers = (ALL_MODELS, COMPARED) if config.compare else (MODELS, NUMBERS)
    return total + config.neutral_texts * NEUTRAL * models + numbers


def second_per_token(model: nn.Module, texts: list[list[int]], seed: int = 0) -> float:
    """Seconds that a token takes forward and backward, measured on a pack of all `texts` (token ids; half of them are
    predicted, as in a pack of questions and answers)."""
    halves = [Example(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in texts]
    for examples in (halves[:1], halves):  # the first is slower than any later one
        packs = pack(examples, sum(map(len, texts)))
        begun = time.perf_counter()
        channel_scores("taylor", Context(model, packs, seed))[0].sum().item()  # waits for a GPU
    return (time.perf_counter() - begun) / sum(len(batch.input_ids) for batch in packs)


def scaled(config: SculptConfig, eighths: int) -> SculptConfig:
    """The settings with an eighth, two eighths, .. of what takes time, at least one of each that is not zero (or what
    LEAST says), and no limit any more: another machine makes the same of them."""
    whole = {name: getattr(config, name) for name in SCALED}
    sizes = {n: min(size, max(LEAST.get(n, 0), math.ceil(size * eighths / EIGHTHS))) for n, size in whole.items()}
    return config.model_copy(update={**sizes, "minutes": None})


def fit(config: SculptConfig, prompt: int, second: float, left: float) -> tuple[int, float]:
    """(eighths of the sizes, seconds that they will take): the most that fits into `left` seconds at `second` seconds a
    token, or one eighth where nothing does."""
    for eighths in range(EIGHTHS, 0, -1):
        takes = tokens(scaled(config, eighths), prompt) * second
        if takes <= left:
            break
    return eighths, takes
