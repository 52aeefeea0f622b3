"""Many equal jobs on one machine or on a cluster: in turn, in processes, or on Ray. One loop serves all three.

A job is `work(task, say)`; `say(text)` tells what it is at. Work and tasks are pickled for processes and for Ray, so
work is a function of a module or an object of one. An InputError is final; any other failure, the sudden death of a
worker included, is tried again.
"""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from persona_pruner.errors import InputError, PersonaPrunerError, RunError

ENGINES = ("serial", "process", "ray")
GRACE = 10.0  # seconds that a worker gets to clean up after an interrupt

Work = Callable[[object, Callable[[str], None]], object]


@dataclass(frozen=True)
class Outcome:
    """How a task ended: `value` is what the work returned, or `error` one sentence; attempts and seconds it took."""

    value: object = None
    error: str | None = None
    attempts: int = 1
    seconds: float = 0.0


class Watch:
    """Who is told how the tasks get on; silent by default. `index` is a task's place in the caller's list."""

    def started(self, index: int, attempt: int) -> None: ...

    def said(self, index: int, text: str) -> None: ...

    def ended(self, index: int, outcome: Outcome) -> None: ...


def run(
    engine: str, work: Work, tasks: Sequence, workers: int = 1, retries: int = 1, watch: Watch | None = None
) -> list[Outcome]:
    """The outcomes of all tasks, in their order; at most `workers` at a time, each tried `1 + retries` times.

    An interrupt stops the workers and is raised again. Raises InputError for an unknown engine or one that is not
    installed.
    """
    watch = watch or Watch()
    if workers < 1:
        raise InputError(f"workers must be at least 1, not {workers}")
    outcomes: dict[int, Outcome] = {}
    waiting = deque((index, 1) for index in range(len(tasks)))
    running: dict[int, tuple[int, float]] = {}
    with _pool(engine, work, min(workers, max(len(tasks), 1)), watch) as pool:
        while waiting or running:
            while waiting and len(running) < pool.workers:
                index, attempt = waiting.popleft()
                watch.started(index, attempt)
                running[index] = attempt, time.perf_counter()
                pool.start(index, tasks[index])
            for index, kind, value in pool.wait():
                if kind == "said":
                    watch.said(index, value)
                    continue
                attempt, begun = running.pop(index)
                if kind == "failed" and attempt <= retries:
                    waiting.append((index, attempt + 1))
                    continue
                ends = {"value": value} if kind == "done" else {"error": value}
                outcomes[index] = Outcome(**ends, attempts=attempt, seconds=time.perf_counter() - begun)
                watch.ended(index, outcomes[index])
    return [outcomes[index] for index in range(len(tasks))]


def _attempt(work: Work, task, say: Callable[[str], None]) -> tuple[str, object]:
    """("done", value), ("refused", sentence) where trying again is of no use, or ("failed", sentence)."""
    try:
        return "done", work(task, say)
    except Exception as error:
        own = isinstance(error, PersonaPrunerError)
        first = (str(error).splitlines() or ["no message"])[0]
        return "refused" if isinstance(error, InputError) else "failed", first if own else (
            f"{type(error).__name__}: {first}"
        )


class _Serial:
    """In this process, one after another."""

    workers = 1

    def __init__(self, work: Work, workers: int, watch: Watch):
        self.work, self.watch, self.next = work, watch, None

    def start(self, index: int, task) -> None:
        self.next = index, task

    def wait(self) -> list[tuple]:
        index, task = self.next
        return [(index, *_attempt(self.work, task, lambda text: self.watch.said(index, text)))]

    def close(self, interrupted: bool) -> None: ...


def _end_with_parent() -> None:
    """Waits for the end of the parent process, however it came, and ends this one."""
    import multiprocessing

    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _serve(work: Work, pipe) -> None:
    """A worker process: tasks come and outcomes go through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is half-written is removed
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt, EOFError, OSError):
        while True:
            index, task = pipe.recv()
            pipe.send((index, *_attempt(work, task, lambda text, index=index: pipe.send((index, "said", text)))))


class _Processes:
    """In processes of their own, started afresh (a fork of a process with threads may hang)."""

    def __init__(self, work: Work, workers: int, watch: Watch):
        import multiprocessing

        self.context, self.work, self.workers = multiprocessing.get_context("spawn"), work, workers
        self.idle: list[tuple] = []  # (process, pipe)
        self.busy: dict[object, tuple] = {}  # pipe -> (process, index)

    def start(self, index: int, task) -> None:
        if not self.idle:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(self.work, there), daemon=True)
            process.start()
            there.close()
            self.idle.append((process, here))
        process, pipe = self.idle.pop()
        self.busy[pipe] = process, index
        pipe.send((index, task))

    def wait(self) -> Iterator[tuple]:
        from multiprocessing.connection import wait

        for pipe in wait(list(self.busy)):
            process, index = self.busy[pipe]
            try:
                found = pipe.recv()
            except (EOFError, OSError):
                process.join(GRACE)
                del self.busy[pipe]
                pipe.close()
                yield index, "failed", f"its worker process ended with code {process.exitcode}"
                continue
            if found[1] != "said":
                del self.busy[pipe]
                self.idle.append((process, pipe))
            yield found

    def close(self, interrupted: bool) -> None:
        workers = [process for process, _ in (*self.idle, *self.busy.values())]
        for pipe in (*(pipe for _, pipe in self.idle), *self.busy):
            pipe.close()
        for process in workers:
            if interrupted:
                process.terminate()
        for process in workers:
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()


class _Ray:
    """On Ray: the cluster of RAY_ADDRESS, one that this process has joined, or a local one of `workers` processors."""

    def __init__(self, work: Work, workers: int, watch: Watch):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            from ray.util.queue import Queue
        except ImportError as error:
            raise InputError("engine ray needs the extra `ray` (pip install 'persona-pruner[ray]')") from error
        self.ray, self.workers, self.indices = ray, workers, {}
        self.own = not ray.is_initialized()
        if self.own:
            local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
            ray.init(os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False, logging_level="error", **local)
        self.work = ray.put(work)
        self.said = Queue(actor_options={"num_cpus": 0})

        # Ray lets workers import from the driver's working folder; a checkout has a `kernels` of its own, which would
        # stand in the way of Hugging Face's.
        here = os.getcwd() if os.getcwd() not in sys.path else None

        @ray.remote(num_cpus=1, max_retries=0)
        def attempt(work, index, task, said):
            sys.path[:] = [path for path in sys.path if path != here]
            # By it Ray cancels. In a shell's background job it is ignored, and children inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                return _attempt(work, task, lambda text: said.put((index, "said", text)))
            finally:
                said.put((index, "over", None))

        self.attempt = attempt
        self.alive: set[int] = set()  # tasks that have said something and are not over

    def start(self, index: int, task) -> None:
        self.indices[self.attempt.remote(self.work, index, task, self.said)] = index

    def wait(self) -> Iterator[tuple]:
        ready, _ = self.ray.wait(list(self.indices), timeout=0.2)
        yield from self._heard()
        for reference in ready:
            index = self.indices.pop(reference)
            self.alive.discard(index)
            try:
                yield index, *self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                yield index, "failed", f"its Ray worker failed: {(str(error).splitlines() or [''])[0]}"

    def _heard(self) -> list[tuple]:
        """What tasks have said since the last call."""
        waiting = self.said.qsize()
        found = self.said.get_nowait_batch(waiting) if waiting else []
        self.alive |= {index for index, kind, _ in found if kind == "said"}
        self.alive -= {index for index, kind, _ in found if kind == "over"}
        return [message for message in found if message[1] == "said"]

    def close(self, interrupted: bool) -> None:
        for reference in self.indices:
            self.ray.cancel(reference)  # raises KeyboardInterrupt there
        until = time.monotonic() + GRACE
        while self.alive and time.monotonic() < until:  # Ray calls a task over before it has cleaned up
            time.sleep(0.1)
            self._heard()
        self.said.shutdown()
        if self.own:
            self.ray.shutdown()


@contextmanager
def _pool(engine: str, work: Work, workers: int, watch: Watch):
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r} is not one of {', '.join(ENGINES)}")
    try:
        pool = {"serial": _Serial, "process": _Processes, "ray": _Ray}[engine](work, workers, watch)
    except (ConnectionError, TimeoutError) as error:
        raise RunError(f"no Ray cluster: {(str(error).splitlines() or [''])[0]}") from error
    interrupted = True
    try:
        yield pool
        interrupted = False
    finally:
        pool.close(interrupted)
