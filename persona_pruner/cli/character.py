"""chat, eval, inspect: what one does with a finished character."""

from pathlib import Path
from typing import Annotated

import typer

from persona_pruner.cli.app import Device, Dtype, Json, Threads, app, console, err, example, print_json, set_threads
from persona_pruner.errors import InputError


@app.command(epilog=example('persona-pruner chat runs/blacksmith --prompt "Who are you?"'))
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
    engine: Annotated[
        str, typer.Option(help="fleet: the native engine of serve; transformers; auto: the fleet on a CPU if it can.")
    ] = "auto",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    as_json: Json = False,
):
    """Talk with a character; answers are streamed."""
    import time

    import torch

    from persona_pruner.runtime import open_character

    set_threads(threads)
    if as_json and prompt is None:
        raise InputError("--json needs --prompt")
    who = open_character(character, base, device, dtype, dense)
    if system is not None:
        who.system = system
    engine = who.use(engine)
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
            seconds = round(time.perf_counter() - begun, 3)
            print_json({"character": who.name, "answer": answer, "seconds": seconds, "engine": engine})
        else:
            print()
        if prompt is not None:
            break


@app.command("eval", epilog=example("persona-pruner eval runs/blacksmith --questions my_questions.json"))
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

    set_threads(threads)
    found = evaluate_character(character, base, questions, count, device, dtype, ConsoleProgress(err))
    if as_json:
        return print_json(found)
    for name, value in found.items():
        console.print(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")


@app.command(epilog=example("persona-pruner inspect runs/blacksmith/persona.persona.safetensors"))
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
        return print_json(value)
    for name, entry in value.items():
        console.print(f"{name:12}", entry)
