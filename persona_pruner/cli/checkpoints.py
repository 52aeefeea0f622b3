"""pack, unpack: between packed and ordinary checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from persona_pruner.cli.app import app, console, example


@app.command(epilog=example("persona-pruner pack runs/sparse-llama packed"))
def pack(
    checkpoint: Annotated[Path, typer.Argument(help="Dense checkpoint with 2:4 zeros, or a sparse-24-bitmask one.")],
    out: Annotated[Path, typer.Argument(help="Folder for the packed checkpoint.")],
):
    """Pack a checkpoint that is 2:4 sparse already; nothing is rounded."""
    from persona_pruner.formats.packed import read_sparse, save_packed

    model, tokenizer = read_sparse(checkpoint)
    save_packed(model, out, tokenizer)
    console.print(f"written to {out}")


@app.command(epilog=example("persona-pruner unpack runs/blacksmith/packed dense"))
def unpack(
    checkpoint: Annotated[Path, typer.Argument(help="Packed checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder for the ordinary checkpoint, dense with zeros.")],
):
    """Turn a packed checkpoint into an ordinary one, for any other engine."""
    from persona_pruner.formats import packed

    packed.unpack(checkpoint, out)
    console.print(f"written to {out}")
