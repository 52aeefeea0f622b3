"""The fleet: characters, requests, and the steps in which they are answered.

A step takes one token of every running request that is being answered, and tokens of prompts up to a budget, in one
batch: rows are grouped by character for the FFN and go through everything else together. Requests join and leave
between steps. A request is admitted, in the order of arrival, when the cache has room for its whole answer, so that
none is ever thrown out half-way. A prompt's blocks that are known (blocks.py) are not computed again, and a block that
another request is just computing is waited for.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from persona_pruner import models
from persona_pruner.errors import InputError, RunError
from persona_pruner.fleet.blocks import Blocks, new_serial
from persona_pruner.fleet.decoder import Batch, Decoder
from persona_pruner.fleet.sampling import Sampling, choose, logprobs
from persona_pruner.fleet.text import TextStream
from persona_pruner.formats.persona_file import PersonaFile, pack_bits, unpack_bits
from persona_pruner.ops.paged_attention import BLOCK
from persona_pruner.synthesis.prompts import encode, render, stop_ids

DENSE = ""  # the name of the base model itself: all channels, no prompt
PROMPT_TOKENS = 128  # of prompts in a step, so that those being answered do not wait long for those that come


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


@dataclass
class _Resident:
    """A character in memory; bits: the packed masks of all layers, or None for all channels."""

    name: str
    system: str = ""
    greeting: str = ""
    ratio: float = 1.0
    bits: bytes | None = None
    widths: tuple[int, ...] = ()
    serial: int = field(default_factory=new_serial)


@dataclass(eq=False)
class _Request:
    number: int
    resident: _Resident
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


class Fleet:
    """Many characters on one base model. Not thread-safe: one thread owns it and calls `step`.

    model: a causal LM of transformers (Llama, Qwen2, Qwen3, Mistral, Gemma 3), from whose weights copies are made;
    dtype: that of the copies, float32, bfloat16, float16 or int8 (rows quantized, with a scale each), None for the
    model's own. kv_bytes: most bytes of keys and values; max_rows: most requests answered at once; max_queue: most that
    wait. Raises InputError for other families.
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
        self._fingerprint, self._stop = models.fingerprint(model), stop_ids(model, tokenizer)
        self.decoder = Decoder(model, dtype or model.get_input_embeddings().weight.dtype, consume)
        total = kv_bytes // self.decoder.block_bytes
        if total < 1 or max_rows < 1 or max_queue < 1:
            raise InputError(
                f"kv_bytes must hold one block of {self.decoder.block_bytes} bytes; max_rows, max_queue at least 1"
            )
        self._cache, self._blocks = self.decoder.cache(total), Blocks(total)
        self.max_rows, self.max_queue = max_rows, max_queue
        widths = tuple(self.decoder.widths)
        self._residents = {DENSE: _Resident(DENSE, widths=widths)}
        self._channels: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._slots = list(range(max_rows))[::-1]
        self._tables = np.zeros((max_rows, -(-self.decoder.context // BLOCK)), np.int32)
        self._cancelled: list[_Request] = []
        self._grouped: tuple = ()
        self._numbers, self._steps, self._generated, self._computed, self._reused = 0, 0, 0, 0, 0

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
        if name == DENSE:
            raise InputError("the empty name is that of the base model")
        file = file if isinstance(file, PersonaFile) else PersonaFile.load(file)
        if file.fingerprint != self._fingerprint:
            raise InputError(
                f"persona {file.name!r} was made for {file.base} and does not fit {self.base}: "
                "config or weight shapes differ"
            )
        bits = b"".join(pack_bits(mask).numpy().tobytes() for mask in file.masks)
        share = sum(file.widths) / sum(self.decoder.widths)
        self._drop(name)
        self._residents[name] = _Resident(name, file.system, file.greeting, share, bits, tuple(file.widths))

    def remove(self, name: str) -> None:
        """Forgets a character; requests under way are answered to their end. Raises InputError for an unknown name."""
        if name == DENSE or name not in self._residents:
            raise InputError(f"there is no character {name!r} to remove")
        self._drop(name)

    def _drop(self, name: str) -> None:
        old = self._residents.pop(name, None)
        if old is not None:
            self._channels.pop(old.serial, None)
            self._blocks.forget(old.serial)

    def names(self) -> list[str]:
        """The characters, in the order in which they came; without the dense base model."""
        return [name for name in self._residents if name != DENSE]

    def info(self, name: str) -> dict:
        """What is known of a character: bytes in memory, kept channels by layer, their share, prompt, greeting."""
        one = self._resident(name)
        size = len(one.bits or b"") + len(one.system.encode()) + len(one.greeting.encode())
        return {
            "name": name, "bytes": size, "widths": list(one.widths), "ratio": one.ratio,
            "system": one.system, "greeting": one.greeting,
        }  # fmt: skip

    def _resident(self, name: str) -> _Resident:
        if name not in self._residents:
            raise InputError(f"there is no character {name!r}")
        return self._residents[name]

    def _kept(self, one: _Resident) -> tuple[np.ndarray, np.ndarray]:
        """(channels of all layers int32, where each layer's begin [layers + 1]); kept for those lately used."""
        if one.serial not in self._channels:
            lists, start = [], 0
            for width in self.decoder.widths:
                if one.bits is None:
                    lists.append(np.arange(width, dtype=np.int32))
                    continue
                size = -(-width // 8)
                packed = torch.frombuffer(bytearray(one.bits[start : start + size]), dtype=torch.uint8)
                lists.append(unpack_bits(packed, width).nonzero()[:, 0].numpy().astype(np.int32))
                start += size
            self._channels[one.serial] = np.concatenate(lists), np.cumsum([0, *map(len, lists)])
        self._channels.move_to_end(one.serial)
        while len(self._channels) > self.max_rows:
            self._channels.popitem(last=False)
        return self._channels[one.serial]

    # ---- requests

    def submit(
        self, name: str, messages: Sequence[dict] | Sequence[int] | str, sampling: Sampling | None = None
    ) -> int:
        """Takes a request and returns its number.

        messages: {"role", "content"} of a conversation, before which the character's system prompt is put; or token
        ids, or text, to be continued as they are. Raises InputError (unknown name, a prompt that is empty or can never
        fit) and QueueFull.
        """
        one, sampling = self._resident(name), sampling or Sampling()
        if len(self._waiting) >= self.max_queue:
            raise QueueFull(f"{self.max_queue} requests are waiting already")
        tokens = self._encode(one, messages)
        most = min(len(tokens) + sampling.max_new_tokens, self.decoder.context)
        if not tokens:
            raise InputError("the prompt is empty")
        if len(tokens) >= self.decoder.context:
            raise InputError(f"the prompt has {len(tokens)} tokens; the model's context ends at {self.decoder.context}")
        room = self._blocks.total * BLOCK
        if most - 1 > room:
            raise InputError(f"{most} tokens of prompt and answer can never fit into the cache of {room} tokens")
        self._numbers += 1
        text = TextStream(self.tokenizer, sampling.stop)
        random = np.random.default_rng(sampling.seed)
        self._waiting.append(_Request(self._numbers, one, tokens, len(tokens), most, sampling, text, random))
        return self._numbers

    def _encode(self, one: _Resident, messages) -> list[int]:
        if isinstance(messages, str):
            return list(self.tokenizer(messages)["input_ids"])
        messages = list(messages)
        if not all(isinstance(m, dict) for m in messages):
            tokens = [int(m) for m in messages]
            vocabulary = self.decoder.embedding.weight.shape[0]
            if not all(0 <= token < vocabulary for token in tokens):
                raise InputError(f"a token is outside 0 .. {vocabulary - 1}")
            return tokens
        if not messages:
            return []
        if not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
            raise InputError("a message must have a role and a content, both text")
        if one.system:
            own = [m["content"] for m in messages[:1] if m["role"] == "system"]
            messages = [{"role": "system", "content": "\n\n".join([one.system, *own])}, *messages[len(own) :]]
        return list(encode(self.tokenizer, render(self.tokenizer, messages)))

    def cancel(self, request: int) -> None:
        """Ends a request; the next step says so. A number that is not under way is ignored."""
        for found in [r for r in (*self._waiting, *self._running) if r.number == request]:
            self._leave(found)
            self._cancelled.append(found)

    def _leave(self, request: _Request) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
            return
        self._running.remove(request)
        self._slots.append(request.slot)
        self._blocks.release(request.table, request)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._running or self._cancelled)

    def stats(self) -> dict:
        """Requests running and queued; bytes of keys and values in use (`kv_known`: of nobody, but not forgotten) and
        their budget; tokens generated, prompt tokens computed and found in the cache; steps."""
        size, blocks = self.decoder.block_bytes, self._blocks
        return {
            "running": len(self._running), "queued": len(self._waiting),
            "kv_used": (blocks.total - blocks.available) * size, "kv_known": blocks.known_idle * size,
            "kv_bytes": blocks.total * size, "tokens": self._generated, "prompt_tokens": self._computed,
            "prompt_tokens_reused": self._reused, "steps": self._steps, "characters": len(self._residents) - 1,
            "base_bytes": self.decoder.nbytes,
        }  # fmt: skip

    # ---- steps

    def step(self) -> list[Event]:
        """One step of the scheduler; the events of its tokens, [] when there is nothing to do."""
        events = [request.event(finish="cancelled") for request in self._cancelled]
        self._cancelled.clear()
        while self._waiting and self._slots and self._admit(self._waiting[0]):
            self._running.append(self._waiting.popleft())
        parts = self._plan()
        if not parts:
            return events
        wanted = [request for request, count in parts if request.done + count == len(request.tokens)]
        logits = self.decoder.forward(self._batch(parts), *self._cache)
        self._steps += 1
        for request, count in parts:
            self._written(request, count)
        best = logits.argmax(-1).tolist() if len(wanted) > 1 else [None] * len(wanted)
        for request, scores, token in zip(wanted, logits, best, strict=True):
            events.append(self._next(request, scores, token))
        return events

    def _admit(self, request: _Request) -> bool:
        """Gives the request its blocks, those of its prompt that are known first; False when there are too few."""
        blocks, tokens = self._blocks, request.tokens
        parent, found = request.resident.serial, []
        request.parents = [parent]
        whole = (len(tokens) - 1) // BLOCK  # the last token is always computed, for its logits
        for index in range(whole):
            block = blocks.find(parent, request.block(index))
            if block is None:
                break
            parent = blocks.serial[block]
            found.append(block)
            request.parents.append(parent)
        need = -(-(request.most - 1) // BLOCK)
        if need - len(found) > blocks.available - sum(map(blocks.is_idle, found)):
            return False
        for block in found:
            blocks.hold(block)
        request.table = found + [blocks.take() for _ in range(need - len(found))]
        for index in range(len(found), whole):
            block = request.table[index]
            blocks.name(block, parent, request.block(index), request)
            parent = blocks.serial[block]
            request.parents.append(parent)
        request.slot = self._slots.pop()
        self._tables[request.slot, : len(request.table)] = request.table
        self.decoder.room(request.most)
        return True

    def _plan(self) -> list[tuple[_Request, int]]:
        """(request, new tokens) of this step, by character."""
        left, parts, here = PROMPT_TOKENS, [], set()
        for request in self._running:
            count = 1
            if request.done < request.prompt - 1 or not request.done:
                self._skip(request, here)
                count = self._ready(request, min(request.prompt - request.done, left), here)
                left -= count
            if count:
                parts.append((request, count))
                here.update(request.table[request.done // BLOCK : (request.done + count) // BLOCK])
        return sorted(parts, key=lambda part: part[0].resident.serial)

    def _skip(self, request: _Request, here: set[int]) -> None:
        """Goes past blocks of the prompt that are filled, or will be by a request before it in this step."""
        blocks, whole = self._blocks, (request.prompt - 1) // BLOCK
        while request.done % BLOCK == 0 and (index := request.done // BLOCK) < whole:
            block = request.table[index]
            if not blocks.filled[block] and block not in here:
                break
            request.done += BLOCK
            self._reused += BLOCK

    def _ready(self, request: _Request, most: int, here: set[int]) -> int:
        """How many tokens of the prompt can be computed now: up to a block that someone else is computing."""
        blocks, whole = self._blocks, (request.prompt - 1) // BLOCK
        for index in range(request.done // BLOCK, min(-(-(request.done + most) // BLOCK), whole)):
            block = request.table[index]
            if blocks.filled[block] or block in here or blocks.writer[block] not in (None, request):
                return max(0, min(most, index * BLOCK - request.done))
            blocks.writer[block] = request
        return most

    def _batch(self, parts: list[tuple[_Request, int]]) -> Batch:
        counts = np.array([count for _, count in parts])
        tokens = np.concatenate([r.tokens[r.done : r.done + count] for r, count in parts])
        positions = np.concatenate([np.arange(r.done, r.done + count, dtype=np.int32) for r, count in parts])
        rows = np.repeat(np.array([r.slot for r, _ in parts], np.int32), counts)
        ends = np.cumsum(counts) - 1
        last = [end for (r, count), end in zip(parts, ends, strict=True) if r.done + count == len(r.tokens)]
        sizes: dict[int, int] = {}
        for request, count in parts:
            sizes[request.resident.serial] = sizes.get(request.resident.serial, 0) + count
        residents = {r.resident.serial: r.resident for r, _ in parts}
        if self._grouped[:1] != (tuple(sizes),):
            kept = [self._kept(residents[serial]) for serial in sizes]
            offsets = np.cumsum([0, *(len(channels) for channels, _ in kept)])
            first = np.stack([begin[:-1] + offset for (_, begin), offset in zip(kept, offsets, strict=False)], 1)
            width = np.stack([np.diff(begin) for _, begin in kept], 1)
            channels = torch.from_numpy(np.concatenate([channels for channels, _ in kept])).to(self.decoder.device)
            self._grouped = tuple(sizes), first, width, channels
        _, first, width, channels = self._grouped
        segments = np.stack([np.broadcast_to(list(sizes.values()), first.shape), first, width], 2).astype(np.int64)
        longest = max(len(r.table) for r, _ in parts)
        put = self.decoder.device
        return Batch(
            torch.from_numpy(tokens).to(put), torch.from_numpy(positions).to(put), torch.from_numpy(rows).to(put),
            torch.from_numpy(np.ascontiguousarray(self._tables[:, :longest])).to(put),
            torch.tensor(last, dtype=torch.long, device=put), channels, torch.from_numpy(segments),
        )  # fmt: skip

    def _written(self, request: _Request, count: int) -> None:
        """The request's next tokens are in the cache; whole blocks of them are known from now on."""
        blocks = self._blocks
        before, request.done = request.done, request.done + count
        self._computed += max(0, min(request.done, request.prompt) - before)
        for index in range(before // BLOCK, request.done // BLOCK):
            block, parent = request.table[index], request.parents[index]
            if blocks.writer[block] is request:
                blocks.filled[block], blocks.writer[block] = True, None
            elif index + 1 == len(request.parents):  # tokens of the answer, or of the prompt's last block
                known = blocks.find(parent, request.block(index))
                if known is None:
                    blocks.name(block, parent, request.block(index), None)
                    known = block
                request.parents.append(blocks.serial[known])

    def _next(self, request: _Request, scores: torch.Tensor, token: int | None) -> Event:
        sampling, found = request.sampling, {}
        try:
            if not sampling.greedy or token is None:
                token = choose(scores, sampling, request.tokens, request.random)
            elif scores[token].isnan():
                raise ValueError("the model's logits are not numbers")
        except ValueError as error:
            self._leave(request)
            return request.event(finish="error", error=str(error))
        if sampling.logprobs is not None:
            found["logprob"], found["top"] = logprobs(scores, token, sampling.logprobs)
        request.tokens.append(token)
        self._generated += 1
        text, finish = "", None
        if token in self._stop:
            finish = "stop"
        else:
            text, stopped = request.text.add(token)
            finish = "stop" if stopped else "length" if len(request.tokens) >= request.most else None
            if finish == "length":
                text += request.text.rest()
        if token in self._stop:
            text = request.text.rest()
        if finish:
            self._leave(request)
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
                while todo and len(self._waiting) < self.max_queue:
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
