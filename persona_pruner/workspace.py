"""Stage artefacts on disk: what has been computed once for the same inputs is read, not computed again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from persona_pruner import files
from persona_pruner.errors import InputError


class Workspace:
    """A folder of stage artefacts, or none at all (everything is then computed). Artefacts whose key differs are
    ignored and overwritten; a damaged one counts as absent."""

    def __init__(self, folder: str | Path | None):
        self.folder = Path(folder) if folder else None

    def read(self, name: str, key: str):
        """The JSON value stored under this name for this key, or None."""
        stored = _stored(self.folder / f"{name}.json") if self.folder else {}
        return stored.get("value") if stored.get("key") == key else None

    def write(self, name: str, key: str, value) -> None:
        if self.folder is not None:
            files.write_json(self.folder / f"{name}.json", {"key": key, "value": value})

    def forget(self, name: str) -> None:
        """Removes a stored value, because what it stands for is about to change."""
        if self.folder is not None:
            (self.folder / f"{name}.json").unlink(missing_ok=True)

    def value(self, name: str, key: str, make: Callable):
        """The stored JSON value, else `make()`, stored."""
        found = self.read(name, key)
        if found is None:
            found = make()
            self.write(name, key, found)
        return found

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Within it no other process that asks for the same is at what has this name."""
        if self.folder is None:
            yield
            return
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{name}.lock"):
            yield

    def read_tensors(self, name: str, key: str) -> dict[str, Tensor] | None:
        """The tensors stored under this name for this key, or None."""
        from safetensors import SafetensorError, safe_open

        if self.folder is None or not (path := self.folder / f"{name}.safetensors").exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("key") != key:
                    return None
                return {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118  not a dict
        except (SafetensorError, OSError):
            return None

    def write_tensors(self, name: str, key: str, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        if self.folder is not None:
            plain = {tensor: value.detach().cpu().contiguous() for tensor, value in tensors.items()}
            path = self.folder / f"{name}.safetensors"
            files.write_file(path, lambda temporary: save_file(plain, temporary, {"key": key}))


def _stored(path: Path) -> dict:
    """{"key", "value"} of a stored value; empty if it is missing or damaged."""
    try:
        found = files.read_json(path)
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}


def stored_held_out(path: str | Path) -> dict | None:
    """{"questions", "answers"} that the sculpt of this output folder or persona file was tested on, if still there."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return _stored(folder / "stages" / "held_out.json").get("value")
