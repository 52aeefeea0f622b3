"""A sculpt in seconds: settings, a tiny base model on disk, and what is compared between two runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import persona_pruner as pp
from persona_pruner.progress import Progress
from persona_pruner.testing import tiny_model, tiny_tokenizer

TEXT = "Bram is a gruff blacksmith of few words who distrusts mages and talks of iron."
HELD_OUT = str(Path(__file__).with_name("held_out.json"))  # four questions; ranking the bundled ones takes a second
QUICK = {
    "own_questions": 8, "bank_questions": 6, "bank_candidates": 10, "held_out_questions": 4, "answer_tokens": 12,
    "held_out_tokens": 10, "steps": 3, "budget": 400, "neutral_examples": 2,
}  # fmt: skip
BARE = {**QUICK, "compare": False, "eval_questions": HELD_OUT}
CHEAP = {"start": "random", "steps": 0, "repair": False}  # where only the data matters
QUICK_ARGUMENTS = [word for name, value in QUICK.items() for word in ("--set", f"{name}={value}")]
MEASURED = ("seconds", "tokens_per_second", "fleet_tokens_per_second")  # differ between equal runs


def save_tiny(folder: Path, **changes) -> Path:
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sculpt(out=None, model=None, persona=TEXT, **settings):
    """pp.sculpt of a tiny model by `BARE`, changed by `settings`."""
    persona = pp.Persona.from_text(persona) if isinstance(persona, str) else persona
    return pp.sculpt(model or tiny_model(), tiny_tokenizer(), persona, out=out, **{**BARE, **settings})


def stage(folder, name):
    """What the run in this folder stored of a stage."""
    return json.loads((folder / "stages" / f"{name}.json").read_text())["value"]


def comparable(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name not in MEASURED}


class Recorder(Progress):
    """Remembers stages and notes; raises KeyboardInterrupt when `stop` begins, or after `steps` steps of it."""

    def __init__(self, stop: str = "", steps: int = 0):
        super().__init__()
        self.stop, self.left, self.stages, self.told, self.notes = stop, steps, [], {}, []

    def note(self, text):
        self.notes.append(text)

    def _begin(self, name, total):
        self.stages.append(name)
        self.told[name] = []
        if self.stop and name.startswith(self.stop) and not self.left:
            raise KeyboardInterrupt

    def _step(self, done):
        name = self.stages[-1]
        self.told[name].append(done)
        if self.stop and name.startswith(self.stop):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file below the folder: what was written anew since shows."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def environment(**changes: str) -> dict[str, str]:
    """For a command in a process of its own: one thread, no hub."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def command(*arguments) -> list[str]:
    return [sys.executable, "-P", "-m", "persona_pruner.cli", *map(str, arguments)]


def run(*arguments, **changes: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own, with changes to its environment."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(**changes))
