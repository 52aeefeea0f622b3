"""Writing so that nothing is ever half-written, and hashes that tell whether an artefact can be reused."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

from persona_pruner.errors import InputError, RunError


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritten(path: Path, error: Exception) -> RunError:
    """safetensors reports a full disk by an error of its own, which is no OSError."""
    return RunError(f"could not write {path}: {getattr(error, 'strerror', None) or error}")


def write_file(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Calls `write(temporary path)`, then renames it to `path`. Raises RunError when the disk refuses."""
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o644)
        _sync(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _unwritten(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def write_folder(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Calls `write(temporary folder)`, then puts it in the place of `path`. Raises RunError like `write_file`."""
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        write(new)
        for file in new.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                _sync(file)
        try:
            if path.exists():
                os.rename(path, old)
            os.rename(new, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise
    except (OSError, SafetensorError) as error:
        raise _unwritten(path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    return write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value) -> Path:
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable) -> Path:
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: str | Path):
    """Raises InputError, naming the file, when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def read_jsonl(path: str | Path) -> list:
    """Raises InputError like `read_json`. Only a line feed ends a row: JSON texts may hold other separators."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSONL: {error}") from error


def digest(value) -> str:
    """sha256 (hex) of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
