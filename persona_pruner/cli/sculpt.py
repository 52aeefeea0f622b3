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
    Threads,
    app,
    console,
    err,
    example,
    print_json,
    set_threads,
)
from persona_pruner.errors import InputError


@app.command(
    epilog=example("persona-pruner sculpt --persona card.png --model smollm2-135m --ratio 0.25 --out runs/card")
)
def sculpt(
    persona: Annotated[str, typer.Option(help="Character card (.json, .png, .charx), text file, or the description.")],
    out: Annotated[Path, typer.Option(help="Folder for everything that is written.")],
    model: Model = "smollm2-135m",
    ratio: Annotated[float, typer.Option(help="Share of FFN channels to remove, between 0 and 1.")] = 0.25,
    scope: Annotated[
        str, typer.Option(help="layer: equal widths, a checkpoint for any engine; global: best mask.")
    ] = "layer",
    format_: Annotated[
        str, typer.Option("--format", help="slim: a plain checkpoint; packed: its linears 2:4 sparse as well.")
    ] = "slim",
    seed: int = 0,
    repair: Annotated[bool, typer.Option(help="Refit W_down on the kept channels.")] = True,
    compare: Annotated[bool, typer.Option(help="Measure baselines and speed as well.")] = True,
    questions: Annotated[
        list[str] | None, typer.Option(help="More questions: Alpaca, ShareGPT, a dataset; repeatable.")
    ] = None,
    eval_questions: Annotated[
        str | None, typer.Option(help="Held-out questions, e.g. a published persona set.")
    ] = None,
    answers: Annotated[
        str, typer.Option(help="self, URL or URL#model of an OpenAI-compatible server, or a model.")
    ] = "self",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any further setting as name=value; repeatable.")
    ] = None,
    hub: Hub = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    as_json: Json = False,
):
    """Find the slice of a model that a character needs, and write it as persona file and slim checkpoint."""
    import yaml

    from persona_pruner import models, pipeline, report
    from persona_pruner.config import SculptConfig
    from persona_pruner.persona import Persona
    from persona_pruner.progress import ConsoleProgress

    set_threads(threads)
    settings = {"ratio": ratio, "scope": scope, "seed": seed, "repair": repair, "compare": compare, "answers": answers}
    settings |= {"format": format_, "questions": tuple(questions or ()), "eval_questions": eval_questions}
    for text in set_ or []:
        name, sign, value = text.partition("=")
        if not sign:
            raise InputError(f"--set {text} is not of the form name=value")
        try:
            settings[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set {text}: the value is not valid YAML") from None
    SculptConfig.of(**settings)
    who = Persona.load(persona)
    progress = ConsoleProgress(err)
    with progress.stage(f"loading {model}", 1):
        base, tokenizer = models.load_model(model, device, dtype, hub)
    result = pipeline.sculpt(base, tokenizer, who, out=out, base=model, progress=progress, **settings)
    if as_json:
        print_json(result.metrics)
    else:
        console.print(report.table(result.metrics), soft_wrap=False)
        console.print(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir() if p.name != 'stages'))}")
