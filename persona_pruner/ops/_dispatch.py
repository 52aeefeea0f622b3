"""Chooses the backend of an op: automatic choice may fall back, an explicit wish is met or refused.

A backend is a function with the op's own arguments plus `unavailable(device_type)`, which says in a
sentence why it cannot run there, and `refuses(*args)`, the same for one call (dtype, shape).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from persona_pruner.errors import InputError


def _never(*args, **kwargs) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op. `unavailable` is asked once per device type, `refuses` on every call. `call`: where
    `run` is one native call, that call before it is made (`plan.Call`)."""

    name: str
    run: Callable
    unavailable: Callable[[str], str | None] = _never
    refuses: Callable[..., str | None] = _never
    call: Callable | None = None


@dataclass
class Op:
    """An op with its backends in order of preference; the last one is the reference, which always runs."""

    name: str
    backends: list[Backend]
    _ready: dict[torch.device, list[Backend]] = field(default_factory=dict)

    def ready(self, device: torch.device) -> list[Backend]:
        """Backends that can run on this device, best first (cached)."""
        if device not in self._ready:  # by the device: its type would be a new string each time
            self._ready[device] = [b for b in self.backends if b.unavailable(device.type) is None]
        return self._ready[device]

    def pick(self, device: torch.device, wish: str | None, *args, **kwargs) -> Backend:
        """The backend for one call. Raises InputError, naming the limit, if `wish` cannot be met."""
        if wish is None:
            for backend in self.ready(device):
                if backend.refuses(*args, **kwargs) is None:
                    return backend
        for backend in self.backends:
            if backend.name == wish:
                why = backend.unavailable(device.type) or backend.refuses(*args, **kwargs)
                if why:
                    raise InputError(f"{self.name}: backend {wish!r} cannot run here: {why}")
                return backend
        raise InputError(f"{self.name}: no backend {wish!r}; there are {', '.join(b.name for b in self.backends)}")

    def explain(self, device_type: str) -> dict[str, str]:
        """For each backend 'ready' or the reason why it is not, as `persona-pruner doctor` prints it."""
        return {b.name: b.unavailable(device_type) or "ready" for b in self.backends}
