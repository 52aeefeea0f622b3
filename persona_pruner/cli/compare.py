"""compare and analyse: the paper's evaluation on one's own model."""

from pathlib import Path
from typing import Annotated

import typer

from persona_pruner.cli.app import (
    Device,
    Dtype,
    Hub,
    Json,
    Model,
    Set,
    Threads,
    app,
    console,
    example,
    load,
    parse_settings,
    print_json,
    set_threads,
)
from persona_pruner.errors import InputError

Personas = Annotated[Path, typer.Option(help="Folder of cards, question sets or texts; or one file.")]
Count = Annotated[int | None, typer.Option(min=1, help="At most so many personas of the folder.")]
Seeds = Annotated[int, typer.Option(min=1, help="Seeds for data, search and random choices.")]


@app.command(
    epilog=example("persona-pruner compare --personas personas/ --ratios 0.25 0.5 --out runs/compare"),
)
def compare(
    personas: Personas,
    out: Annotated[Path, typer.Option(help="Folder for cells, tables and plots; a second run goes on there.")],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,  # the rest of --ratios 0.25 0.5
    model: Model = "smollm2-135m",
    ratios: Annotated[str, typer.Option(help="Shares of the FFN channels to remove.")] = "0.25 0.5",
    methods: Annotated[
        str, typer.Option(help="all, or of baselines, own, 2:4 and single names, with commas between.")
    ] = "all",
    calibration: Annotated[
        str, typer.Option(help="Data of published methods: generic, or both, the persona's as a second line each.")
    ] = "both",
    seeds: Seeds = 1,
    count: Count = None,
    judge: Annotated[
        str | None, typer.Option(help="URL or URL#model of an OpenAI-compatible server that judges answers.")
    ] = None,
    judge_prompt: Annotated[
        str | None, typer.Option(help="Prompt of the judge: a question set with eval_prompt, or a text file.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval by name, for instance piqa,openbookqa.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions of each task.")] = None,
    set_: Set = None,
    hub: Hub = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that make models side by side; they share the threads.")
    ] = 1,
    as_json: Json = False,
):
    """Measure every pruning method on every persona at equal size: table, headline, plots."""
    from persona_pruner import report
    from persona_pruner.evaluation.judge import read_prompt
    from persona_pruner.study.cells import Workers
    from persona_pruner.study.compare import compare as run
    from persona_pruner.study.plan import chosen_methods, load_personas

    set_threads(threads)
    shares, wanted, people = (
        _numbers(" ".join([ratios, *(more or [])])),
        chosen_methods([methods]),
        load_personas(personas, count),
    )
    prompt = read_prompt(judge_prompt) if judge_prompt else None
    settings = parse_settings(set_)
    base, tokenizer, progress = load(model, device, dtype, hub)
    options = {"base": model, "judge": judge, "judge_prompt": prompt, "limit": limit, "progress": progress}
    options |= {"calibration": calibration, "tasks": [task.strip() for task in tasks.split(",") if task.strip()]}
    if workers > 1:
        options["workers"] = Workers(workers, (model, device, dtype, hub))
    result = run(base, tokenizer, people, out, wanted, shares, seeds, **options, **settings)
    if as_json:
        return print_json(result)
    console.print(report.comparison_table(result), soft_wrap=False)
    console.print(f"written to {out}: compare.md, compare.csv, compare.json, compare.html")


@app.command(epilog=example("persona-pruner analyse --personas personas/ --studies seeds,cross --out runs/analyse"))
def analyse(
    personas: Personas,
    out: Annotated[Path, typer.Option(help="Folder for studies, tables and plots; a second run goes on there.")],
    model: Model = "smollm2-135m",
    studies: Annotated[
        str,
        typer.Option(
            help="Of seeds, personas, cross, cross-masks, data, turns, estimators, filter, character, description."
        ),
    ] = "",
    ratio: Annotated[float, typer.Option(help="Share of FFN channels to remove, between 0 and 1.")] = 0.25,
    seeds: Seeds = 2,
    count: Count = None,
    set_: Set = None,
    hub: Hub = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    as_json: Json = False,
):
    """Find out what a persona's mask depends on: seed, persona, data, turns, estimator, filter, description."""
    from persona_pruner.study.analyse import analyse as run
    from persona_pruner.study.plan import load_personas

    set_threads(threads)
    people, settings = load_personas(personas, count), parse_settings(set_)
    wanted = [name.strip() for name in studies.split(",") if name.strip()]
    base, tokenizer, progress = load(model, device, dtype, hub)
    options = {"base": model, "progress": progress}
    result = run(base, tokenizer, people, out, wanted, ratio, seeds, **options, **settings)
    if as_json:
        return print_json(result)
    for study in result["studies"].values():
        console.print(f"\n{study['title']}: {study['about']}")
        for row in study["rows"]:
            console.print("  ", *(f"{value:.3f}" if isinstance(value, float) else value for value in row))
    console.print(f"\nwritten to {out}: analyse.md, analyse.json, analyse.html")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"--ratios {text} is not a list of numbers such as 0.25 0.5") from None
