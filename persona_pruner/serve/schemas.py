"""What clients send, and what they get back: the part of OpenAI's API that a character needs.

Fields that are not listed are ignored: role-play front ends send many. `min_p` and `repetition_penalty` are additions.
"""

import time
import uuid
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from persona_pruner.errors import InputError
from persona_pruner.fleet import Event, Sampling

ROLES = {"developer": "system", "tool": "user", "function": "user"}


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may hold half a surrogate pair
        raise ValueError("not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Part(_Lenient):
    """A piece of a message's content."""

    type: Literal["text"] = "text"
    text: Text


class Message(_Lenient):
    """One turn. A `name` is accepted and not used; other roles than the three of chat templates are mapped to them."""

    role: Literal["system", "user", "assistant", "developer", "tool", "function"]
    content: Text | list[Part] | None = None

    def plain(self) -> dict:
        parts = self.content if isinstance(self.content, list) else None
        text = "\n".join(part.text for part in parts) if parts is not None else self.content or ""
        return {"role": ROLES.get(self.role, self.role), "content": text}


class StreamOptions(_Lenient):
    include_usage: bool = False


class ResponseFormat(_Lenient):
    type: Literal["text"] = "text"


class _Request(_Lenient):
    model: Annotated[Text, Field(min_length=1, max_length=512)]
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = None
    stop: Text | list[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None

    @field_validator("stop")
    @classmethod
    def _few(cls, stop):
        if isinstance(stop, list) and (len(stop) > 16 or any(len(text) > 256 for text in stop)):
            raise ValueError("at most 16 stop texts of at most 256 characters")
        return stop

    def _sampling(self, tokens: int, logprobs: int | None) -> Sampling:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given = {
            "temperature": self.temperature, "min_p": self.min_p, "repetition_penalty": self.repetition_penalty,
            "top_p": max(self.top_p, 1e-6) if self.top_p is not None else None,
        }  # fmt: skip
        return Sampling(
            max_new_tokens=tokens,
            seed=self.seed if self.seed is not None and self.seed >= 0 else None,  # -1: any, for some front ends
            stop=tuple(text for text in stop if text),
            logprobs=logprobs,
            **{name: value for name, value in given.items() if value is not None},
        )

    def tokens(self, usual: int, most: int) -> int:
        """Tokens to generate. Raises InputError for more than the server allows."""
        wanted = self._wanted() or min(usual, most)
        if wanted > most:
            raise InputError(f"max_tokens is at most {most} here, not {wanted}")
        return wanted

    def _wanted(self) -> int | None:
        return self.max_tokens


class ChatRequest(_Request):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    def _wanted(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def conversation(self) -> list[dict]:
        """Turns as the fleet takes them; system texts that stand first are one."""
        plain = [message.plain() for message in self.messages]
        head = []
        while plain and plain[0]["role"] == "system":
            head.append(plain.pop(0)["content"])
        return [{"role": "system", "content": "\n\n".join(head)}, *plain] if head else plain

    def sampling(self, usual: int, most: int) -> Sampling:
        return self._sampling(self.tokens(usual, most), (self.top_logprobs or 0) if self.logprobs else None)


class CompletionRequest(_Request):
    """Body of /v1/completions: text or token ids, continued as they are, without the character's prompt."""

    prompt: Text | list[int] | Annotated[list[Text] | list[list[int]], Field(min_length=1, max_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None

    def text(self) -> str | list[int]:
        one = self.prompt
        return one[0] if isinstance(one, list) and one and isinstance(one[0], (str, list)) else one

    def sampling(self, usual: int, most: int) -> Sampling:
        return self._sampling(self.tokens(usual, most), self.logprobs)


def error(message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None) -> dict:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Answer:
    """Builds what one request is answered with, whole or in pieces. `token_text(id)` gives (text, bytes) of a token."""

    def __init__(self, chat: bool, model: str, token_text, logprobs: bool):
        self.chat, self.model, self.token_text, self.logprobs = chat, model, token_text, logprobs
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.offset = 0  # of the next token in the text, for the older form of logprobs

    def head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _entry(self, token: int, logprob: float) -> dict:
        text, raw = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    def _logprobs(self, events: list[Event]) -> dict | None:
        if not self.logprobs:
            return None
        events = [e for e in events if e.logprob is not None and self.token_text(e.token) is not None]
        if self.chat:
            content = [
                self._entry(e.token, e.logprob)
                | {"top_logprobs": [self._entry(*best) for best in e.top if self.token_text(best[0]) is not None]}
                for e in events
            ]
            return {"content": content, "refusal": None}
        tokens = [self.token_text(e.token)[0] for e in events]
        offsets = []
        for token in tokens:
            offsets.append(self.offset)
            self.offset += len(token)
        tops = [{self.token_text(t)[0]: p for t, p in e.top if self.token_text(t) is not None} for e in events]
        return {
            "tokens": tokens, "token_logprobs": [e.logprob for e in events], "top_logprobs": tops,
            "text_offset": offsets,
        }  # fmt: skip

    @staticmethod
    def usage(last: Event) -> dict:
        counts = last.prompt_tokens, last.completion_tokens
        return {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}

    def whole(self, events: list[Event]) -> dict:
        """The answer to a request without `stream`."""
        text = "".join(event.text for event in events)
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": self._logprobs(events), "finish_reason": events[-1].finish}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head(kind), "choices": [choice], "usage": self.usage(events[-1])}

    def piece(self, events: list[Event], first: bool = False) -> dict:
        """One chunk of a stream, for events that came together."""
        text = "".join(event.text for event in events)
        finish = events[-1].finish if events else None
        delta = ({"role": "assistant", "content": ""} if first else {}) | ({"content": text} if text else {})
        body = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": self._logprobs(events), "finish_reason": finish}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head(kind), "choices": [choice]}

    def last_usage(self, last: Event) -> dict:
        """The chunk that `stream_options.include_usage` asks for."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head(kind), "choices": [], "usage": self.usage(last)}
