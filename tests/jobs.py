"""Work for executors, in a module of its own because other processes import it."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from persona_pruner import many
from persona_pruner.errors import InputError
from persona_pruner.synthesis import bank


@dataclass(frozen=True)
class Work:
    """Obeys its task: a word, or word and number; leaves a line in `log` each time it is tried."""

    log: str

    def __call__(self, task: str, say):
        word, _, number = task.partition(" ")
        with open(self.log, "a") as log:
            log.write(f"{task}\n")
        say(f"at {task}")
        if word == "double":
            return 2 * int(number)
        if word == "refuse":
            raise InputError("this cannot be met")
        if word == "fail":
            raise ValueError("a fault\nand more")
        tries = Path(self.log).read_text().splitlines().count(task)
        if word == "second" and tries == 1:
            raise OSError("only the first time")
        if word == "die" and tries == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "sleep":
            try:
                say("asleep")
                for _ in range(600):  # Ray's interrupt does not end a sleep
                    time.sleep(0.1)
            finally:
                Path(self.log).with_name("cleaned").write_text("")
        return word


every = bank.passages


@dataclass(frozen=True)
class ShortJob(many.Job):
    """A sculpt with three neutral passages, which are most of the time of a tiny one."""

    def __call__(self, card: str, say):
        bank.passages = lambda split: every(split)[:3]
        try:
            return super().__call__(card, say)
        finally:
            bank.passages = every
