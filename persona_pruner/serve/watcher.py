"""A folder of persona files, looked at again and again: what is put there is served, what is removed is not."""

import logging
import threading
from pathlib import Path

from persona_pruner.errors import PersonaPrunerError
from persona_pruner.formats.persona_file import SUFFIX, PersonaFile
from persona_pruner.serve.worker import Engine

log = logging.getLogger(__name__)


def persona_files(folder: Path) -> dict[str, Path]:
    """Persona files by the name they are asked for: `name.persona.safetensors`, or `name/persona.persona.safetensors`
    as a sculpt leaves it."""
    found = {path.parent.name: path for path in sorted(folder.glob(f"*/persona{SUFFIX}"))}
    found |= {path.name.removesuffix(SUFFIX): path for path in sorted(folder.glob(f"*{SUFFIX}"))}
    return {name: path for name, path in found.items() if name and not name.startswith(".")}


class Watcher:
    """Keeps an engine's characters those of a folder; `refused` says why files are not served."""

    def __init__(self, folder: str | Path, engine: Engine, seconds: float = 1.0):
        self.folder, self.engine, self.seconds = Path(folder), engine, seconds
        self.refused: dict[str, str] = {}
        self._seen: dict[str, tuple] = {}  # name -> what its file looked like when it was last read
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def scan(self) -> None:
        """Looks once. A file that cannot be read is tried again when it has changed, so one that is still being written
        is served when it is whole."""
        now = {}
        for name, path in persona_files(self.folder).items():
            try:
                state = path.stat()
            except OSError:
                continue
            now[name] = path, state.st_size, state.st_mtime_ns, state.st_ino
        for name in self._seen.keys() - now.keys():
            self._forget(name)
            del self._seen[name]
        for name, state in now.items():
            if self._seen.get(name) == state:
                continue
            self._seen[name] = state
            try:
                self.engine.add(name, PersonaFile.load(state[0]), state[2] // 10**9)
            except PersonaPrunerError as error:
                self._forget(name)
                self.refused[name] = str(error)
                log.warning("%s is not served: %s", name, error)
            else:
                self.refused.pop(name, None)
                log.info("%s is served", name)

    def _forget(self, name: str) -> None:
        self.refused.pop(name, None)
        if name in self.engine.characters and name != self.engine.base:
            self.engine.remove(name)
            log.info("%s is no longer served", name)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stop.wait(self.seconds):
            try:
                self.scan()
            except Exception:  # the thread outlives a bad file or disk and looks again
                log.exception("looking at %s failed", self.folder)
