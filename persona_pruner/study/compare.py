"""`persona-pruner compare`: the paper's evaluation, method by method, at equal parameter count.

personas -> held-out questions and calibration data (stage 1 of sculpt)
methods x ratios x seeds -> pruned models -> cells: one model measured on one persona, stored as soon as it is known
cells -> table, headline, plots
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from persona_pruner import __version__, models, report
from persona_pruner.config import SculptConfig
from persona_pruner.errors import InputError
from persona_pruner.evaluation import judge as judging
from persona_pruner.memory import kept_memory
from persona_pruner.persona import Persona
from persona_pruner.progress import Progress
from persona_pruner.search.baselines import BASELINES
from persona_pruner.search.masks import kept_width
from persona_pruner.study import own
from persona_pruner.study.cells import Study, Workers, cells
from persona_pruner.study.measure import machine
from persona_pruner.study.plan import builds
from persona_pruner.study.summary import summarise
from persona_pruner.workspace import Workspace


def describe(method: str) -> str:
    """What a method is, in a few words."""
    return BASELINES[method].how if method in BASELINES else own.METHODS[method][1]


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
    workers: Workers | None = None,
    calibration: str = "both",
    **settings,
) -> dict:
    """Every method on every persona, and what comes of it as plain values, also written to `out` as Markdown, CSV, JSON
    and a page of plots. A second run with the same arguments goes on where the first stopped.

    methods: as `plan.chosen_methods` gives them; judge: `URL` or `URL#model`; tasks: of lm-eval, `limit` questions
    each; workers: processes that make the models side by side, by default this one does; calibration: of published
    methods, as in `plan.builds`; settings: the fields of `SculptConfig` for data and search. Raises InputError for
    settings out of range, and RunError when a worker fails.
    """
    settings = {name: value for name, value in settings.items() if name not in ("ratio", "seed")}
    SculptConfig.of(**settings)
    for ratio in ratios:
        for width in models.widths(model):
            kept_width(width, ratio)
    if seeds < 1 or not methods or not ratios or not personas:
        raise InputError("a comparison needs at least one persona, method, ratio and seed")
    planned = builds(methods, ratios, seeds, len(personas), calibration)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; the results need a folder")
    name = models.base_name(model, base)
    study = Study(model, tokenizer, personas, folder, name, settings, progress or Progress())
    rows = cells(study, planned, tasks, limit, workers)
    dense = Workspace(folder / "cells").read("dense", study.root)
    verdict = judge_cells(study, rows, judge, judge_prompt, dense["answers"]) if judge else None
    result = {
        "run": {
            "model": name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "threads": workers.threads if workers else torch.get_num_threads(),
            "workers": workers.count if workers else 1,
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
