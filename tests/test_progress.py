"""Progress: what is timed, what is printed, and when there is a bar."""

import io

import pytest
from rich.console import Console

from persona_pruner.progress import ConsoleProgress, Progress


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, markup=False, highlight=False)


def test_seconds_add_up_by_name():
    progress = Progress()
    for _ in range(2):
        with progress.stage("a", 3) as step:
            step(2)
    with progress.stage("b", 0):
        once = dict(progress.seconds)
    assert list(progress.seconds) == ["a", "b"] and progress.seconds["a"] == once["a"] > 0
    progress.note("nothing is printed")


def test_one_line_a_stage_and_no_bar_without_a_terminal():
    progress = ConsoleProgress(console(False))
    with progress.stage("loading runs/[b]x[/b]", 2) as step:
        step(1)
        assert progress.bar is None and progress.console.file.getvalue() == ""
    progress.note("a [red]note")
    line, note, end = progress.console.file.getvalue().split("\n")
    assert line.startswith("loading runs/[b]x[/b] ") and line.endswith(" s") and note == "a [red]note" and end == ""


def test_a_line_says_what_this_stage_took_not_all_of_its_name(monkeypatch):
    progress, times = ConsoleProgress(console(False)), iter((0.0, 2.0, 10.0, 13.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    for _ in range(2):
        with progress.stage("answers", 1):
            pass
    monkeypatch.undo()
    assert progress.seconds == {"answers": 5.0}
    assert [line.split()[1] for line in progress.console.file.getvalue().splitlines()] == ["2.0", "3.0"]


def test_a_bar_on_a_terminal():
    progress = ConsoleProgress(console(True))
    with progress.stage("searching", 4) as step:
        step(3)
        assert progress.bar.tasks[0].completed == 3 and progress.bar.tasks[0].total == 4
        progress.bar.refresh()
        assert "3/4" in progress.console.file.getvalue()
    assert progress.bar is None and "searching" in progress.console.file.getvalue().splitlines()[-1]
    with progress.stage("more than was said", 1) as step:
        step(5)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_stage_that_fails_is_not_reported_as_done(terminal, error):
    progress = ConsoleProgress(console(terminal))
    with pytest.raises(error), progress.stage("searching", 4):
        raise error
    assert progress.bar is None and progress.seconds == {}
    assert " s\n" not in progress.console.file.getvalue()
    with progress.stage("again", 1) as step:  # the terminal is free for the next one
        step(1)
    assert "again" in progress.seconds
