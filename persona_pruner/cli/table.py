"""How many sculpts get on: a table that is redrawn on a terminal, a line for each that ends elsewhere."""

import time

from persona_pruner.executors import Outcome, Watch


class Table(Watch):
    """A context: rows of what is running, and counts of what is not."""

    def __init__(self, console, names: list[str]):
        self.console, self.names, self.live = console, names, None
        self.running: dict[int, tuple[int, str, float]] = {}  # index -> attempt, stage, begun
        self.done = self.failed = 0

    def __enter__(self) -> "Table":
        if self.console.is_terminal:
            from rich.live import Live

            self.live = Live(get_renderable=self._table, console=self.console, transient=True, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, *failure) -> None:
        if self.live:
            self.live.stop()

    def started(self, index: int, attempt: int) -> None:
        self.running[index] = attempt, "", time.perf_counter()

    def said(self, index: int, text: str) -> None:
        attempt, _, begun = self.running[index]
        self.running[index] = attempt, text, begun

    def ended(self, index: int, outcome: Outcome) -> None:
        self.running.pop(index)
        self.done, self.failed = self.done + (outcome.error is None), self.failed + (outcome.error is not None)
        how = f"failed: {outcome.error}" if outcome.error else f"KL {outcome.value['kl']:.3f}"
        self.console.print(f"{self.names[index]:<32} {outcome.seconds:6.1f} s  {how}", highlight=False)

    def _table(self):
        from rich.table import Table as Grid
        from rich.text import Text

        left = len(self.names) - self.done - self.failed - len(self.running)
        counts = f"{self.done} done, {self.failed} failed, {len(self.running)} running, {left} waiting or done before"
        grid = Grid("character", "stage", "seconds", title=counts, title_justify="left")
        for index, (attempt, stage, begun) in list(self.running.items()):
            again = f" (attempt {attempt})" if attempt > 1 else ""
            grid.add_row(Text(self.names[index] + again), stage, f"{time.perf_counter() - begun:.0f}")
        return grid
