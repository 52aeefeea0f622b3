"""Keeps held-out material out of the calibration data: no shared question, no shared run of eight words."""

import re
from collections.abc import Iterable

GRAM = 8


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def grams(text: str, size: int = GRAM) -> set[tuple[str, ...]]:
    """Every run of `size` words; a shorter text is one run, so that short questions are compared whole."""
    row = words(text)
    return {tuple(row[i : i + size]) for i in range(max(1, len(row) - size + 1))} if row else set()


class HeldOut:
    """The words of held-out questions and answers, to test candidates against."""

    def __init__(self, texts: Iterable[str] = ()):
        self.seen: set[tuple[str, ...]] = set()
        for text in texts:
            self.seen |= grams(text)

    def touches(self, text: str) -> bool:
        """Whether the text shares a run of eight words (or is equal, if shorter) with held-out material."""
        return not self.seen.isdisjoint(grams(text))


def near_duplicates(texts: Iterable[str], threshold: float = 0.7) -> list[int]:
    """Indices to keep: each text whose word set has a Jaccard similarity under `threshold` to all kept before."""
    kept: list[int] = []
    sets: list[frozenset[str]] = []
    for index, text in enumerate(texts):
        bag = frozenset(words(text))
        if bag and all(len(bag & other) < threshold * len(bag | other) for other in sets):
            kept.append(index)
            sets.append(bag)
    return kept
