"""`persona-pruner compare`: the paper's evaluation, method by method, at equal parameter count.

personas -> held-out questions and calibration data (stage 1 of sculpt)
methods x ratios x seeds -> pruned models -> cells: one model measured on one persona, stored as soon as it is known
cells -> table, headline, plots
"""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from persona_pruner import __version__, files, models, report
from persona_pruner.config import SculptConfig
from persona_pruner.errors import InputError
from persona_pruner.evaluation import judge as judging
from persona_pruner.evaluation.harness import harness
from persona_pruner.material import Material, prepare
from persona_pruner.memory import kept_memory
from persona_pruner.packing import Example, Pack, pack, text_packs
from persona_pruner.persona import Persona
from persona_pruner.progress import Progress
from persona_pruner.search import repair
from persona_pruner.search.baselines import BASELINES, prune
from persona_pruner.search.masks import kept_width
from persona_pruner.search.scores import Context
from persona_pruner.study import own
from persona_pruner.study.fence import fenced
from persona_pruner.study.measure import Yardstick, cost, machine
from persona_pruner.study.plan import Build, builds
from persona_pruner.study.summary import summarise
from persona_pruner.synthesis import bank
from persona_pruner.synthesis.prompts import encode
from persona_pruner.workspace import Workspace

SEARCH = ("start", "score_examples", "loss", "steps", "lr", "budget", "ridge", "seed")
LAYOUT = 1  # of a cell; another number makes stored cells void


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

    def search(self, number: int, seed: int) -> own.Search:
        work = Workspace(self.folder / "stages" / f"{self.names[number]}-{seed}")
        examples = self.material(number, seed).calibration
        key = self.data_key(number, seed, ())
        return own.Search(self.model, examples, self.config(seed), work, key, neutral=self.generic())

    def generic(self) -> list[Pack]:
        """The package's neutral prose: what published methods are calibrated on."""
        return text_packs([encode(self.tokenizer, text) for text in bank.passages("calibration")])

    def shared(self, seed: int) -> own.Search:
        """What `search` gives, on examples of all personas together, as many as one of them has."""
        key = files.digest([self.data_key(n, seed, ()) for n in range(len(self.names))])
        work = Workspace(self.folder / "stages" / f"shared-{seed}")
        return own.Search(self.model, self.mixture(seed), self.config(seed), work, key)

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
                packs = study.generic()
            elif build.calibration == "persona":
                packs = pack(study.material(build.persona, build.seed).calibration, study.config(build.seed).budget)
            model = prune(build.method, Context(study.model, packs, build.seed), build.ratio)
        else:
            search = study.shared(build.seed) if build.method == own.SHARED else study.search(build.persona, build.seed)
            model = own.made(build.method, search, build.ratio)
            before = search.seconds
    return model, spent.seconds + before, spent.bytes


def describe(method: str) -> str:
    """What a method is, in a few words."""
    return BASELINES[method].how if method in BASELINES else own.METHODS[method][1]


def _cell_key(study: Study, build: Build, target: int) -> str:
    material = study.material(target, 0)
    parts = [study.root, asdict(build), material.system, material.questions, material.answers]
    if build.calibration == "persona":
        names = ("budget",) if build.method in BASELINES else SEARCH
        parts.append(study.data_key(build.persona, build.seed, names))
    elif build.calibration == "shared":
        parts += [study.data_key(n, build.seed) for n in range(len(study.names))]
    if build.method not in BASELINES:
        parts.append([own.RECOVERY_STEPS, own.DISTILL_STEPS, repair.SHARE])
    return files.digest(parts)


def cells(study: Study, planned: Sequence[Build], tasks: Sequence[str] = (), limit: int | None = None) -> list[dict]:
    """One dict for every build and persona it is measured on: stored ones are read, the others made and stored."""
    work = Workspace(study.folder / "cells")
    pairs = [(b, t) for b in planned for t in (range(len(study.names)) if b.persona is None else [b.persona])]
    keys = {(b, t): files.digest([_cell_key(study, b, t), list(tasks), limit]) for b, t in pairs}
    found = {(b, t): work.read(f"{b.name(study.names)}@{study.names[t]}", keys[b, t]) for b, t in pairs}
    missing = [b for b in planned if any(b == other and found[b, t] is None for other, t in pairs)]
    if len(missing) < len(planned):
        study.progress.note(f"{len(planned) - len(missing)} of {len(planned)} models are known already")
    clock = Clock(len(missing))
    yardstick = None
    for build in missing:
        if yardstick is None:
            yardstick = Yardstick(study.model, study.tokenizer, [study.material(t, 0) for t in range(len(study.names))])
            work.write("dense", study.root, yardstick.dense | {"answers": yardstick.said})
        model, seconds, peak = make(study, build)
        general = yardstick.general(model)
        if tasks:
            general["tasks"] = harness(model, study.tokenizer, tasks, limit)
        for target in [t for b, t in pairs if b == build and found[b, t] is None]:
            measured = yardstick.persona(model, target)
            row = {**asdict(build), "persona": study.names[target], **measured, **general}
            row |= {"seconds": round(seconds, 2), "peak_bytes": peak}
            work.write(f"{build.name(study.names)}@{study.names[target]}", keys[build, target], row)
            found[build, target] = row
        kl = found[next(p for p in pairs if p[0] == build)]["kl"]
        study.progress.note(clock.line(build.name(study.names), kl))
        del model
        gc.collect()
    return [found[pair] for pair in pairs]


class Clock:
    """Lines of progress with the time left, by the mean of what was done in this run."""

    def __init__(self, total: int):
        self.total, self.done, self.begun = total, 0, time.perf_counter()

    def line(self, name: str, kl: float) -> str:
        self.done += 1
        spent = time.perf_counter() - self.begun
        left = spent / self.done * (self.total - self.done)
        return f"[{self.done}/{self.total}] {name:<44} KL {kl:6.3f}   {spent / 60:5.1f} min, about {left / 60:.0f} left"


def judge_cells(
    study: Study, rows: Sequence[dict], endpoint: str, prompt: str | None, dense: Sequence[list[str]]
) -> dict:
    """Adds "judge" to every cell and gives {"judge", "url", "dense": the dense model's own scores by persona}.

    prompt: with {question} and {answer}; by default the `eval_prompt` of a persona's question set where it has one,
    else the package's own.
    """
    judge = judging.Judge(endpoint, study.folder / "judge.jsonl")

    def verdicts(number: int, said: Sequence[str]) -> dict:
        persona = study.personas[study.names[number]]
        text = prompt or (persona.raw or {}).get("eval_prompt") or judging.PROMPT
        questions = study.material(number, 0).questions
        found = judging.judged(judge, text, questions, said, persona.description)
        found.pop("verdicts")
        return found

    base = [verdicts(number, said) for number, said in enumerate(dense)]
    for done, row in enumerate(rows, 1):
        number = study.names.index(row["persona"])
        row["judge"] = verdicts(number, row["answers"])
        drop = (base[number]["score"], row["judge"]["score"])
        row["judge_drop"] = None if None in drop else drop[0] - drop[1]
        questions = study.material(number, 0).questions
        trio = zip(questions, row["answers"], dense[number], strict=True)
        persona = study.personas[study.names[number]].description
        wins = [judge.prefers_first(judging.PAIR_PROMPT, q, a, d, persona) for q, a, d in trio]
        wins = [win for win in wins if win is not None]
        row["judge"]["preferred_to_dense"] = sum(wins) / len(wins) if wins else None
        study.progress.note(f"judged {done}/{len(rows)}: {row['method']} {row['calibration']} {row['ratio']:g}")
    return {"judge": judge.model, "url": judge.url, "dense": dict(zip(study.names, base, strict=True))}


@kept_memory()
def compare(
    model: nn.Module,
    tokenizer,
    personas: Mapping[str, Persona],
    out: str | Path,
    methods: Sequence[str],
    ratios: Sequence[float] = (0.25, 0.5),
    seeds: int = 1,
    base: str | None = None,
    judge: str | None = None,
    judge_prompt: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    progress: Progress | None = None,
    **settings,
) -> dict:
    """Every method on every persona, and what comes of it as plain values, also written to `out` as Markdown, CSV, JSON
    and a page of plots. A second run with the same arguments goes on where the first stopped.

    methods: as `plan.chosen_methods` gives them; judge: `URL` or `URL#model`; tasks: of lm-eval, `limit` questions
    each; settings: the fields of `SculptConfig` for data and search. Raises InputError for settings out of range.
    """
    settings = {name: value for name, value in settings.items() if name not in ("ratio", "seed")}
    SculptConfig.of(**settings)
    for ratio in ratios:
        for width in models.widths(model):
            kept_width(width, ratio)
    if seeds < 1 or not methods or not ratios or not personas:
        raise InputError("a comparison needs at least one persona, method, ratio and seed")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; the results need a folder")
    name = models.base_name(model, base)
    study = Study(model, tokenizer, personas, folder, name, settings, progress or Progress())
    planned = builds(methods, ratios, seeds, len(personas))
    rows = cells(study, planned, tasks, limit)
    dense = Workspace(folder / "cells").read("dense", study.root)
    verdict = judge_cells(study, rows, judge, judge_prompt, dense["answers"]) if judge else None
    result = {
        "run": {
            "model": name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "machine": machine(),
            "version": __version__,
            "date": datetime.now(UTC).date().isoformat(),
            "personas": study.names,
            "ratios": list(ratios),
            "seeds": seeds,
            "settings": settings,
        },
        "dense": {key: value for key, value in dense.items() if key != "answers"},
        "methods": {method: describe(method) for method in methods},
        "judge": verdict,
        **summarise(rows),
        "cells": rows,
    }
    report.write_comparison(result, folder)
    return result
