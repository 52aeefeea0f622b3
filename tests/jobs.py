"""Work for executors, in a module of its own because other processes import it."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from persona_pruner.errors import InputError


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
