"""Held-out material never reaches scores, search, repair or recovery: checked by content hash."""

from collections.abc import Iterable, Sequence

from persona_pruner import files
from persona_pruner.errors import RunError
from persona_pruner.material import Material
from persona_pruner.packing import Example
from persona_pruner.synthesis.prompts import prompt_ids


def hashes(prompts: Iterable[Sequence[int]], answers: Iterable[Sequence[int]]) -> set[str]:
    """sha256 of the token ids of every prompt and of every answer."""
    return {files.digest([kind, list(ids)]) for kind, rows in (("q", prompts), ("a", answers)) for ids in rows}


def fenced(tokenizer, material: Material) -> list[Example]:
    """The calibration examples of a persona. Raises RunError when one of them has the prompt or the answer of a
    held-out question, under the persona's prompt or without it."""
    held = [prompt_ids(tokenizer, system, q) for system in (material.system, "") for q in material.questions]
    closed = hashes(held, material.answers)
    for example in material.calibration:
        if not closed.isdisjoint(hashes([example.prompt], [example.answer])):
            raise RunError("a calibration example is held-out material; nothing was measured")
    return material.calibration
