"""sculpt: from a character to the slice that plays it."""

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
    err,
    example,
    load,
    parse_settings,
    print_json,
    set_threads,
)
from persona_pruner.errors import InputError, RunError


@app.command(
    epilog=example("persona-pruner sculpt --persona card.png --model smollm2-135m --ratio 0.25 --out runs/card")
)
def sculpt(
    out: Annotated[Path, typer.Option(help="Folder for everything that is written.")],
    persona: Annotated[
        str | None, typer.Option(help="Character card (.json, .png, .charx), text file, or the description.")
    ] = None,
    cards: Annotated[
        Path | None, typer.Option(help="A folder of cards instead: each gets a folder of its own in --out.")
    ] = None,
    engine: Annotated[str, typer.Option(help="How --cards are worked through: serial, process, ray.")] = "serial",
    workers: Annotated[int, typer.Option(min=1, help="Cards at a time, for process and ray.")] = 1,
    retries: Annotated[int, typer.Option(min=0, help="How often a card that failed is tried again.")] = 1,
    model: Model = "smollm2-135m",
    ratio: Annotated[
        float, typer.Option(help="Share of FFN channels to remove; 0 with --format packed for 2:4 alone.")
    ] = 0.25,
    scope: Annotated[
        str, typer.Option(help="layer: equal widths, a checkpoint for any engine; global: best mask.")
    ] = "layer",
    format_: Annotated[
        str, typer.Option("--format", help="slim: a plain checkpoint; packed: its linears 2:4 sparse as well.")
    ] = "slim",
    seed: int = 0,
    repair: Annotated[bool, typer.Option(help="Refit W_o and W_down of the cut model, block by block.")] = True,
    compare: Annotated[bool, typer.Option(help="Measure baselines and speed as well.")] = True,
    minutes: Annotated[
        float | None, typer.Option(help="Fewer questions and steps where a character would take longer than this.")
    ] = None,
    questions: Annotated[
        list[str] | None, typer.Option(help="More questions: Alpaca, ShareGPT, a dataset; repeatable.")
    ] = None,
    eval_questions: Annotated[
        str | None, typer.Option(help="Held-out questions, e.g. a published persona set.")
    ] = None,
    answers: Annotated[
        str, typer.Option(help="self, URL or URL#model of an OpenAI-compatible server, or a model.")
    ] = "self",
    set_: Set = None,
    hub: Hub = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    as_json: Json = False,
):
    """Find the slice of a model that a character needs, and write it as persona file and slim checkpoint."""
    from persona_pruner import pipeline, report
    from persona_pruner.config import SculptConfig
    from persona_pruner.persona import Persona

    if (persona is None) == (cards is None):
        raise InputError("sculpt takes either --persona or --cards")
    if cards is None and (engine != "serial" or workers != 1):
        raise InputError("--engine and --workers belong to --cards")
    settings = {"ratio": ratio, "scope": scope, "seed": seed, "repair": repair, "compare": compare, "answers": answers}
    settings |= {"format": format_, "questions": tuple(questions or ()), "eval_questions": eval_questions}
    settings |= {"minutes": minutes} | parse_settings(set_)
    SculptConfig.of(**settings)
    if cards is not None:
        where = {"model": model, "device": device, "dtype": dtype, "hub": hub}
        return _many(cards, out, engine, workers, retries, threads, as_json, where, settings)
    set_threads(threads)
    who = Persona.load(persona)
    base, tokenizer, progress = load(model, device, dtype, hub)
    result = pipeline.sculpt(base, tokenizer, who, out=out, base=model, progress=progress, **settings)
    if as_json:
        print_json(result.metrics)
    else:
        console.print(report.table(result.metrics), soft_wrap=False)
        console.print(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir() if p.name != 'stages'))}")


def _many(
    folder: Path, out: Path, engine: str, workers: int, retries: int, threads: int, as_json: bool, where: dict, settings
) -> None:
    import os

    from persona_pruner import many
    from persona_pruner.cli.table import Table

    cards = many.cards_in(folder)
    threads = threads or (0 if engine == "serial" else max(1, (os.cpu_count() or 1) // workers))
    with Table(err, [card.stem for card in cards]) as table:
        options = {"engine": engine, "workers": workers, "retries": retries, "threads": threads, "watch": table}
        rows = many.sculpt_many(cards, out, **options, **where, **settings)
    totals = many.totals(rows)
    if as_json:
        print_json({"characters": rows, **totals})
    else:
        middle = f", median KL {totals['median_kl']:.3f}" if totals["done"] else ""
        console.print(f"{totals['done']} of {len(rows)} characters are done{middle}: {out / 'index.html'}")
    if bad := [row for row in rows if row["status"] == "failed"]:
        raise RunError(f"{len(bad)} of {len(rows)} characters failed; the first: {bad[0]['name']}: {bad[0]['error']}")
