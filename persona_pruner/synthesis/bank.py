"""Questions from files: the bundled bank, Alpaca and ShareGPT exports, and the published persona question sets."""

import json
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

from persona_pruner import files
from persona_pruner.errors import InputError

MAX_WORDS = 120  # a longer "question" is a document; it would not fit the calibration budget


@dataclass(frozen=True)
class Question:
    """An instruction; `answer` is a reference answer where the source has one."""

    text: str
    answer: str = ""


def _data(name: str) -> list[dict]:
    text = (package_files("persona_pruner") / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def bundled(split: str) -> list[str]:
    """The package's own question bank: split "search" (416 questions) or "heldout" (80)."""
    return [row["question"] for row in _data("questions.jsonl") if row["split"] == split]


def passages(split: str) -> list[str]:
    """Neutral prose: split "calibration" (32, for the baselines) or "neutral" (16, general ability)."""
    return [row["text"] for row in _data("passages.jsonl") if row["split"] == split]


def quiz() -> list[dict]:
    """60 multiple-choice questions: {"question", "choices", "answer"}."""
    return _data("quiz.jsonl")


def _field(row: dict, *names: str) -> str:
    return next((str(row[name]).strip() for name in names if isinstance(row.get(name), str) and row[name].strip()), "")


def _question(row) -> Question | None:
    """A question from one row of a file: a string, an Alpaca or Q/A record, or a ShareGPT conversation."""
    if isinstance(row, str):
        return Question(row.strip()) if row.strip() else None
    if not isinstance(row, dict):
        return None
    turns = row.get("conversations") or row.get("messages")
    if isinstance(turns, list):
        says = [
            (turn.get("from") or turn.get("role"), _field(turn, "value", "content"))
            for turn in turns
            if isinstance(turn, dict)
        ]
        says = [(who, text) for who, text in says if who != "system"]
        if not says or says[0][0] not in ("human", "user") or not says[0][1]:
            return None
        return Question(says[0][1], says[1][1] if len(says) > 1 else "")
    text = _field(row, "question", "instruction", "prompt", "query")
    extra = _field(row, "input") if "instruction" in row else ""
    answer = _field(row, "answer", "output", "response", "completion")
    return Question(f"{text}\n{extra}" if extra else text, answer) if text else None


def _usable(question: Question) -> bool:
    """Whether a question is short enough and valid Unicode: JSON may hold half a surrogate pair."""
    try:
        f"{question.text}{question.answer}".encode()
    except UnicodeEncodeError:
        return False
    return len(question.text.split()) <= MAX_WORDS


def load_questions(source: str | Path) -> list[Question]:
    """Questions of a .json or .jsonl file (Alpaca, ShareGPT, plain strings, or the paper's persona sets with a
    "questions" list), else of a dataset by name (`owner/name`, with the extra `datasets`).

    Raises InputError, naming the source, when it is missing, unreadable or holds no question.
    """
    path = Path(source)
    if path.suffix.lower() == ".jsonl":
        rows = files.read_jsonl(path)
    elif path.suffix.lower() == ".json":
        rows = files.read_json(path)
        if isinstance(rows, dict):
            rows = next(
                (rows[key] for key in ("questions", "data", "examples") if isinstance(rows.get(key), list)), [rows]
            )
    else:
        rows = _dataset(str(source))
    read = map(_question, rows if isinstance(rows, list) else [rows])
    found = [question for question in read if question and _usable(question)]
    if not found:
        raise InputError(
            f"{source} holds no questions (Alpaca, ShareGPT, a list of strings, or a published persona set)"
        )
    return list({question.text: question for question in found}.values())


def _dataset(name: str) -> list[dict]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"no question file {name} (.json or .jsonl); a dataset by name needs the extra `datasets`"
        ) from None
    try:
        return list(datasets.load_dataset(name, split="train"))
    except Exception as error:  # the library raises many kinds, from network to parsing
        raise InputError(f"dataset {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
