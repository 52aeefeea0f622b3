"""The cells of a comparison: one pruned model measured on one persona, made in this process or in several.

A cell is stored as soon as it is known, and what is stored for the same inputs is read and not made again.
"""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from persona_pruner import __version__, executors, files, models
from persona_pruner.config import SculptConfig
from persona_pruner.errors import InputError, RunError
from persona_pruner.evaluation.harness import harness
from persona_pruner.executors import Outcome, Watch
from persona_pruner.generic import Generic
from persona_pruner.material import Material, prepare
from persona_pruner.memory import kept_memory
from persona_pruner.packing import Example, Pack, pack
from persona_pruner.persona import Persona
from persona_pruner.progress import Progress
from persona_pruner.search import repair
from persona_pruner.search.baselines import BASELINES, prune
from persona_pruner.search.scores import Context
from persona_pruner.study import own
from persona_pruner.study.fence import fenced
from persona_pruner.study.measure import Yardstick, cost
from persona_pruner.study.plan import Build
from persona_pruner.workspace import Workspace

SEARCH = (
    "start",
    "score_examples",
    "neutral_examples",
    "neutral_weight",
    "loss",
    "steps",
    "lr",
    "budget",
    "ridge",
    "seed",
)
LAYOUT = 2  # of a cell; another number makes stored cells void


@dataclass
class Study:
    """A base model, personas by name, where results are kept, and stage 1 of every persona and seed asked for."""

    model: nn.Module
    tokenizer: object
    personas: Mapping[str, Persona]
    folder: Path
    base: str
    settings: dict
    progress: Progress
    materials: dict[tuple[int, int], Material] = field(default_factory=dict)

    def __post_init__(self):
        if self.settings.get("minutes"):
            raise InputError("a study needs the same sizes on every machine; minutes is a setting of sculpt")
        models.prepare(self.model)
        self.names = list(self.personas)
        weights = [p.flatten()[:16].float().tolist() for p in self.model.parameters()]
        self.root = files.digest([__version__, LAYOUT, models.fingerprint(self.model), weights, str(self.model.dtype)])

    def config(self, seed: int) -> SculptConfig:
        return SculptConfig.of(**{**self.settings, "seed": seed})

    def material(self, number: int, seed: int) -> Material:
        """Stage 1 of a persona for one seed; its calibration examples have passed the fence."""
        if (number, seed) not in self.materials:
            name = self.names[number]
            self.progress.note(f"data of {name}, seed {seed}")
            where = self.folder / "stages" / f"{name}-{seed}"
            settings = {**self.settings, "seed": seed}
            found = prepare(
                self.model, self.tokenizer, self.personas[name], where, self.base, self.progress, **settings
            )
            fenced(self.tokenizer, found)
            self.materials[number, seed] = found
        return self.materials[number, seed]

    def data_key(self, number: int, seed: int, names: Sequence[str] = SEARCH) -> str:
        """Hash of a persona's calibration data and of settings: by default all that scores and search depend on."""
        config = self.config(seed).dump()
        calibration = [[e.prompt, e.answer] for e in self.material(number, seed).calibration]
        return files.digest([self.root, calibration, {name: config[name] for name in names}])

    @cached_property
    def generic(self) -> Generic:
        """The package's neutral texts, and what of a slice depends on them alone."""
        return Generic(self.model, self.tokenizer, self.root, self.folder / "stages" / "generic")

    def search_on(self, examples: Sequence[Example], seed: int, folder: str, key: str) -> own.Search:
        """What slices from these examples share, kept in this folder of the stages under `key` of the examples."""
        work = Workspace(self.folder / "stages" / folder)
        return own.Search(self.model, examples, self.config(seed), work, key, self.generic)

    def search(self, number: int, seed: int) -> own.Search:
        examples, key = self.material(number, seed).calibration, self.data_key(number, seed, ())
        return self.search_on(examples, seed, f"{self.names[number]}-{seed}", key)

    def shared(self, seed: int) -> own.Search:
        """What `search` gives, on examples of all personas together, as many as one of them has."""
        key = files.digest([self.data_key(n, seed, ()) for n in range(len(self.names))])
        return self.search_on(self.mixture(seed), seed, f"shared-{seed}", key)

    @cached_property
    def yardstick(self) -> Yardstick:
        """The dense model's side of every cell, also stored beside the cells."""
        found = Yardstick(self.model, self.tokenizer, [self.material(t, 0) for t in range(len(self.names))])
        Workspace(self.folder / "cells").write("dense", self.root, found.dense | {"answers": found.said})
        return found

    def mixture(self, seed: int) -> list[Example]:
        """Every n-th example of each of n personas, a persona's number being the group."""
        count = len(self.names)
        return [replace(e, group=n) for n in range(count) for e in self.material(n, seed).calibration[n::count]]


def make(study: Study, build: Build) -> tuple[nn.Module, float, int]:
    """(pruned model, seconds, peak bytes) of one build. Seconds count scores and searches that an earlier build of the
    same persona and seed made already; the data of stage 1 are not in them."""
    before = 0.0
    with cost(study.model.get_input_embeddings().weight.device) as spent:
        if build.method in BASELINES:
            packs: list[Pack] = []
            if build.calibration == "generic":
                packs = study.generic.packs()
            elif build.calibration == "persona":
                packs = pack(study.material(build.persona, build.seed).calibration, study.config(build.seed).budget)
            model = prune(build.method, Context(study.model, packs, build.seed), build.ratio)
        else:
            search = study.shared(build.seed) if build.method == own.SHARED else study.search(build.persona, build.seed)
            model = own.made(build.method, search, build.ratio)
            before = search.seconds
    return model, spent.seconds + before, spent.bytes


def _cell_key(study: Study, build: Build, target: int) -> str:
    material = study.material(target, 0)
    parts = [study.root, asdict(build), material.system, material.questions, material.answers]
    if build.calibration == "persona":
        names = ("budget",) if build.method in BASELINES else SEARCH
        parts.append(study.data_key(build.persona, build.seed, names))
    elif build.calibration == "shared":
        parts += [study.data_key(n, build.seed) for n in range(len(study.names))]
    if build.method not in BASELINES:
        parts.append([repair.SHARE, repair.TILT, repair.HEADS])
    if build.method in own.TRAINED:
        config = study.config(build.seed)
        parts.append([own.RECOVERY_STEPS, config.recovery_steps, config.recovery])
    return files.digest(parts)


def _pairs(study: Study, build: Build) -> list[tuple[Build, int]]:
    """The cells of a build: (build, number of the persona it is measured on)."""
    return [(build, t) for t in (range(len(study.names)) if build.persona is None else [build.persona])]


def _fill(study: Study, build: Build, targets: dict[int, str], tasks: Sequence[str], limit: int | None) -> float:
    """Makes a build, measures it on `targets` ({number of persona: key of the cell}) and stores these cells. KL on the
    first."""
    yardstick = study.yardstick
    model, seconds, peak = make(study, build)
    general = yardstick.general(model)
    if tasks:
        general["tasks"] = harness(model, study.tokenizer, tasks, limit)
    work, found = Workspace(study.folder / "cells"), []
    for target, key in targets.items():
        row = {**asdict(build), "persona": study.names[target], **yardstick.persona(model, target), **general}
        row |= {"seconds": round(seconds, 2), "peak_bytes": peak}
        work.write(f"{build.name(study.names)}@{study.names[target]}", key, row)
        found.append(row["kl"])
    del model
    gc.collect()
    return found[0]


@dataclass
class Workers:
    """Processes that make models side by side; `where` are the arguments of `models.load_model` by which each opens the
    base model. They share the CPU threads of this process."""

    count: int
    where: tuple

    @property
    def threads(self) -> int:
        """CPU threads of each."""
        return max(1, torch.get_num_threads() // self.count)


class _Filling:
    """The work of an executor: `_fill` by a study that each process opens once."""

    def __init__(self, workers: Workers, study: Study, tasks: Sequence[str], limit: int | None):
        self.where, self.threads = workers.where, workers.threads
        self.tasks, self.limit = list(tasks), limit
        self.parts = (dict(study.personas), study.folder, study.base, study.settings)
        self.study: Study | None = None

    def __call__(self, task: tuple[Build, dict[int, str]], say) -> float:
        if self.study is None:
            torch.set_num_threads(self.threads)
            model, tokenizer = models.load_model(*self.where)
            self.study = Study(model, tokenizer, *self.parts, Progress())
        with kept_memory():
            return _fill(self.study, *task, self.tasks, self.limit)


class _Lines(Watch):
    """A line of progress for every build that has ended well."""

    def __init__(self, study: Study, missing: Sequence[Build], clock: "Clock"):
        self.study, self.missing, self.clock = study, missing, clock

    def ended(self, index: int, outcome: Outcome) -> None:
        if outcome.error is None:
            self.study.progress.note(self.clock.line(self.missing[index].name(self.study.names), outcome.value))


def cells(
    study: Study,
    planned: Sequence[Build],
    tasks: Sequence[str] = (),
    limit: int | None = None,
    workers: Workers | None = None,
) -> list[dict]:
    """One dict for every build and persona it is measured on: stored ones are read, the others made and stored, by
    `workers` or in this process. Raises RunError when a worker fails twice at a build; the other cells are stored."""
    work = Workspace(study.folder / "cells")
    pairs = [pair for build in planned for pair in _pairs(study, build)]
    keys = {(b, t): files.digest([_cell_key(study, b, t), list(tasks), limit]) for b, t in pairs}

    def stored(pair: tuple[Build, int]) -> dict | None:
        build, target = pair
        return work.read(f"{build.name(study.names)}@{study.names[target]}", keys[pair])

    lacking = {b: {t: keys[b, t] for b, t in _pairs(study, b) if stored((b, t)) is None} for b in planned}
    missing = [build for build in planned if lacking[build]]
    if len(missing) < len(planned):
        study.progress.note(f"{len(planned) - len(missing)} of {len(planned)} models are known already")
    clock = Clock(len(missing))
    if workers and missing:
        jobs = [(build, lacking[build]) for build in missing]
        watch, filling = _Lines(study, missing, clock), _Filling(workers, study, tasks, limit)
        ends = executors.run("process", filling, jobs, workers.count, watch=watch)
        failed = [(b.name(study.names), end.error) for b, end in zip(missing, ends, strict=True) if end.error]
        if failed:
            raise RunError(f"{len(failed)} of {len(ends)} models were not made; {failed[0][0]}: {failed[0][1]}")
    else:
        for build in missing:
            kl = _fill(study, build, lacking[build], tasks, limit)
            study.progress.note(clock.line(build.name(study.names), kl))
    return [stored(pair) for pair in pairs]


class Clock:
    """Lines of progress with the time left, by the mean of what was done in this run."""

    def __init__(self, total: int):
        self.total, self.done, self.begun = total, 0, time.perf_counter()

    def line(self, name: str, kl: float) -> str:
        self.done += 1
        spent = time.perf_counter() - self.begun
        left = spent / self.done * (self.total - self.done)
        return f"[{self.done}/{self.total}] {name:<44} KL {kl:6.3f}   {spent / 60:5.1f} min, about {left / 60:.0f} left"
