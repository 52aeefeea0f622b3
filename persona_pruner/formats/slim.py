"""The slim checkpoint: an ordinary Hugging Face folder with a smaller `intermediate_size`; it needs no plug-in."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from persona_pruner import files, models
from persona_pruner.errors import InputError


def save_slim(
    model: nn.Module, tokenizer, folder: str | Path, extra: Callable[[Path], None] = lambda folder: None
) -> Path:
    """Writes a slimmed model and its tokenizer as a checkpoint for plain transformers, whole or not at all.

    `extra` may add files to the folder. Raises InputError for widths that differ between layers: a plain
    config has one `intermediate_size`.
    """
    if len(set(models.widths(model))) != 1:
        raise InputError(
            "layers of different width do not fit a plain checkpoint; use scope `layer`, or the persona file"
        )

    def write(temporary: Path) -> None:
        with models.quiet_transformers():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        extra(temporary)

    return files.write_folder(folder, write)
