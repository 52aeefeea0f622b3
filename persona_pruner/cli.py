"""The `persona-pruner` command. Exit codes: 0 done, 1 the run failed, 2 the request cannot be met."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup

from persona_pruner import __version__
from persona_pruner.errors import InputError, PersonaPrunerError, RunError


class _Commands(TyperGroup):
    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would end with code 130 and no word
            goes_on = "; the same command goes on from the last finished stage"
            raise RunError(f"interrupted{goes_on if ctx.invoked_subcommand == 'sculpt' else ''}") from error


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
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 where the hardware has it), float32, bfloat16, float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else on standard output.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 is torch's choice.")]


def _example(text: str) -> str:
    return f"Example: [bold]{text}[/bold]"


def _print_json(value) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _threads(count: int) -> None:
    if count:
        import torch

        torch.set_num_threads(count)


@app.command(
    epilog=_example("persona-pruner sculpt --persona card.png --model smollm2-135m --ratio 0.25 --out runs/card")
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

    _threads(threads)
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
        _print_json(result.metrics)
    else:
        console.print(report.table(result.metrics), soft_wrap=False)
        console.print(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir() if p.name != 'stages'))}")


@app.command(epilog=_example('persona-pruner chat runs/blacksmith --prompt "Who are you?"'))
def chat(
    character: Annotated[Path, typer.Argument(help="Output folder of sculpt, persona file or checkpoint folder.")],
    prompt: Annotated[str | None, typer.Option(help="One question instead of a conversation.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model for a persona file, instead of the one it names.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="The base model itself with the character's prompt.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt instead of the character's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 160,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.7,
    seed: int = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    as_json: Json = False,
):
    """Talk with a character; answers are streamed."""
    import time

    import torch

    from persona_pruner.runtime import open_character

    _threads(threads)
    if as_json and prompt is None:
        raise InputError("--json needs --prompt")
    who = open_character(character, base, device, dtype, dense)
    if system is not None:
        who.system = system
    torch.manual_seed(seed)
    messages = []
    if prompt is None:
        print(f"{who.name}: {who.greeting or '...'}\n(an empty line or Ctrl-D ends the conversation)")
    while True:
        try:
            said = prompt if prompt is not None else input("you: ").strip()
        except EOFError:
            break
        if not said:
            if prompt is not None:
                raise InputError("the prompt is empty")
            break
        messages.append({"role": "user", "content": said})
        begun, pieces = time.perf_counter(), []
        for piece in who.stream(messages, max_new_tokens, temperature):
            pieces.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
        answer = "".join(pieces)
        messages.append({"role": "assistant", "content": answer})
        if as_json:
            _print_json({"character": who.name, "answer": answer, "seconds": round(time.perf_counter() - begun, 3)})
        else:
            print()
        if prompt is not None:
            break


@app.command("eval", epilog=_example("persona-pruner eval runs/blacksmith --questions my_questions.json"))
def evaluate(
    character: Annotated[Path, typer.Argument(help="Output folder of sculpt, or a persona file.")],
    questions: Annotated[str | None, typer.Option(help="Held-out questions; by default those of the sculpt.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, instead of the one the persona file names.")] = None,
    count: Annotated[int, typer.Option(min=1, help="At most so many questions.")] = 24,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    as_json: Json = False,
):
    """Measure how far a pruned character is from the dense model on held-out questions and neutral text."""
    from persona_pruner.evaluation.character import evaluate_character
    from persona_pruner.progress import ConsoleProgress

    _threads(threads)
    found = evaluate_character(character, base, questions, count, device, dtype, ConsoleProgress(err))
    if as_json:
        return _print_json(found)
    for name, value in found.items():
        console.print(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")


@app.command(epilog=_example("persona-pruner inspect runs/blacksmith/persona.persona.safetensors"))
def inspect(
    file: Annotated[Path, typer.Argument(help="Persona file, output folder or character card.")],
    as_json: Json = False,
):
    """Show what is in a persona file or a character card."""
    from persona_pruner.formats.persona_file import SUFFIX, PersonaFile
    from persona_pruner.persona import Persona

    if not file.exists():
        raise InputError(f"no such file or folder: {file}")
    if file.is_dir() or file.suffix == ".safetensors":
        found = PersonaFile.load(file)
        source = file / f"persona{SUFFIX}" if file.is_dir() else file
        value = {
            "persona": found.name,
            "base": found.base,
            "fingerprint": found.fingerprint,
            "method": found.method,
            "ratio": found.ratio,
            "bytes": source.stat().st_size,
            "channels": sum(map(len, found.masks)),
            "kept": found.widths,
            "metrics": found.metrics,
            "system": found.system,
        }
    else:
        card = Persona.load(file)
        value = {"persona": card.name, "fingerprint": card.fingerprint, "words": len(card.system_prompt().split())}
        value |= {"greeting": card.greeting(), "system": card.system_prompt(), "tags": list(card.tags)}
    if as_json:
        return _print_json(value)
    for name, entry in value.items():
        console.print(f"{name:12}", entry)


@app.command(epilog=_example("persona-pruner pack runs/sparse-llama packed"))
def pack(
    checkpoint: Annotated[Path, typer.Argument(help="Dense checkpoint with 2:4 zeros, or a sparse-24-bitmask one.")],
    out: Annotated[Path, typer.Argument(help="Folder for the packed checkpoint.")],
):
    """Pack a checkpoint that is 2:4 sparse already; nothing is rounded."""
    from persona_pruner.formats.packed import read_sparse, save_packed

    model, tokenizer = read_sparse(checkpoint)
    save_packed(model, out, tokenizer)
    Console().print(f"written to {out}")


@app.command(epilog=_example("persona-pruner unpack runs/blacksmith/packed dense"))
def unpack(
    checkpoint: Annotated[Path, typer.Argument(help="Packed checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder for the ordinary checkpoint, dense with zeros.")],
):
    """Turn a packed checkpoint into an ordinary one, for any other engine."""
    from persona_pruner.formats import packed

    packed.unpack(checkpoint, out)
    Console().print(f"written to {out}")


@app.command(epilog=_example("persona-pruner doctor"))
def doctor(as_json: Json = False):
    """Versions, processor, threads, and which backend every op uses, and why not the others."""
    from rich.table import Table

    from persona_pruner import doctor as examination

    found = examination.report()
    if as_json:
        return _print_json(found)
    table = Table("what", "value", title=f"persona-pruner {found['persona_pruner']}, Python {found['python']}")
    for name, version in found["packages"].items():
        table.add_row(name, version)
    cpu = found["cpu"]
    table.add_row("CPU kernels", f"{cpu['isa']} on {cpu['machine']}, {cpu['threads']} threads")
    table.add_row("native bf16 products", "yes" if cpu["native_bf16"] else "no (dtype auto is float32)")
    table.add_row("CUDA module", found["cuda"]["module"])
    table.add_row("GPUs", ", ".join(found["cuda"]["devices"]) or "none")
    console.print(table, soft_wrap=False)
    for device, ops in found["ops"].items():
        rows = Table("op", "backend", "state", title=f"ops on {device}; automatic choice takes the first that is ready")
        for op, backends in ops.items():
            for backend, state in backends.items():
                rows.add_row(op, backend, state)
        console.print(rows, soft_wrap=False)


@app.command(
    epilog=_example("persona-pruner bench linear24 --short"),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench(
    context: typer.Context,
    op: Annotated[str, typer.Argument(help="linear24, select24 or importance; its own options follow (--help).")] = "",
):
    """Time an op against other ways to compute the same; every result is checked before it is timed."""
    from importlib import import_module
    from pkgutil import iter_modules

    folder = import_module("persona_pruner.benchmarks").__path__
    names = sorted(m.name.removeprefix("bench_") for m in iter_modules(folder) if m.name.startswith("bench_"))
    if op not in names:
        raise InputError(f"bench takes one of {', '.join(names)}, then that benchmark's options")
    import_module(f"persona_pruner.benchmarks.bench_{op}").main(context.args)


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


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and exits with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def fail(text: str, code: int) -> None:
        err.print(f"persona-pruner: {text}", style="red")
        sys.exit(code)

    try:
        app(args=arguments)
    except PersonaPrunerError as error:
        if debug:
            raise
        fail(str(error), 2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        fail("interrupted", 1)
    except Exception as error:
        if debug:
            raise
        reason = str(error).splitlines()[0] if str(error) else "no message"
        fail(f"{type(error).__name__}: {reason} (--debug shows where)", 1)
    return 0


if __name__ == "__main__":
    main()
