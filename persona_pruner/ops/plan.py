"""Native calls of the CPU ops before they are made: a step of a model is the same calls again and again."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from persona_pruner.ops import _native


@dataclass(slots=True)
class Call:
    """A call of a CPU function that has not been made: its integers, the tensor it fills, and those it reads, which
    have to live until then."""

    function: Callable
    numbers: tuple[int, ...]
    out: torch.Tensor
    reads: tuple[torch.Tensor | None, ...]

    def run(self) -> torch.Tensor:
        if self.out.numel():
            self.function(*self.numbers)
        return self.out


class Plan:
    """Calls of CPU functions made again and again on the same tensors, all in one call from Python.

    `adding` turns a function that gives a Call into one that notes it and gives the tensor to be filled."""

    def __init__(self):
        self._calls: list[Call] = []
        self._lines: np.ndarray | None = None

    def adding(self, call: Callable[..., Call]) -> Callable[..., torch.Tensor]:
        def add(*args) -> torch.Tensor:
            self._calls.append(call(*args))
            return self._calls[-1].out

        return add

    def run(self) -> None:
        module = _native.cpu_module()
        if self._lines is None:
            self._lines = np.zeros((len(self._calls), module.most_arguments + 1), np.int64)
            for line, call in zip(self._lines, self._calls, strict=True):
                line[0] = module.names.index(call.function.__name__)
                line[1 : len(call.numbers) + 1] = call.numbers
        module.sequence(self._lines)
