"""What a comparison consists of: personas, methods, and the cells in the order they are computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from persona_pruner.card_files import CARD_SUFFIXES
from persona_pruner.errors import InputError
from persona_pruner.persona import TEXT_SUFFIXES, Persona
from persona_pruner.search.baselines import BASELINES
from persona_pruner.study.own import OWN, OWN_24, SHARED

GROUPS = {
    "baselines": [name for name, method in BASELINES.items() if not method.two_four],
    "own": [*OWN, SHARED],
    "2:4": [*(name for name, method in BASELINES.items() if method.two_four), *OWN_24],
}
GROUPS["all"] = [name for group in ("baselines", "own", "2:4") for name in GROUPS[group]]


@dataclass(frozen=True)
class Build:
    """One pruned model. calibration: "none", "generic", "persona" or "shared"; persona: number of the persona whose
    data it was made from (it is measured on that one alone), None for a model measured on all."""

    method: str
    calibration: str
    ratio: float
    seed: int
    persona: int | None

    def name(self, names: Sequence[str]) -> str:
        whose = "all" if self.persona is None else names[self.persona]
        return f"{self.method.replace(':', '-')}.{self.calibration}.{self.ratio:g}.{self.seed}.{whose}"


def load_personas(source: str | Path, limit: int | None = None) -> dict[str, Persona]:
    """Personas by name: of a file, or of all cards, question sets and texts of a folder, each persona once.

    Published question sets come in pairs for one persona; the one whose name begins with "specific" is taken. Raises
    InputError when there is none.
    """
    path = Path(source)
    if not path.exists():
        raise InputError(f"no personas at {path}: a folder of cards or question sets is needed, or one file")
    suffixes = (*CARD_SUFFIXES, *TEXT_SUFFIXES)
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes) if path.is_dir() else [path]
    found.sort(key=lambda p: not p.stem.startswith("specific"))
    seen: dict[str, str] = {}
    out: dict[str, Persona] = {}
    for file in found:
        persona = Persona.load(str(file))
        if seen.setdefault(persona.fingerprint, file.stem) == file.stem:
            out[file.stem] = persona
    if not out:
        raise InputError(f"{path} holds no card, question set or text")
    return dict(list(out.items())[:limit])


def chosen_methods(words: Sequence[str]) -> list[str]:
    """Methods of names and groups (all, baselines, own, 2:4). Raises InputError for any other word."""
    out: list[str] = []
    for word in (part.strip() for text in words for part in text.split(",")):
        if word not in GROUPS and word not in GROUPS["all"]:
            raise InputError(f"method {word!r} is not one of {', '.join([*GROUPS, *GROUPS['all']])}")
        out += [name for name in GROUPS.get(word, [word]) if name not in out]
    return out


def builds(
    methods: Sequence[str], ratios: Sequence[float], seeds: int, personas: int, calibration: str = "both"
) -> list[Build]:
    """Every model to be made. A method that equal data always brings to the same model has one seed with generic
    data; persona data differ from seed to seed. 2:4 methods take part where 0.5 is one of the ratios. Published methods
    get generic data and, with calibration "both", the persona's as well. Raises InputError for another word."""
    if calibration not in ("both", "generic"):
        raise InputError(f"calibration {calibration!r} is neither both nor generic")
    generic: list[Build] = []
    shared: list[Build] = []
    each: list[Build] = []
    for name in methods:
        fixed = name in OWN_24 or (name in BASELINES and BASELINES[name].two_four)
        for ratio in [r for r in ratios if not fixed or r == 0.5]:
            baseline = BASELINES.get(name)
            if baseline:
                kind = "generic" if baseline.data else "none"
                generic += [Build(name, kind, ratio, s, None) for s in range(seeds if baseline.seeded else 1)]
            if name == SHARED:
                shared += [Build(name, "shared", ratio, s, None) for s in range(seeds if personas > 1 else 0)]
            elif not baseline or (baseline.data and calibration == "both"):
                each += [Build(name, "persona", ratio, s, p) for s in range(seeds) for p in range(personas)]
    return [*generic, *shared, *sorted(each, key=lambda b: (b.seed, b.persona))]
