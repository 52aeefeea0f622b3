"""`persona-pruner eval`: a pruned character against its dense base."""

from pathlib import Path

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.evaluation.metrics import dense_reference, fidelity, text_nll
from persona_pruner.progress import Progress
from persona_pruner.runtime import open_character
from persona_pruner.synthesis import bank
from persona_pruner.synthesis.generate import generate
from persona_pruner.synthesis.prompts import encode, examples, prompt_ids, stop_ids
from persona_pruner.workspace import stored_held_out

SEED = 20260614
TOKENS = 56


def evaluate_character(
    path: str | Path,
    base: str | None = None,
    questions: str | None = None,
    count: int = 24,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict:
    """Fidelity of a sculpt's output folder or a persona file to its base, on answers of the base.

    Without `questions` the held-out questions and answers that the sculpt stored are used, else the bundled
    held-out questions. Raises InputError when there is no persona file.
    """
    progress = progress or Progress()
    pruned = open_character(path, base, device, dtype)
    if pruned.file is None:
        raise InputError(f"{path} has no persona file, so its base and prompt are unknown")
    dense, tokenizer = models.load_model(base or pruned.file.base, device, dtype)
    pruned.file.check(dense)
    stored = None if questions else stored_held_out(path)
    if stored:
        number, asked = len(stored["questions"]), stored["questions"][:count]
        answers = [answer for i, answer in enumerate(stored["answers"]) if i % number < count]
    else:
        source = [q.text for q in bank.load_questions(questions)] if questions else bank.bundled("heldout")
        asked = source[:count]
        prompts = [prompt_ids(tokenizer, pruned.system, question) for question in asked]
        with progress.stage("dense answers", len(prompts)) as step:
            stops = stop_ids(dense, tokenizer)
            answers = generate(dense, prompts, stops, TOKENS, seed=SEED, done=lambda batch: step(len(batch)))
    reference = dense_reference(dense, examples(tokenizer, pruned.system, asked, answers))
    with progress.stage("pruned model", len(reference.packs)) as step:
        found = fidelity(pruned.model, reference, step)
    texts = [encode(tokenizer, text) for text in bank.passages("neutral")]
    with progress.stage("neutral text", 1):
        neutral, neutral_dense = text_nll(pruned.model, texts), text_nll(dense, texts)
    return {
        "persona": pruned.name,
        "base": pruned.file.base,
        "questions": len(asked),
        "tokens": sum(map(len, answers)),
        "dense_nll": reference.nll,
        "nll_drop": found.nll_drop,
        "kl": found.kl,
        "neutral_nll_drop": neutral - neutral_dense,
    }
