"""Questions of the persona's own: the base model, under the persona prompt, writes what people would ask it.

The method's paper filters a general bank; data in the character's own domain lowered the held-out divergence far more
than the same amount of general answers. The user's turn is begun with one of the openings below and the model goes on
to its end.
"""

from collections.abc import Callable, Sequence

from torch import nn

from persona_pruner.synthesis.generate import generate
from persona_pruner.synthesis.overlap import HeldOut, near_duplicates, words
from persona_pruner.synthesis.prompts import open_question_ids, stop_ids

# All speak to the character: with openings that fit anything ("Explain", "How", "Which") a small model asks about
# anything, and the repaired KL of a published persona was 11% higher (docs/levers.md).
OPENINGS = (
    "How do you feel about", "What did you", "Why do you", "Do you ever", "Tell me about your", "What would you do if",
    "How did you", "What is your relationship with", "When did you", "Have you ever", "What do you think about",
    "Are you", "Where did you", "Who is your", "What was your", "Can you tell me about", "Why did you", "How do you",
    "Would you ever", "What is your favorite", "If you could", "Do you believe", "What made you", "In your opinion,",
    "What are your", "Is it true that you", "What do you think of", "Describe your", "What is your biggest",
    "Do you think", "Who do you", "What was it like to", "Were you", "Which of your", "What would you say to",
    "Do you have", "Tell me about the time", "How would you describe your", "How often do you", "Did you ever",
    "What are you", "Why are you", "I want to know", "Would you rather", "How did it feel when",
    "What does it mean to you to", "What do you want", "When was the last time you",
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
