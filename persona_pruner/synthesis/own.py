"""Questions of the persona's own: the base model, under the persona prompt, writes what people would ask it.

The method's paper filters a general bank; data in the character's own domain lowered the held-out divergence far more
than the same amount of general answers. The user's turn is begun with one of the
openings below and the model goes on to its end.
"""

from collections.abc import Callable, Sequence

from torch import nn

from persona_pruner.synthesis.generate import generate
from persona_pruner.synthesis.overlap import HeldOut, near_duplicates, words
from persona_pruner.synthesis.prompts import open_question_ids, stop_ids

OPENINGS = (
    "How", "What", "Why", "When", "Where", "Who", "Which", "Do you", "Can you", "Have you ever", "Tell me about",
    "What do you think", "How do you", "Would you", "Describe", "Is it true", "If you could", "What is your", "I need",
    "Explain", "Did you", "What would you", "How would you", "Write",
)  # fmt: skip
MAX_TOKENS = 32


def own_questions(
    model: nn.Module,
    tokenizer,
    system: str,
    count: int,
    held_out: HeldOut,
    seed: int = 0,
    known: Sequence[str] = (),
    step: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """At most `count` new questions of at least three words that ended by themselves, none near another one or one of
    `known`, none touching held-out material. `step` is told how many drafts have just been written."""
    stops, special = stop_ids(model, tokenizer), set(tokenizer.all_special_ids)
    prompts = [open_question_ids(tokenizer, system, opening) for opening in OPENINGS]
    drafts = [index % len(OPENINGS) for index in range(count + count // 2)]
    texts = generate(
        model, [prompts[i] for i in drafts], stops, MAX_TOKENS, seed=seed, done=lambda batch: step(len(batch))
    )
    ended = [
        f"{OPENINGS[opening]}{tokenizer.decode(text[:-1])}".strip()
        for opening, text in zip(drafts, texts, strict=True)
        if text and text[-1] in stops and special.isdisjoint(text[:-1])
    ]
    fresh = [q for q in ended if len(words(q)) >= 3 and "\n" not in q and not held_out.touches(q)]
    joined = [*known, *fresh]
    return [joined[i] for i in near_duplicates(joined) if i >= len(known)][:count]
