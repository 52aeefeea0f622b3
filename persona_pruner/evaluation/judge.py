"""A language model as judge of how well answers play a persona: the paper's metric.

The judge is any OpenAI-compatible server. It is told to answer with a number from 0 to 100, or REFUSAL; the score is
the mean of the numbers weighted by the probability of their tokens where the server gives probabilities, else the
number in its text. Prompts are those of the paper's question sets (`eval_prompt`, with {question} and {answer}).
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from persona_pruner import files
from persona_pruner.errors import InputError, RunError

PROMPT = """Rate how well an answer plays a character.

The character: {persona}

Question:
[QUESTION START]
{question}
[QUESTION END]

Answer:
[ANSWER START]
{answer}
[ANSWER END]

Look only at how well the answer fits this character's nature, knowledge, wishes and manner of speaking.
If the answer refuses to answer, reply REFUSAL. Otherwise reply with one number from 0 (not the character at all) to 100
(exactly the character), and nothing else."""

PAIR_PROMPT = """Two answers were given by someone who plays this character: {persona}

Question:
[QUESTION START]
{question}
[QUESTION END]

Answer A:
[A START]
{first}
[A END]

Answer B:
[B START]
{second}
[B END]

Which answer plays the character better? Reply with A or B, and nothing else."""

TOP = 20  # the most alternatives that servers give
LEAST_MASS = 0.25  # of number tokens, below which probabilities say little and the text is taken
TOKENS = 8  # room for a word or two before the number


@dataclass(frozen=True)
class Verdict:
    """One reply: score in [0, 100] or None, whether it was REFUSAL, the text, and the probability mass of the tokens
    that the score comes from (None where it was read from the text)."""

    score: float | None
    refusal: bool
    text: str
    mass: float | None


def check_prompt(prompt: str, fields: Sequence[str] = ("question", "answer")) -> str:
    """The prompt itself. Raises InputError when a field such as {answer} is missing."""
    for name in fields:
        if f"{{{name}}}" not in prompt:
            raise InputError(f"the judge's prompt has no {{{name}}}")
    return prompt


def fill(prompt: str, **values: str) -> str:
    """The prompt with its fields put in at once: braces within the values stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), prompt)


def read_prompt(source: str | Path) -> str:
    """A judge's prompt: `eval_prompt` of a published question set (.json), or a text file."""
    path = Path(source)
    if path.suffix.lower() == ".json":
        found = files.read_json(path)
        text = found.get("eval_prompt") if isinstance(found, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{path} has no text eval_prompt")
        return check_prompt(text)
    try:
        return check_prompt(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _number(token: str) -> str | None:
    """The digits of a token that is part of a number."""
    digits = token.strip()
    return digits if digits.isascii() and digits.isdigit() and len(digits) <= 3 else None


def expected_score(tokens: Sequence[tuple[str, list[tuple[str, float]]]]) -> tuple[float | None, float]:
    """(mean, mass) of the numbers 0 to 100 that a reply could give where its first number stands, or at its start if it
    gives none; words that were written before it are taken as given.

    tokens: of each place the token that was written and the alternatives with their log-probabilities. Where a
    tokenizer has whole numbers, the first place says it all. Where it has single digits, the digits that were written
    are followed, and numbers are counted that are complete: two digits that cannot be followed by a third, or digits
    that something else follows; what other first digits would have gone on to is not known and not in the mass.
    """
    tokens = list(tokens)
    tokens = tokens[next((place for place, (written, _) in enumerate(tokens) if _number(written)), 0) :]
    weights: dict[int, float] = {}

    def add(digits: str, mass: float) -> None:
        if 0 <= int(digits) <= 100:
            weights[int(digits)] = weights.get(int(digits), 0.0) + mass

    so_far, reached = "", 1.0
    for place, (written, alternatives) in enumerate(tokens):
        found = [(_number(token), math.exp(logprob)) for token, logprob in alternatives]
        whole = place == 0 and any(digits and len(digits) > 1 for digits, _ in found)
        for digits, mass in found:
            if digits is None:
                if so_far:
                    add(so_far, reached * mass)
            elif whole or (len(so_far + digits) >= 2 and so_far + digits != "10"):
                add(so_far + digits, reached * mass)
        digits = _number(written)
        if whole or digits is None or len(so_far + digits) >= 3:
            break
        so_far += digits
        reached *= next((mass for other, mass in found if other == digits), 0.0)
        if len(so_far) == 2 and so_far != "10":
            break  # complete already, and counted
        if place == len(tokens) - 1:
            add(so_far, reached)
    mass = sum(weights.values())
    return (sum(n * w for n, w in weights.items()) / mass if mass else None), min(mass, 1.0)


def text_score(text: str) -> float | None:
    """The first number of 0 to 100 in a reply."""
    found = re.search(r"(?<![\d.])\d{1,3}(?:\.\d+)?(?!\d)", text)
    return float(found[0]) if found and float(found[0]) <= 100 else None


def _refused(text: str) -> bool:
    return text.strip().strip("\"'*`").upper().startswith("REFUS")


class Judge:
    """A judge behind an OpenAI-compatible server, whose replies are kept in `cache` (a JSONL file), so that nothing is
    asked twice.

    endpoint: `URL` or `URL#model`; without a model the server's first one. The key comes from OPENAI_API_KEY. Raises
    InputError without the `openai` package, RunError when the server fails.
    """

    def __init__(self, endpoint: str, cache: str | Path | None = None):
        try:
            import openai
        except ImportError:
            raise InputError("a judge needs the extra `endpoint` (pip install persona-pruner[endpoint])") from None
        self.url, _, self.model = endpoint.partition("#")
        self._errors = (openai.OpenAIError, IndexError)
        self.cache = Path(cache) if cache else None
        self.replies: dict[str, dict] = {}
        if self.cache and self.cache.exists():
            self.replies = {row["key"]: row["reply"] for row in files.read_jsonl(self.cache)}
        try:
            self.client = openai.OpenAI(
                base_url=self.url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=4
            )
            self.model = self.model or self.client.models.list().data[0].id
        except self._errors as error:
            raise RunError(f"the judge at {self.url} failed: {error}") from error

    def _ask(self, prompt: str) -> dict:
        """{"text", "tokens"}: the reply, and [token, [[alternative, log-probability], ...]] of each token, or None."""
        key = files.digest([self.url, self.model, TOKENS, TOP, prompt])
        if key in self.replies:
            return self.replies[key]
        common = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS}
        common |= {"temperature": 0.0, "seed": 0}
        try:
            reply = self._complete(common)
        except self._errors as error:
            raise RunError(f"the judge at {self.url} failed: {error}") from error
        content = reply.logprobs.content if reply.logprobs and reply.logprobs.content else None
        tokens = content and [[t.token, [[o.token, o.logprob] for o in t.top_logprobs]] for t in content]
        found = {"text": reply.message.content or "", "tokens": tokens or None}
        if reply.finish_reason == "length":  # a number at the end may have gone on
            found["text"] = re.sub(r"\d+$", "", found["text"])
        self.replies[key] = found
        if self.cache:
            files.write_jsonl(self.cache, ({"key": k, "reply": v} for k, v in self.replies.items()))
        return found

    def _complete(self, common: dict):
        import openai

        try:
            return self.client.chat.completions.create(**common, logprobs=True, top_logprobs=TOP).choices[0]
        except openai.BadRequestError:  # a server that gives no probabilities
            return self.client.chat.completions.create(**common).choices[0]

    def score(self, prompt: str, question: str, answer: str, persona: str = "") -> Verdict:
        """The verdict on one answer, by a prompt with {question} and {answer}."""
        reply = self._ask(fill(check_prompt(prompt), question=question, answer=answer, persona=persona))
        if _refused(reply["text"]):
            return Verdict(None, True, reply["text"], None)
        mean, mass = expected_score(reply["tokens"]) if reply["tokens"] else (None, 0.0)
        if mean is not None and mass >= LEAST_MASS:
            return Verdict(mean, False, reply["text"], mass)
        return Verdict(text_score(reply["text"]), False, reply["text"], None)

    def prefers_first(self, prompt: str, question: str, first: str, second: str, persona: str = "") -> float | None:
        """Probability that the judge finds the first of two answers better, the mean over both orders; None where it
        says neither A nor B."""
        check_prompt(prompt, ("question", "first", "second"))
        found = []
        for pair, wanted in (((first, second), "A"), ((second, first), "B")):
            reply = self._ask(fill(prompt, question=question, first=pair[0], second=pair[1], persona=persona))
            found.append(_letter(reply, wanted))
        return None if None in found else sum(found) / 2


def _letter(reply: dict, wanted: str) -> float | None:
    """Probability of `wanted` against the other one of A and B, from the first token that is either, or the text."""
    for _, alternatives in reply["tokens"] or ():
        mass = {"A": 0.0, "B": 0.0}
        for token, logprob in alternatives:
            if token.strip() in mass:
                mass[token.strip()] += math.exp(logprob)
        if sum(mass.values()) >= LEAST_MASS:
            return mass[wanted] / sum(mass.values())
    said = re.search(r"\b([AB])\b", reply["text"])
    return None if said is None else float(said[1] == wanted)


def summary(verdicts: Sequence[Verdict]) -> dict:
    """{"score" (mean of those that have one), "scored", "refusals", "unread", "mass" (mean, where it is known)}."""
    scores = [v.score for v in verdicts if v.score is not None]
    masses = [v.mass for v in verdicts if v.mass is not None]
    refusals = sum(v.refusal for v in verdicts)
    return {
        "score": sum(scores) / len(scores) if scores else None,
        "scored": len(scores),
        "refusals": refusals,
        "unread": len(verdicts) - len(scores) - refusals,
        "mass": sum(masses) / len(masses) if masses else None,
    }


def judged(
    judge: Judge,
    prompt: str,
    questions: Sequence[str],
    answers: Sequence[str],
    persona: str = "",
    step: Callable[[int], None] = lambda done: None,
) -> dict:
    """Every answer judged: the `summary`, the verdicts, and who judged by which prompt (sha256 of its text)."""
    verdicts = []
    for question, answer in zip(questions, answers, strict=True):
        verdicts.append(judge.score(prompt, question, answer, persona))
        step(1)
    who = {"judge": judge.model, "url": judge.url, "prompt": files.digest(prompt)[:16]}
    return {**summary(verdicts), **who, "verdicts": [asdict(v) for v in verdicts]}
