"""The application, and what its commands share: options, consoles, printing."""

import json
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup

from persona_pruner import __version__
from persona_pruner.errors import InputError, RunError

GOES_ON = ("sculpt", "compare", "analyse")  # commands that store what is finished


class _Commands(TyperGroup):
    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would end with code 130 and no word
            goes_on = "; the same command goes on from the last finished stage"
            raise RunError(f"interrupted{goes_on if ctx.invoked_subcommand in GOES_ON else ''}") from error


app = typer.Typer(
    cls=_Commands,
    help="Run a language model as one character at a fraction of its cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# Names and paths are printed as they are: [x] is no markup and :x: no picture.
console, err = (Console(stderr=to, markup=False, emoji=False, highlight=False, soft_wrap=True) for to in (False, True))

Model = Annotated[str, typer.Option(help="Alias (smollm2-135m), local folder or hub name of the base model.")]
Hub = Annotated[bool, typer.Option("--hub", help="Take an alias's full-precision checkpoint from the hub.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 where it is faster), float32, bfloat16, float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else on standard output.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 is torch's choice.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting of sculpt as name=value; repeatable.")]


def example(text: str) -> str:
    return f"Example: [bold]{text}[/bold]"


def print_json(value) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def set_threads(count: int) -> None:
    if count:
        import torch

        torch.set_num_threads(count)


def load(model: str, device: str, dtype: str, hub: bool):
    """(model, tokenizer, the progress that showed their loading and goes on)."""
    from persona_pruner import models
    from persona_pruner.progress import ConsoleProgress

    progress = ConsoleProgress(err)
    with progress.stage(f"loading {model}", 1):
        return *models.load_model(model, device, dtype, hub), progress


def parse_settings(words: list[str] | None) -> dict:
    """{name: value} of words name=value, the values as YAML. Raises InputError for a word of another form."""
    import yaml

    out = {}
    for text in words or []:
        name, sign, value = text.partition("=")
        if not sign:
            raise InputError(f"--set {text} is not of the form name=value")
        try:
            out[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set {text}: the value is not valid YAML") from None
    return out


def _version(wanted: bool) -> None:
    if wanted:
        print(f"persona-pruner {__version__}")
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (works after the command as well).")] = False,
):
    pass
