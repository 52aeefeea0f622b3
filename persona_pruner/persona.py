"""Persona: who the model plays, read from plain text, a character card (V1, V2, V3) or a published question set.

Formats: github.com/malfoyslastname/character-card-spec-v2 (V1, V2) and github.com/kwaroran/character-card-spec-v3 (V3).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from persona_pruner import card_files
from persona_pruner.card_files import CARD_SUFFIXES
from persona_pruner.errors import InputError

TEXT_SUFFIXES = (".txt", ".md")

_RENAMED = {"first_message": "first_mes", "example_dialogue": "mes_example", "system_prompt_template": "system_prompt"}
_LISTS = ("alternate_greetings", "tags")
# A comment may hold macros and single braces, up to a hundred: enough, and time and memory stay linear in the text.
_MACRO = re.compile(
    r"(?P<char>\{\{\s*char\s*\}\}|<bot>|<char>)|(?P<user>\{\{\s*user\s*\}\}|<user>)"
    r"|\{\{\s*(?://|comment\s*:)[^{}]*(?:(?:\{\{[^{}]*\}\}|[{}](?![{}]))[^{}]*){0,100}\}\}",
    re.IGNORECASE,
)
_PAPER_TASK = "Answer the question, roleplay as the given persona."
_ORIGINAL = re.compile(r"\{\{\s*original\s*\}\}", re.IGNORECASE)
_NAMED = re.compile(r"(?:You are )?([^\n,:;!?]{1,60}?)( is |, (?:an? |the |who |\d)|, )")
_PARTICLES = {"al", "bin", "da", "de", "del", "der", "di", "du", "el", "la", "le", "of", "the", "van", "von"}
_NOT_NAMES = {"A", "An", "As", "He", "I", "In", "It", "My", "Our", "She", "That", "There", "They", "This", "We", "You"}


@dataclass(frozen=True)
class Persona:
    """One character. The texts are as the card has them, macros unresolved; `raw` is the whole card as read.

    Two personas are equal when their texts are, whatever unknown fields `raw` holds. `dataclasses.replace` makes an
    edited copy; `to_card` and `save` write the edited texts over `raw` and keep everything else in it.
    """

    name: str
    description: str
    personality: str = ""
    scenario: str = ""
    first_message: str = ""
    example_dialogue: str = ""
    system_prompt_template: str = ""
    post_history_instructions: str = ""
    alternate_greetings: tuple[str, ...] = ()
    nickname: str = ""
    tags: tuple[str, ...] = ()
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_text(cls, text: str, name: str | None = None) -> Persona:
        """A persona from a description; without `name` it is guessed from "NAME is ...", else "Character".

        Raises InputError if the description has fewer than two words.
        """
        words = text.split() if isinstance(text, str) else []
        # Chinese, Japanese and Thai write a whole sentence without a space.
        if not words or (len(words) == 1 and (text.isascii() or len(words[0]) < 8)):
            raise InputError(f"a persona description needs at least two words, got {text!r:.60}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the persona description is not valid Unicode") from None
        return cls((name or "").strip() or _guess_name(text), text.strip())

    @classmethod
    def from_card(cls, source: str | Path | dict[str, Any]) -> Persona:
        """A persona from a card file (.json, .png, .charx), from the card as a dict, or from a question set.

        A question set is the JSON of the paper's release: `instruction[0].pos` is its system prompt, word for word,
        and holds the description. A `spec_version` newer than 3.0 is read like 3.0. Raises InputError.
        """
        if not isinstance(source, dict):
            return cls._from_raw(card_files.read_card(str(source)), str(source))
        try:
            blob = json.dumps(source, ensure_ascii=False).encode(errors="surrogatepass")
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"card dict: cannot be written as JSON ({error})") from None
        return cls._from_raw(card_files.parse(blob, "card dict"), "card dict")

    @classmethod
    def load(cls, source: str | Path) -> Persona:
        """A persona from whatever a user may type: a card file, a text file (.txt, .md) or the description itself.

        Raises InputError, also for a path-like source that does not exist and for a file of another kind.
        """
        where = os.fspath(source)
        suffix = os.path.splitext(where)[1].lower()
        if not os.path.isfile(where):
            looks_like_path = suffix in CARD_SUFFIXES + TEXT_SUFFIXES and "\n" not in where
            if looks_like_path or not isinstance(source, str):
                raise InputError(f"{where}: no such file")
            return cls.from_text(source)
        if suffix in CARD_SUFFIXES:
            return cls.from_card(where)
        if suffix not in TEXT_SUFFIXES:
            raise InputError(f"{where}: a persona file ends in {', '.join(CARD_SUFFIXES + TEXT_SUFFIXES)}")
        text = card_files.read_bytes(where, card_files.MAX_CARD)
        try:
            return cls.from_text(text.decode("utf-8-sig"))
        except ValueError as error:  # also InputError, which does not know the file
            raise InputError(f"{where}: {error}") from None

    @classmethod
    def _from_raw(cls, raw: dict[str, Any], where: str) -> Persona:
        if not raw.get("spec") and "instruction" in raw:
            return cls._from_question_set(raw, where)
        spec, data = raw.get("spec"), _card_data(raw)
        if not str(spec or "chara_card_v1").startswith("chara_card_") or not isinstance(data, dict):
            raise InputError(f"{where}: not a character card (spec {spec!r:.60}, data {type(data).__name__})")
        values: dict[str, Any] = {}
        for name, key in _KEYS.items():
            value, kind = data.get(key), list if name in _LISTS else str
            value = kind() if value is None else value
            if not isinstance(value, kind) or (kind is list and not all(isinstance(item, str) for item in value)):
                raise InputError(f"{where}: {key} must be {'a list of texts' if kind is list else 'text'}")
            values[name] = tuple(value) if kind is list else value
        if not (values["description"] + values["personality"]).strip():
            raise InputError(f"{where}: the card has neither a description nor a personality")
        values["name"] = values["name"].strip() or _guess_name(values["description"])
        return cls(**values, raw=raw)

    @classmethod
    def _from_question_set(cls, raw: dict[str, Any], where: str) -> Persona:
        first = raw["instruction"][0] if isinstance(raw["instruction"], list) and raw["instruction"] else None
        prompt = first.get("pos") if isinstance(first, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{where}: the question set has no text in instruction[0].pos")
        description = (prompt.partition("this persona:")[2].strip() or prompt.strip()).removesuffix(_PAPER_TASK).strip()
        return cls(_guess_name(description), description, system_prompt_template=prompt, raw=raw)

    @property
    def example_dialogues(self) -> tuple[str, ...]:
        """The conversations of `example_dialogue`, which `<START>` separates."""
        parts = re.split(r"<start>", self.example_dialogue, flags=re.IGNORECASE)
        return tuple(part.strip() for part in parts if part.strip())

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the system prompt: the same exactly when the model is told the same."""
        return hashlib.sha256(self.system_prompt().encode()).hexdigest()

    def resolve(self, text: str, user: str = "User") -> str:
        """`text` with {{char}}, <BOT>, {{user}} and <USER> replaced and comments removed; other macros stay."""
        values = {"char": self.nickname.strip() or self.name, "user": user, None: ""}
        return _MACRO.sub(lambda match: values[match.lastgroup], text)

    def system_prompt(self, user: str = "User") -> str:
        """The system message: the card's own, with {{original}} standing for the default one, or the default."""
        persona, personality, scenario = self.description.strip(), self.personality.strip(), self.scenario.strip()
        lines = [
            f"You are roleplaying as {{{{char}}}}, a character with this persona: {persona or personality}",
            f"Personality: {personality}" if persona and personality else "",
            f"Scenario: {scenario}" if scenario else "",
            "Example dialogue:" if self.example_dialogues else "",
            *self.example_dialogues,
            "Answer as {{char}} would, in the first person and in character.",
        ]
        prompt = default = "\n".join(filter(None, lines))
        if self.system_prompt_template.strip():
            prompt = _ORIGINAL.sub(lambda _: default, self.system_prompt_template)
        return self.resolve(prompt, user)

    def greeting(self, index: int = 0, user: str = "User") -> str:
        """The character's opening line: 0 is the first message, 1 and up are the alternates. Raises InputError."""
        greetings = (self.first_message, *self.alternate_greetings)
        if not 0 <= index < len(greetings):
            raise InputError(f"{self.name} has greetings 0 to {len(greetings) - 1}, not {index}")
        return self.resolve(greetings[index], user)

    def to_card(self) -> dict[str, Any]:
        """The persona as a new V3 card: `raw` with every unknown field kept and the persona's own texts on top."""
        known = {key: getattr(self, name) for name, key in _KEYS.items()}
        data = _card_data(self.raw)
        top = {} if data is self.raw else {key: value for key, value in self.raw.items() if key != "data"}
        # Some front ends repeat the V1 fields beside `data`: a stale copy there would mislead old readers.
        top |= {key: value for key, value in known.items() if key in top}
        defaults = {"creator": "", "character_version": "", "creator_notes": "", "extensions": {}}
        version = str(top.get("spec_version"))
        newer = re.fullmatch(r"\d{1,9}(\.\d{1,9})?", version) and float(version) > 3.0
        top |= {"spec": "chara_card_v3", "spec_version": version if newer else "3.0"}
        data = {**defaults, "group_only_greetings": [], **data, **known}
        return json.loads(json.dumps({**top, "data": data}))

    def save(self, path: str | Path, image: bytes | None = None) -> None:
        """Write a V3 card as .json, .png or .charx, whole or not at all.

        `image` is the PNG to carry the card (by default one grey pixel); card chunks already in it are replaced, and a
        V2 copy is added for older readers. Files inside a .charx that the card came from are not carried over.
        Raises InputError for another suffix or a bad image, RunError if the file cannot be written.
        """
        card_files.write_card(path, self.to_card(), image)


_KEYS = {item.name: _RENAMED.get(item.name, item.name) for item in fields(Persona) if item.name != "raw"}


def _guess_name(text: str) -> str:
    """The capitalised words before " is " or ", ", else "Character"."""
    match = _NAMED.match(text.strip())
    words = match[1].split() if match else []
    if not words or words[0] in _NOT_NAMES or not (words[0][0].isupper() and words[-1][0].isupper()):
        return "Character"
    if not all(word[0].isupper() or word in _PARTICLES for word in words):
        return "Character"
    # "Quiet, thoughtful man": one word before a bare comma is more often an adjective than a name.
    return "Character" if match[2] == ", " and len(words) == 1 else " ".join(words)


def _card_data(raw: dict[str, Any]) -> Any:
    """Where a card keeps its fields: in `data` (V2, V3), at the top (V1); a question set has none."""
    data = raw.get("data")
    if raw.get("spec") or (isinstance(data, dict) and "description" not in raw):
        return data
    return {} if "instruction" in raw else raw
