"""How long work tells of itself: silent for a library, bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Silent progress, and the record of seconds spent in each stage (`seconds`)."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A stage of `total` steps; yields a function to be told how many more are done. A stage that fails is not
        reported as done."""
        begun = time.perf_counter()
        self._begin(name, total)
        try:
            yield self._step
        finally:
            self._stop()
        took = time.perf_counter() - begun
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        self._end(name, took)

    def note(self, text: str) -> None:
        """A line worth reading."""

    def _begin(self, name: str, total: int) -> None: ...

    def _step(self, done: int) -> None: ...

    def _stop(self) -> None: ...

    def _end(self, name: str, seconds: float) -> None: ...


class ConsoleProgress(Progress):
    """A bar while a stage runs (on a terminal only) and one line when it is done."""

    def __init__(self, console):
        super().__init__()
        self.console, self.bar, self.task = console, None, None

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def _begin(self, name: str, total: int) -> None:
        from rich import progress

        if self.console.is_terminal:
            left = (progress.MofNCompleteColumn(), progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
            columns = (progress.TextColumn("{task.description:32}"), progress.BarColumn(), *left)
            self.bar = progress.Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task(name, total=max(total, 1))
            self.bar.start()

    def _step(self, done: int) -> None:
        if self.bar is not None:
            self.bar.advance(self.task, done)

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _end(self, name: str, seconds: float) -> None:
        self.console.print(f"{name:<32} {seconds:6.1f} s", highlight=False)
