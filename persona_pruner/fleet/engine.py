"""The fleet: characters, requests, and the steps in which they are answered.

A step is one batch of new tokens, chosen by the scheduler: rows are grouped by character for the FFN and go through
everything else together. Requests join and leave between steps.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.fleet.characters import Characters, Resident
from persona_pruner.fleet.decoder import Batch, Decoder
from persona_pruner.fleet.requests import Event, QueueFull, Request, prompt_tokens
from persona_pruner.fleet.sampling import Sampling, best_tokens, choose, logprobs
from persona_pruner.fleet.scheduler import Scheduler
from persona_pruner.fleet.text import TextStream
from persona_pruner.formats.persona_file import PersonaFile
from persona_pruner.ops.paged_attention import BLOCK
from persona_pruner.synthesis.prompts import stop_ids


class Fleet:
    """Many characters on one base model. Not thread-safe: one thread owns it and calls `step`.

    model: a causal LM of transformers (Llama, Qwen2, Qwen3, Mistral, Gemma 3), from whose weights copies are made;
    dtype: that of the copies, float32, bfloat16, float16 or int8 (rows quantized, with a scale each), None for the
    model's own. kv_bytes: most bytes of keys and values; max_rows: most requests answered at once; max_queue: most that
    wait. Raises InputError for other families.

    stop_ids: the tokens that end an answer, those of the model and its chat template; with none, only the length and
    stop strings do.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        dtype: torch.dtype | None = None,
        kv_bytes: int = 256 << 20,
        max_rows: int = 32,
        max_queue: int = 1024,
        base: str | None = None,
        consume: bool = False,
    ):
        self.tokenizer, self.base = tokenizer, models.base_name(model, base)
        fingerprint, self.stop_ids = models.fingerprint(model), stop_ids(model, tokenizer)
        self.decoder = Decoder(model, dtype or model.get_input_embeddings().weight.dtype, consume)
        total = kv_bytes // self.decoder.block_bytes
        if total < 1 or max_rows < 1 or max_queue < 1:
            raise InputError(
                f"kv_bytes must hold one block of {self.decoder.block_bytes} bytes; max_rows, max_queue at least 1"
            )
        self.max_rows, self.max_queue = max_rows, max_queue
        self._cache = self.decoder.cache(total)
        self._characters = Characters(self.decoder.widths, fingerprint, self.base, max_rows)
        self._scheduler = Scheduler(total, max_rows, self.decoder.context)
        self._cancelled: list[Request] = []
        self._numbers, self._steps, self._generated = 0, 0, 0

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype | str | None = None,
        device: str = "cpu",
        kv_bytes: int = 256 << 20,
        max_rows: int = 32,
        max_queue: int = 1024,
        hub: bool = False,
    ) -> "Fleet":
        """The fleet of a base model by alias, folder or hub name. dtype: float32, bfloat16 (the default), float16,
        int8, as a torch dtype or by name. Raises InputError or RunError as `load_model` does."""
        named = models.DTYPES | {"int8": torch.int8, "auto": torch.bfloat16}
        if isinstance(dtype, str) and dtype not in named:
            raise InputError(f"dtype {dtype!r} is not one of {', '.join(named)}")
        kind = named[dtype] if isinstance(dtype, str) else dtype or torch.bfloat16
        model, tokenizer = models.load_model(name, device, torch.float32 if kind == torch.int8 else kind, hub)
        return cls(model, tokenizer, kind, kv_bytes, max_rows, max_queue, str(name), consume=True)

    # ---- characters

    def add(self, name: str, file: str | Path | PersonaFile) -> None:
        """Makes a character available under a name, in place of another of that name, whose requests go on.

        Raises InputError when the file is damaged or was made for another base."""
        old = self._characters.add(name, file if isinstance(file, PersonaFile) else PersonaFile.load(file))
        if old is not None:
            self._scheduler.blocks.forget(old.serial)

    def remove(self, name: str) -> None:
        """Forgets a character; requests under way are answered to their end. Raises InputError for an unknown name."""
        self._scheduler.blocks.forget(self._characters.remove(name).serial)

    def names(self) -> list[str]:
        """The characters, in the order in which they came; without the dense base model."""
        return self._characters.names()

    def arrange(self) -> None:
        """Puts the FFN channels that most characters keep next to each other, so that a character's are read in longer
        stretches (docs/fleet.md). To be called when characters have been added, between two steps at any time; it takes
        the time of copying the FFN weights once. Sums are taken in another order afterwards: an answer may differ from
        one before as it does on another machine."""
        self.decoder.arrange(self._characters.arrange())

    def info(self, name: str) -> dict:
        """What is known of a character: bytes in memory, kept channels by layer, their share, prompt, greeting."""
        one = self._characters[name]
        size = len(one.bits or b"") + len(one.system.encode()) + len(one.greeting.encode())
        return {
            "name": name, "bytes": size, "widths": list(one.widths), "ratio": one.ratio,
            "system": one.system, "greeting": one.greeting,
        }  # fmt: skip

    # ---- requests

    def submit(
        self, name: str, messages: Sequence[dict] | Sequence[int] | str, sampling: Sampling | None = None
    ) -> int:
        """Takes a request and returns its number.

        messages: {"role", "content"} of a conversation, before which the character's system prompt is put; or token
        ids, or text, to be continued as they are. Raises InputError (unknown name, a prompt that is empty or can never
        fit) and QueueFull.
        """
        one, sampling = self._characters[name], sampling or Sampling()
        if len(self._scheduler.waiting) >= self.max_queue:
            raise QueueFull(f"{self.max_queue} requests are waiting already")
        vocabulary = self.decoder.embedding.weight.shape[0]
        tokens = prompt_tokens(self.tokenizer, vocabulary, one.system, messages)
        most = min(len(tokens) + sampling.max_new_tokens, self.decoder.context)
        if not tokens:
            raise InputError("the prompt is empty")
        if len(tokens) >= self.decoder.context:
            raise InputError(f"the prompt has {len(tokens)} tokens; the model's context ends at {self.decoder.context}")
        room = self._scheduler.blocks.total * BLOCK
        if most - 1 > room:
            raise InputError(f"{most} tokens of prompt and answer can never fit into the cache of {room} tokens")
        self._numbers += 1
        text = TextStream(self.tokenizer, sampling.stop)
        random = np.random.default_rng(sampling.seed)
        self.decoder.room(most)
        request = Request(self._numbers, one, tokens, len(tokens), most, sampling, text, random)
        self._scheduler.waiting.append(request)
        return self._numbers

    def cancel(self, request: int) -> None:
        """Ends a request; the next step says so. A number that is not under way is ignored."""
        found = self._scheduler.find(request)
        if found is not None:
            self._scheduler.leave(found)
            self._cancelled.append(found)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._scheduler.waiting or self._scheduler.running or self._cancelled)

    def stats(self) -> dict:
        """Requests running, those of them whose prompt is not computed yet (`prefilling`), and queued; bytes of keys
        and values in use (`kv_known`: of nobody, but not forgotten) and their budget; tokens generated, prompt tokens
        computed and found in the cache; steps."""
        size, scheduler, blocks = self.decoder.block_bytes, self._scheduler, self._scheduler.blocks
        return {
            "running": len(scheduler.running), "prefilling": scheduler.prefilling, "queued": len(scheduler.waiting),
            "kv_used": (blocks.total - blocks.available) * size, "kv_known": blocks.known_idle * size,
            "kv_bytes": blocks.total * size, "tokens": self._generated, "prompt_tokens": scheduler.computed,
            "prompt_tokens_reused": scheduler.reused, "steps": self._steps, "characters": len(self._characters),
            "base_bytes": self.decoder.nbytes,
        }  # fmt: skip

    # ---- steps

    def step(self) -> list[Event]:
        """One step of the scheduler; the events of its tokens, [] when there is nothing to do."""
        events = [request.event(finish="cancelled") for request in self._cancelled]
        self._cancelled.clear()
        parts = self._scheduler.plan()
        if not parts:
            return events
        wanted = [request for request, count in parts if request.done + count == len(request.tokens)]
        logits = self.decoder.forward(self._batch(parts), *self._cache)
        self._steps += 1
        for request, count in parts:
            self._scheduler.written(request, count)
        for request, scores, token in zip(wanted, logits.unbind(), best_tokens(logits), strict=True):
            events.append(self._next(request, scores, token))
        return events

    def _batch(self, parts: list[tuple[Request, int]]) -> Batch:
        # Lists and few calls: each call that finds its code swept out of the caches costs 2 to 40 us, at every token.
        tokens, positions, rows, last = [], [], [], []
        sizes: dict[Resident, int] = {}
        for request, count in parts:
            end = request.done + count
            tokens += request.tokens[request.done : end]
            positions += range(request.done, end)
            rows += [request.slot] * count
            if end == len(request.tokens):
                last.append(len(tokens) - 1)
            sizes[request.resident] = sizes.get(request.resident, 0) + count
        channels, segments = self._characters.segments(sizes)
        tables = np.ascontiguousarray(self._scheduler.tables[:, : max(len(r.table) for r, _ in parts)])
        put = self.decoder.device
        places = torch.tensor([positions, rows], dtype=torch.int32, device=put)
        return Batch(
            torch.tensor(tokens, device=put), *places.unbind(), torch.from_numpy(tables).to(put),
            torch.tensor(last, dtype=torch.long, device=put), channels.to(put), segments,
        )  # fmt: skip

    def _next(self, request: Request, scores: torch.Tensor, token: int) -> Event:
        sampling, found = request.sampling, {}
        try:
            if not sampling.greedy:
                token = choose(scores, sampling, request.tokens, request.random)
            elif math.isnan(scores[token]):
                raise ValueError("the model's logits are not numbers")
        except ValueError as error:
            self._scheduler.leave(request)
            return request.event(finish="error", error=str(error))
        if sampling.logprobs is not None:
            found["logprob"], found["top"] = logprobs(scores, token, sampling.logprobs)
        request.tokens.append(token)
        self._generated += 1
        text, finish = "", None
        if token in self.stop_ids:
            finish = "stop"
        else:
            text, stopped = request.text.add(token)
            finish = "stop" if stopped else "length" if len(request.tokens) >= request.most else None
            if finish == "length":
                text += request.text.rest()
        if token in self.stop_ids:
            text = request.text.rest()
        if finish:
            self._scheduler.leave(request)
        return request.event(token=token, text=text, finish=finish, **found)

    def stream(
        self, requests: Iterable[tuple[str, Sequence[dict]]], max_new_tokens: int = 128, **sampling
    ) -> Iterator[Event]:
        """Answers requests (name, messages) and yields their events as they come; the rest are fields of Sampling.

        Requests are numbered 0, 1, ... in their order, and each has a seed of its own where one is given. Raises
        InputError for a request that cannot be met. Closing the iterator cancels what is left.
        """
        settings, todo = Sampling(max_new_tokens, **sampling), deque(enumerate(requests))
        numbers: dict[int, int] = {}
        try:
            while todo or numbers:
                while todo and len(self._scheduler.waiting) < self.max_queue:
                    index, (name, messages) = todo.popleft()
                    seed = None if settings.seed is None else settings.seed + index
                    numbers[self.submit(name, messages, replace(settings, seed=seed))] = index
                for event in self.step():
                    if event.request not in numbers:
                        continue
                    index = numbers.pop(event.request) if event.finish else numbers[event.request]
                    yield replace(event, request=index)
        finally:
            for number in numbers:
                self.cancel(number)
