"""The thread that owns the fleet, and the streams by which its events reach the clients.

The event loop and the fleet's thread share nothing but two queues: commands go one way, lists of events the other. The
thread never waits for a client: a stream holds what its client has not read, and one that holds too much is ended.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from persona_pruner.errors import InputError, RunError
from persona_pruner.fleet import DENSE, Event, Fleet, QueueFull, Sampling
from persona_pruner.formats.persona_file import PersonaFile

log = logging.getLogger(__name__)


class Closing(RunError):
    """The server is shutting down and takes no requests."""


class Stream:
    """The events of one request on their way to its client; used in the event loop only."""

    def __init__(self, engine: "Engine", number: int, room: int):
        self.engine, self.number, self.room = engine, number, room
        self.ended = False
        self._events: deque[Event] = deque()
        self._some = asyncio.Event()

    def put(self, event: Event) -> None:
        if len(self._events) >= self.room and not self.ended:
            self.fail("the client reads too slowly")
        if not self.ended:
            self._events.append(event)
            self.ended = event.finish is not None
            self._some.set()

    def fail(self, why: str, finish: str = "error") -> None:
        """Ends the request now, with this as its last event."""
        if not self.ended:
            self.put_last(Event(self.number, "", finish=finish, error=why))
            self.engine.drop(self)

    def put_last(self, event: Event) -> None:
        self._events.append(event)
        self.ended = True
        self._some.set()

    async def take(self, timeout: float) -> list[Event]:
        """All events that have come since the last call; waits for one. Raises TimeoutError."""
        if not self._events:
            self._some.clear()
            async with asyncio.timeout(timeout):
                await self._some.wait()
        found = list(self._events)
        self._events.clear()
        return found

    def close(self) -> None:
        """The client needs no more."""
        if not self.ended:
            self.ended = True
            self.engine.drop(self)


@dataclass(frozen=True)
class Character:
    """What is told of a model name. bytes: of the character in memory, or of all weights for the base."""

    name: str
    persona: str
    bytes: int
    ratio: float
    greeting: str
    system: str
    created: int
    dense: bool = False


class Engine:
    """Runs a fleet in a thread of its own. base: the name by which the dense model is asked for; room: events that a
    slow client may leave unread."""

    def __init__(self, fleet: Fleet, base: str, room: int = 1024):
        self.base, self.room = base, room
        self.most = fleet.max_queue + fleet.max_rows
        self.stats, self.failure = fleet.stats(), None
        dense = Character(base, base, fleet.decoder.nbytes, 1.0, "", "", int(time.time()), True)
        self.characters: dict[str, Character] = {base: dense}
        self.closing = False
        self.streams: dict[int, Stream] = {}
        self._coming = 0  # requests on their way to the fleet
        self._fleet = fleet
        self._special = set(fleet.tokenizer.all_special_ids)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)

    # ---- for the event loop

    def start(self) -> None:
        """To be called in the event loop that will read the streams."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self, why: str = "the server is shutting down") -> None:
        """Ends what is under way with an error and joins the thread."""
        self.abort(why)
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, 30)

    def abort(self, why: str) -> None:
        """Ends every request with this error; no new ones are taken."""
        self.closing = True
        for stream in list(self.streams.values()):
            stream.fail(why)

    async def submit(self, model: str, prompt, sampling: Sampling) -> Stream:
        """The stream of a request's events. Raises InputError, QueueFull, Closing or RunError."""
        if self.closing:
            raise Closing("the server is shutting down")
        if self.failure:
            raise RunError(self.failure)
        if len(self.streams) + self._coming >= self.most:
            raise QueueFull(f"{self.most} requests are being answered or waiting already")
        name = DENSE if model == self.base else model
        answer: asyncio.Future[Stream] = self._loop.create_future()
        self._coming += 1

        def arrived(number: int | None, error: Exception | None) -> None:
            self._coming -= 1
            stream = None
            if error is None:
                stream = self.streams[number] = Stream(self, number, self.room)
            if answer.cancelled():
                if stream:
                    stream.close()
            elif error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(stream)
                if self.closing:
                    stream.fail("the server is shutting down")

        def command() -> None:
            number = error = None
            try:
                number = self._fleet.submit(name, prompt, sampling)
            except Exception as caught:
                error = caught
            self._tell(arrived, number, error)

        self._commands.put(command)
        return await answer

    def drop(self, stream: Stream) -> None:
        """The fleet need not go on with this request."""
        if self.streams.pop(stream.number, None) is not None:
            self._commands.put(lambda: self._fleet.cancel(stream.number))

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            stream = self.streams.get(event.request)
            if stream is not None:
                stream.put(event)
                if event.finish:
                    self.streams.pop(event.request, None)

    # ---- for any thread

    def add(self, name: str, file: PersonaFile, created: int) -> None:
        """Makes a character available, in place of another of that name. Raises InputError when it does not fit."""
        if name == self.base:
            raise InputError(f"{name} is the name of the base model")
        self._call(lambda: self._fleet.add(name, file))
        info = self._call(lambda: self._fleet.info(name))
        found = Character(name, file.name, info["bytes"], info["ratio"], file.greeting, file.system, created)
        self.characters = {**self.characters, name: found}

    def remove(self, name: str) -> None:
        self.characters = {key: value for key, value in self.characters.items() if key != name}
        self._call(lambda: self._fleet.remove(name))

    def arrange(self) -> None:
        """`Fleet.arrange`, for the characters that there are."""
        self._call(self._fleet.arrange)

    def _call(self, function: Callable):
        """What the function returns when the fleet's thread calls it."""
        done, found = threading.Event(), []

        def command() -> None:
            try:
                found.append((function(), None))
            except Exception as error:
                found.append((None, error))
            done.set()

        self._commands.put(command)
        while not done.wait(1):
            if not self._thread.is_alive():
                raise RunError("the fleet's thread has ended")
        value, error = found[0]
        if error is not None:
            raise error
        return value

    @lru_cache(maxsize=8192)  # noqa: B019  an engine lives as long as its process
    def token_text(self, token: int) -> tuple[str, bytes] | None:
        """(text, bytes) of a token; None for one that is no text, such as the end of a turn."""
        if token in self._special:
            return None
        raw = _token_bytes(self._fleet.tokenizer, token)
        return raw.decode("utf-8", "replace"), raw

    # ---- the fleet's thread

    def _tell(self, function: Callable, *arguments) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("no one to tell")

    def _run(self) -> None:
        while True:
            idle = self._fleet.idle
            if idle:
                self.stats = self._fleet.stats()
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                self._step()
                continue
            if command is None:
                return
            command()

    def _step(self) -> None:
        try:
            events = self._fleet.step()
        except Exception as error:
            log.exception("a step of the fleet failed")
            self._tell(self._failed, f"the engine failed: {type(error).__name__}")
            self._cancel_all()
            return
        self.stats = self._fleet.stats()
        if events:
            self._tell(self._deliver, events)

    def _failed(self, why: str) -> None:
        for stream in list(self.streams.values()):
            stream.fail(why)

    def _cancel_all(self) -> None:
        """After a failed step: its requests are given up, and if even that fails the engine is."""
        try:
            for number in list(self.streams):
                self._fleet.cancel(number)
        except Exception as error:
            self.failure = f"the engine has failed: {type(error).__name__}"
            log.exception("the fleet cannot go on")


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary: printable ones for themselves, the others from
    U+0100 on, in their order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _token_bytes(tokenizer, token: int) -> bytes:
    """The bytes that a token adds to a text."""
    word, letters = tokenizer.convert_ids_to_tokens(token), _byte_letters()
    if '"ByteLevel"' in _decoder(tokenizer) and word and all(letter in letters for letter in word):
        return bytes(letters[letter] for letter in word)
    return tokenizer.decode([token]).encode()


@lru_cache(maxsize=4)
def _decoder(tokenizer) -> str:
    return str(tokenizer.backend_tokenizer.decoder.__getstate__()) if tokenizer.backend_tokenizer.decoder else ""
