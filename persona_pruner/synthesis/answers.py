"""Answers in character: by the base model itself (the default), an OpenAI-compatible endpoint, or another model."""

from collections.abc import Callable, Sequence

from torch import nn

from persona_pruner.errors import InputError, RunError
from persona_pruner.synthesis.generate import generate
from persona_pruner.synthesis.prompts import chat, encode, prompt_ids, stop_ids

Done = Callable[[list[list[int]]], None]


def self_distilled(
    model: nn.Module,
    tokenizer,
    system: str,
    questions: Sequence[str],
    max_new_tokens: int,
    seed: int = 0,
    start: int = 0,
    done: Done = lambda batch: None,
) -> list[list[int]]:
    """Token ids of the base model's own sampled answers (temperature 0.8) from question `start` on, batch by batch."""
    prompts = [prompt_ids(tokenizer, system, question) for question in questions]
    return generate(model, prompts, stop_ids(model, tokenizer), max_new_tokens, seed=seed, start=start, done=done)


def _as_ids(tokenizer, text: str, max_new_tokens: int) -> list[int]:
    """A written answer as the base model would have ended it, cut to `max_new_tokens`."""
    ids = [*encode(tokenizer, text.strip()), tokenizer.eos_token_id]
    return ids[:max_new_tokens]


def from_model(
    name: str, tokenizer, system: str, questions: Sequence[str], max_new_tokens: int, **rest
) -> list[list[int]]:
    """Answers of another local or hub model (`rest` as for `self_distilled`), in the base model's token ids."""
    from persona_pruner.models import load_model

    other, words = load_model(name)
    done = rest.pop("done", lambda batch: None)
    out: list[list[int]] = []

    def convert(batch: list[list[int]]) -> None:
        texts = [words.decode(ids, skip_special_tokens=True) for ids in batch]
        ids = [_as_ids(tokenizer, text, max_new_tokens) for text in texts]
        out.extend(ids)
        done(ids)

    self_distilled(other, words, system, questions, max_new_tokens, done=convert, **rest)
    return out


def from_endpoint(
    endpoint: str,
    tokenizer,
    system: str,
    questions: Sequence[str],
    max_new_tokens: int,
    references: Sequence[str] = (),
    seed: int = 0,
    start: int = 0,
    done: Done = lambda batch: None,
) -> list[list[int]]:
    """Answers of an OpenAI-compatible server, in the base model's token ids (paper, stage 1: a strong model rewrites).

    endpoint: `URL` or `URL#model`; without a model the server's first one is used. The key comes from OPENAI_API_KEY.
    A question with a reference answer (`references`, "" where there is none) asks for that answer in character.
    Raises InputError without the `openai` package, RunError when the server fails.
    """
    try:
        import openai
    except ImportError:
        raise InputError("an endpoint needs the extra `endpoint` (pip install persona-pruner[endpoint])") from None
    import os

    url, _, name = endpoint.partition("#")
    out: list[list[int]] = []
    try:
        client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=4)
        name = name or client.models.list().data[0].id
        for number in range(start, len(questions)):
            content = questions[number]
            if number < len(references) and references[number]:
                content += f"\n\n(Say this in your own voice: {references[number]})"
            common = {"max_tokens": max_new_tokens, "temperature": 0.8, "seed": seed + number}
            reply = client.chat.completions.create(model=name, messages=chat(system, content), **common)
            ids = _as_ids(tokenizer, reply.choices[0].message.content or "", max_new_tokens)
            out.append(ids)
            done([ids])
    except (openai.OpenAIError, IndexError) as error:
        raise RunError(f"the endpoint {url} failed: {error}") from error
    return out
