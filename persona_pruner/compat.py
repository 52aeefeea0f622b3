"""The three functions of the paper's code release (Persona-Pruner, arXiv 2606.14695), which shares this package's
import name: its scripts and its files of kept FFN channels (`topk_indices.pt`) work here."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from persona_pruner import files, models
from persona_pruner.errors import InputError
from persona_pruner.nn import slim_


def resolve_decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a causal LM in order. Raises InputError for a model without them."""
    return models.decoder_layers(model)


def load_topk_indices(path: str | Path) -> list[list[int]]:
    """Kept FFN channels of every layer, ascending, from a torch file (.pt, .pth, .bin), JSON or safetensors.

    The file holds one row of indices for each layer: a list, a 2-d tensor, or a mapping whose keys end in the layer's
    number ("3", "model.layers.3.mlp"). A torch file is read with `weights_only`, so that no code of it runs.
    Raises InputError, naming the file, when it holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file of channel indices {path}")
    rows = _read(path)
    if isinstance(rows, dict):
        numbered = {_layer(key): row for key, row in rows.items()}
        if sorted(numbered, key=str) != sorted(range(len(rows)), key=str):
            raise InputError(f"{path} does not name layers 0 to {len(rows) - 1}, each once")
        rows = [numbered[layer] for layer in range(len(rows))]
    rows = rows.tolist() if isinstance(rows, torch.Tensor) else rows
    if not isinstance(rows, list | tuple) or not rows:
        raise InputError(f"{path} does not hold a row of channel indices for each layer")
    return [_row(row, f"{path}, layer {layer}") for layer, row in enumerate(rows)]


def prune_llama_ffn(model: nn.Module, indices: Sequence[Sequence[int]]) -> nn.Module:
    """Cuts every gated FFN down to the channels listed for its layer, in place, and returns the model.

    Raises InputError when layers and rows do not match, or a channel does not exist.
    """
    widths = models.widths(model)
    if len(indices) != len(widths):
        raise InputError(f"there are indices for {len(indices)} layers, the model has {len(widths)}")
    masks = []
    for layer, (row, width) in enumerate(zip(indices, widths, strict=True)):
        kept = _row(row, f"layer {layer}")
        if kept[-1] >= width:
            raise InputError(f"layer {layer}: channel {kept[-1]} does not exist, the layer has {width}")
        mask = torch.zeros(width, dtype=torch.bool)
        mask[kept] = True
        masks.append(mask)
    return slim_(model, masks)


def _read(path: Path):
    if path.suffix == ".json":
        return files.read_json(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged archive raises depends on where it is damaged
        raise InputError(f"{path} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def _layer(key) -> int | None:
    numbers = re.findall(r"\d+", str(key))
    return int(numbers[-1]) if numbers else None


def _row(row, where: str) -> list[int]:
    row = row.tolist() if isinstance(row, torch.Tensor) else row
    if not isinstance(row, list | tuple) or not row or not all(type(i) is int and i >= 0 for i in row):
        raise InputError(f"{where}: channel indices must be whole numbers from 0 up, at least one")
    if len(set(row)) != len(row):
        raise InputError(f"{where}: a channel is listed twice")
    return sorted(row)
