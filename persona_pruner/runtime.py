"""A pruned character, opened and spoken with."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import torch
from torch import nn

from persona_pruner import models
from persona_pruner.config import read_run
from persona_pruner.errors import InputError, RunError
from persona_pruner.fleet import DENSE, Fleet
from persona_pruner.formats.persona_file import SUFFIX, PersonaFile
from persona_pruner.synthesis.prompts import encode, render

CACHE = 1 << 30  # bytes for keys and values of a long conversation; a page that is not written takes no memory
ENGINES = ("auto", "fleet", "transformers")


@dataclass
class Character:
    """A model that plays one character: its prompt is `system`; `file` is its persona file where there is one. `model`
    is None once the fleet's engine has taken its weights over (`use`)."""

    model: nn.Module | None
    tokenizer: object
    name: str
    system: str
    greeting: str = ""
    file: PersonaFile | None = None
    fleet: Fleet | None = None

    def use(self, engine: str) -> str:
        """Chooses what answers, and says which it is: "transformers" (its generate, which is what there is at first),
        "fleet" (the native engine of `serve`, several times as fast on a CPU, which takes the model's weights over), or
        "auto": the fleet on a CPU where it has the family, else transformers. Raises InputError for an engine that
        cannot run the model."""
        if engine not in ENGINES:
            raise InputError(f"engine {engine!r} is not one of {', '.join(ENGINES)}")
        if engine == "fleet" or (engine == "auto" and self.model.device.type == "cpu"):
            try:
                self.fleet = Fleet(self.model, self.tokenizer, kv_bytes=CACHE, consume=True)
                self.model = None
                return "fleet"
            except InputError:
                if engine == "fleet":
                    raise
        return "transformers"

    def stream(
        self, messages: list[dict], max_new_tokens: int = 160, temperature: float = 0.7, top_p: float = 0.95
    ) -> Iterator[str]:
        """The answer to a conversation ({"role", "content"} of user and assistant turns), piece by piece.

        temperature 0 is greedy; what is sampled depends on torch's seed. The persona's system text is put first.
        """
        chat = ([{"role": "system", "content": self.system}] if self.system else []) + messages
        ids = encode(self.tokenizer, render(self.tokenizer, chat))
        speak = self._generate if self.fleet is None else self._ask_fleet
        yield from (piece for piece in speak(ids, max_new_tokens, temperature, top_p) if piece)

    def _ask_fleet(self, ids: list[int], max_new_tokens: int, temperature: float, top_p: float) -> Iterator[str]:
        sampling = {"temperature": temperature, "top_p": top_p, "seed": int(torch.randint(1 << 31, ()))}
        for event in self.fleet.stream([(DENSE, ids)], max_new_tokens, **sampling):
            if event.error:
                raise RunError(event.error)
            yield event.text

    def _generate(self, ids: list[int], max_new_tokens: int, temperature: float, top_p: float) -> Iterator[str]:
        from transformers import TextIteratorStreamer

        prompt = torch.tensor([ids], device=self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        )
        failure: list[BaseException] = []

        def run() -> None:
            try:
                self.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self.tokenizer.eos_token_id,
                    streamer=streamer,
                    **sampling,
                )
            except BaseException as error:
                failure.append(error)
                streamer.end()

        worker = Thread(target=run, daemon=True)
        worker.start()
        yield from streamer
        worker.join()
        if failure:
            raise failure[0]


def open_character(
    path: str | Path, base: str | None = None, device: str = "cpu", dtype: str = "auto", dense: bool = False
) -> Character:
    """Opens a sculpt's output folder (its checkpoint), a persona file (cut from its base) or a checkpoint folder.

    base: the base model, where the one named in the persona file is not wanted; `dense` opens the base itself with
    the persona's prompt. Raises InputError when the path holds none of these.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no such file or folder: {path}")
    file = None
    if path.is_file() or (path / f"persona{SUFFIX}").exists():
        file = PersonaFile.load(path)
    kind = saved_config(path).get("settings", {}).get("format", "slim") if path.is_dir() else ""
    slim = path / kind if (path / kind).is_dir() else path
    if path.is_dir() and not dense and (slim / "config.json").exists():
        model, tokenizer = models.load_model(slim, device, dtype)
    elif file is None:
        raise InputError(f"{path} is neither a persona file, an output folder of sculpt nor a checkpoint folder")
    else:
        model, tokenizer = models.load_model(base or file.base, device, dtype)
        file.check(model)
        if not dense:
            file.apply(model)
    if file is None:
        return Character(model, tokenizer, path.name, "")
    return Character(model, tokenizer, file.name, file.system, file.greeting, file)


def saved_config(path: str | Path) -> dict:
    """The run.yaml beside a persona file or in an output folder; empty where there is none."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return read_run(folder) if (folder / "run.yaml").exists() else {}
