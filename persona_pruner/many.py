"""A folder of characters on one base: many sculpts by one of the executors, and one summary of them all.

Each character's folder below `out` is that of a plain sculpt. Beside them stand summary.csv, index.html and `shared`,
which holds what the characters have in common and the rows of the finished ones.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from persona_pruner import __version__, executors, files, models
from persona_pruner.card_files import CARD_SUFFIXES
from persona_pruner.config import SculptConfig
from persona_pruner.errors import InputError
from persona_pruner.executors import Outcome, Watch
from persona_pruner.formats.persona_file import SUFFIX
from persona_pruner.persona import TEXT_SUFFIXES, Persona
from persona_pruner.pipeline import made, sculpt
from persona_pruner.progress import Progress
from persona_pruner.report import index
from persona_pruner.search.masks import check_widths
from persona_pruner.workspace import Workspace

SHARED = "shared"


def cards_in(folder: str | Path) -> list[Path]:
    """Character cards and text files of a folder, by name. Raises InputError when there are none, or when two would be
    written to the same place."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder of cards {folder}")
    endings = CARD_SUFFIXES + TEXT_SUFFIXES
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings and path.is_file())
    if not found:
        raise InputError(f"{folder} holds no character card ({', '.join(endings)})")
    names: dict[str, Path] = {}
    for path in found:
        if path.stem.casefold() in (SHARED, *names):
            other = names.get(path.stem.casefold())
            taken = f"both {other.name} and {path.name}" if other else path.name
            raise InputError(f"{taken} would be written to the folder {path.stem}: rename one of the files")
        names[path.stem.casefold()] = path
    return found


class _Telling(Progress):
    def __init__(self, say):
        super().__init__()
        self.say = say

    def _begin(self, name: str, total: int) -> None:
        self.say(name)


@cache
def _opened(where: str, device: str, dtype: str, threads: int):
    """The base model of this process: opened once, its weights mapped from the file where the dtype is the file's."""
    if threads:
        import torch

        torch.set_num_threads(threads)
    return models.load_model(where, device, dtype)


@dataclass(frozen=True)
class Job:
    """The work of an executor: sculpts one card and returns its row of the summary. `where` is the base model as
    `models.load_model` opens it, `base` its name in what is written."""

    base: str
    where: str
    out: str
    device: str
    dtype: str
    threads: int
    settings: dict

    def __call__(self, card: str, say) -> dict:
        who = Persona.load(card)
        say("opening the base model")
        model, tokenizer = _opened(self.where, self.device, self.dtype, self.threads)
        folder = Path(self.out) / Path(card).stem
        result = sculpt(
            model,
            tokenizer,
            who,
            out=folder,
            base=self.base,
            progress=_Telling(say),
            shared=Path(self.out) / SHARED,
            **self.settings,
        )
        product, headline = result.metrics["methods"][0], result.metrics.get("headline", {})
        return {
            "persona": who.name,
            "kl": product["kl"],
            "nll_drop": product["nll_drop"],
            "neutral_nll_drop": product["neutral_nll_drop"],
            "baseline": headline.get("baseline"),
            "kl_removed": headline.get("kl_removed"),
            "kept": sum(product["kept"]),
            "bytes": (folder / f"persona{SUFFIX}").stat().st_size,
        }


class _Book(Watch):
    """Keeps the rows, stores what is finished, and passes on what it is told."""

    def __init__(self, rows: list[dict], tasks: list[int], store, watch: Watch):
        self.rows, self.tasks, self.store, self.watch = rows, tasks, store, watch

    def started(self, index: int, attempt: int) -> None:
        self.watch.started(self.tasks[index], attempt)

    def said(self, index: int, text: str) -> None:
        self.watch.said(self.tasks[index], text)

    def ended(self, index: int, outcome: Outcome) -> None:
        row = self.rows[self.tasks[index]]
        row |= {"seconds": round(outcome.seconds, 1), "attempts": outcome.attempts}
        if outcome.error is None:
            row |= {"status": "done", **outcome.value}
        else:
            row |= {"status": "failed", "error": outcome.error}
        self.store(row)
        self.watch.ended(self.tasks[index], outcome)


def _files_of(where: str) -> list:
    """What tells one local checkpoint from another without reading it; a hub name stands for itself."""
    if not Path(where).is_dir():
        return [where]
    found = (path for path in sorted(Path(where).iterdir()) if path.suffix in (".safetensors", ".json"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in found]


def _base(where: str, device: str, dtype: str, ratio: float, shared: Path | None) -> str:
    """The checkpoint that workers open, after a look at it. With `shared`, one of another dtype is converted there, so
    that processes map one file instead of holding a converted copy each. Raises InputError for what no card could be
    sculpted on."""
    kind = str(models.resolve_dtype(dtype, device)).removeprefix("torch.")
    model, tokenizer = models.load_model(where, "cpu", kind)
    check_widths(models.widths(model), ratio)
    config = Path(where) / "config.json"
    if shared is None or device != "cpu" or not config.is_file():
        return where
    stored = files.read_json(config)
    if (stored.get("dtype") or stored.get("torch_dtype")) == kind:
        return where
    folder = shared / f"base-{kind}-{files.digest(_files_of(where))[:12]}"

    def write(temporary: Path) -> None:
        with models.quiet_transformers():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)

    return str(folder if folder.exists() else files.write_folder(folder, write))


def _identity(card: Path, given: list) -> str | None:
    """Hash of what a character's folder is made from; None for a card that cannot be read."""
    try:
        who = Persona.load(card)
    except InputError:
        return None
    return files.digest([*given, who.name, who.system_prompt(), who.greeting(), who.raw])


def sculpt_many(
    cards: Sequence[str | Path],
    out: str | Path,
    model: str = models.SMOLLM2,
    engine: str = "serial",
    workers: int = 1,
    retries: int = 1,
    device: str = "cpu",
    dtype: str = "auto",
    hub: bool = False,
    threads: int = 0,
    watch: Watch | None = None,
    **settings,
) -> list[dict]:
    """Sculpts every card into a folder of its name below `out`; a second run goes on where the first stopped.

    Args:
        cards: files that `Persona.load` reads, no two of the same stem.
        model, device, dtype, hub: the base, as for `load_model`.
        engine, workers, retries: see `executors.run`. On a cluster `out` and the model are on a file system that all
            nodes see.
        threads: CPU threads a worker; 0 is torch's choice.
        watch: who is told how it gets on, by the card's place in `cards`.
        settings: the fields of `SculptConfig`.

    Returns a row for each card: name, folder, status ("done", "failed" or, if it was interrupted, "waiting"), persona,
    kl, nll_drop, neutral_nll_drop (nats a token), baseline, kl_removed, kept (channels), bytes (of the persona file),
    seconds, attempts, error; the same as in summary.csv. Raises InputError for settings out of range or a base that
    cannot be opened at all; what is wrong with one card is said in its row.
    """
    config = SculptConfig.of(**settings)
    cards, out = [Path(card) for card in cards], Path(out)
    if engine not in executors.ENGINES:
        raise InputError(f"engine {engine!r} is not one of {', '.join(executors.ENGINES)}")
    models.check_device(device)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; the results need a folder")
    shared, where = out.absolute() / SHARED, models.locate(model, hub)
    sources = [
        files.file_digest(name) for name in (*config.questions, config.eval_questions) if name and Path(name).is_file()
    ]
    kind = str(models.resolve_dtype(dtype, device))
    given = [__version__, model, kind, _files_of(where), config.dump(), sources]
    rows = [{"name": card.stem, "folder": card.stem, "status": "waiting"} for card in cards]
    keys = [_identity(card, given) for card in cards]
    work = Workspace(shared)

    def store(row: dict) -> None:
        key = keys[rows.index(row)]
        if row["status"] == "done" and key:
            work.write(f"done-{row['name']}", key, row)
        _summary(out, rows, model, config)

    for row, key in zip(rows, keys, strict=True):
        found = work.read(f"done-{row['name']}", key) if key else None
        if found and all((out / row["folder"] / name).exists() for name in made(config)):
            row |= found
    tasks = [number for number, row in enumerate(rows) if row["status"] != "done"]
    if tasks:
        several = engine != "serial" and workers > 1
        where = _base(where, device, dtype, config.ratio, shared if several else None)
        _summary(out, rows, model, config)
        job = Job(model, where, str(out.absolute()), device, dtype, threads, dict(settings))
        book = _Book(rows, tasks, store, watch or Watch())
        executors.run(engine, job, [str(cards[number].absolute()) for number in tasks], workers, retries, book)
    else:
        _summary(out, rows, model, config)
    return rows


def _summary(out: Path, rows: list[dict], model: str, config: SculptConfig) -> None:
    files.write_text(out / "summary.csv", index.csv_text(rows))
    files.write_text(out / "index.html", index.html(rows, model, config))


def totals(rows: list[dict]) -> dict:
    """Counts by status, bytes of all persona files, and the median KL of the finished ones (None without any)."""
    done = [row for row in rows if row["status"] == "done"]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("done", "failed", "waiting")}
    middle = statistics.median(row["kl"] for row in done) if done else None
    return {**counts, "bytes": sum(row["bytes"] for row in done), "median_kl": middle}
