"""What a fleet is asked for, and the events in which it answers."""

from dataclasses import dataclass, field

import numpy as np

from persona_pruner.errors import InputError, RunError
from persona_pruner.fleet.characters import Resident
from persona_pruner.fleet.sampling import Sampling
from persona_pruner.fleet.text import TextStream
from persona_pruner.ops.paged_attention import BLOCK
from persona_pruner.synthesis.prompts import encode, render


class QueueFull(RunError):
    """The request was not taken: too many are waiting."""


@dataclass
class Event:
    """One new token of a request, or its end.

    text: new since the last event, whole characters, nothing of a stop string. finish: None, 'stop' (end of turn or a
    stop string), 'length', 'cancelled' or 'error' (`error` says why). `top`: the best tokens and their log
    probabilities, where the request asked for them.
    """

    request: int
    name: str
    token: int | None = None
    text: str = ""
    finish: str | None = None
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


@dataclass(eq=False)
class Request:
    """A request under way. slot, table, parents: its place in the cache, once it is admitted."""

    number: int
    resident: Resident
    tokens: list[int]  # prompt and answer
    prompt: int
    most: int  # tokens, prompt and answer
    sampling: Sampling
    text: TextStream
    random: np.random.Generator
    slot: int = -1
    table: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # serial before each block that is known, and before the next one
    done: int = 0  # tokens whose keys and values are in the cache

    def event(self, **rest) -> Event:
        answer = len(self.tokens) - self.prompt
        return Event(self.number, self.resident.name, prompt_tokens=self.prompt, completion_tokens=answer, **rest)

    def block(self, index: int) -> tuple[int, ...]:
        return tuple(self.tokens[index * BLOCK : (index + 1) * BLOCK])


def prompt_tokens(tokenizer, vocabulary: int, system: str, messages) -> list[int]:
    """The tokens of a conversation, of a text, or of token ids below `vocabulary`; see Fleet.submit. `system`: the
    character's prompt, put before a conversation. Raises InputError."""
    if isinstance(messages, str):
        return list(tokenizer(messages)["input_ids"])
    messages = list(messages)
    if not all(isinstance(m, dict) for m in messages):
        tokens = [int(m) for m in messages]
        if not all(0 <= token < vocabulary for token in tokens):
            raise InputError(f"a token is outside 0 .. {vocabulary - 1}")
        return tokens
    if not messages:
        return []
    if not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
        raise InputError("a message must have a role and a content, both text")
    if system:
        own = [m["content"] for m in messages[:1] if m["role"] == "system"]
        messages = [{"role": "system", "content": "\n\n".join([system, *own])}, *messages[len(own) :]]
    return list(encode(tokenizer, render(tokenizer, messages)))
