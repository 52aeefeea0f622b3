"""ROUGE-L between answers."""

from collections.abc import Sequence

from persona_pruner.errors import InputError


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of ROUGE-L (Lin 2004: longest common subsequence of words, stemmed) over pairs; 1 for equal texts.

    Raises InputError without the extra `compare`.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError("ROUGE-L needs the extra `compare` (pip install persona-pruner[compare])") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = list(zip(answers, references, strict=True))
    return sum(1.0 if a == b else scorer.score(b, a)["rougeL"].fmeasure for a, b in pairs) / max(1, len(pairs))
