"""The persona file: one bit for each FFN channel of the base, and who it is for. Kilobytes, safetensors, never pickled.

Tensors `layer.<i>` are uint8 [ceil(C/8)]: channel c is bit c % 8 of byte c // 8, 1 = kept. The header holds JSON texts.
"""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from persona_pruner import files, models
from persona_pruner.errors import InputError
from persona_pruner.nn import slim_

SUFFIX = ".persona.safetensors"
FORMAT = "persona-pruner/1"


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 [ceil(C/8)] of a bool [C] mask, lowest channel in the lowest bit."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, width: int) -> Tensor:
    """bool [width] of packed bits."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=width, bitorder="little").astype(bool))


@dataclass
class PersonaFile:
    """A character as a slice of a base model.

    masks: bool [C] a layer on the CPU; `system` is the prompt it was made for; `base` names the model and `fingerprint`
    is `models.fingerprint` of it; `method`, `ratio` and `metrics` say how it was made and how good it is.
    """

    name: str
    system: str
    base: str
    fingerprint: str
    masks: list[Tensor]
    method: str = "persona-pruner"
    ratio: float = 0.0
    greeting: str = ""
    metrics: dict = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, name: str, system: str, masks: list[Tensor], base: str | None = None, **rest
    ) -> "PersonaFile":
        """The file for masks found on `model`, which is still dense."""
        kept = [mask.detach().bool().cpu() for mask in masks]
        return cls(name, system, models.base_name(model, base), models.fingerprint(model), kept, **rest)

    @property
    def widths(self) -> list[int]:
        """Kept channels of every layer."""
        return [int(mask.sum()) for mask in self.masks]

    def check(self, model: nn.Module) -> None:
        """Raises InputError unless the masks belong to this model's architecture."""
        if models.fingerprint(model) != self.fingerprint:
            raise InputError(
                f"persona {self.name!r} was made for {self.base} and does not fit {models.base_name(model)}: "
                "config or weight shapes differ"
            )

    def apply(self, model: nn.Module) -> nn.Module:
        """Cuts the model down to this persona's channels, in place. Raises InputError for another base."""
        self.check(model)
        return slim_(model, self.masks)

    def save(self, path: str | Path) -> Path:
        """Writes the file (whole or not at all). The name should end in `.persona.safetensors`."""
        from safetensors.torch import save_file

        head = {
            "format": FORMAT,
            "name": self.name,
            "system": self.system,
            "greeting": self.greeting,
            "base": self.base,
            "fingerprint": self.fingerprint,
            "method": self.method,
            "ratio": json.dumps(self.ratio),
            "widths": json.dumps([len(mask) for mask in self.masks]),
            "metrics": json.dumps(self.metrics),
        }
        tensors = {f"layer.{i}": pack_bits(mask) for i, mask in enumerate(self.masks)}
        return files.write_file(path, lambda temporary: save_file(tensors, temporary, head))

    @classmethod
    def load(cls, path: str | Path) -> "PersonaFile":
        """Reads a persona file. Raises InputError, naming the file, when it is missing or not one."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if path.is_dir():
            path = path / f"persona{SUFFIX}"
        if not path.is_file():
            raise InputError(f"no persona file {path}")
        try:
            with safe_open(path, "pt") as file:
                head = file.metadata() or {}
                if head.get("format") != FORMAT:
                    raise InputError(f"{path} is not a persona file of format {FORMAT}")
                widths, ratio, metrics = (json.loads(head[key]) for key in ("widths", "ratio", "metrics"))
                if not isinstance(widths, list) or not all(type(width) is int and width > 0 for width in widths):
                    raise ValueError("widths are not positive whole numbers")
                if not isinstance(ratio, int | float) or not isinstance(metrics, dict):
                    raise ValueError("ratio is not a number or metrics are not an object")
                if set(file.keys()) != {f"layer.{i}" for i in range(len(widths))} or not widths:
                    raise ValueError("there is not one mask for each width")
                packed = [file.get_tensor(f"layer.{i}") for i in range(len(widths))]
                for bits, width in zip(packed, widths, strict=True):
                    if bits.dtype != torch.uint8 or bits.shape != (-(-width // 8),):
                        raise ValueError("a mask does not have the size its width says")
                masks = [unpack_bits(bits, width) for bits, width in zip(packed, widths, strict=True)]
                texts = {key: head[key] for key in ("name", "system", "base", "fingerprint", "method", "greeting")}
                return cls(masks=masks, ratio=ratio, metrics=metrics, **texts)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError, struct.error) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged: {error}") from error
