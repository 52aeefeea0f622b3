"""`persona-pruner analyse`: what a persona's mask depends on, one small study at a time.

Each study gives {"title", "about", "head", "rows", "plot"}; rows begin with a name or a number, `plot` is
{"kind": "bar" | "line" | "heat", "value": column}. KL is that of `metrics.fidelity` on held-out questions.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from persona_pruner import __version__, files, models, report
from persona_pruner.config import SculptConfig
from persona_pruner.errors import InputError
from persona_pruner.evaluation import metrics
from persona_pruner.material import Material
from persona_pruner.memory import kept_memory
from persona_pruner.nn import slim_copy
from persona_pruner.packing import Example, hidden_states, pack
from persona_pruner.persona import Persona
from persona_pruner.progress import Progress
from persona_pruner.search import relaxed, ste
from persona_pruner.search.baselines import prune
from persona_pruner.search.masks import agreement, kept_width
from persona_pruner.search.scores import Context
from persona_pruner.study import own
from persona_pruner.study.cells import Study
from persona_pruner.study.measure import machine
from persona_pruner.synthesis.generate import generate
from persona_pruner.synthesis.prompts import chat, encode, examples, render, stop_ids
from persona_pruner.synthesis.sensitivity import middle_layers
from persona_pruner.workspace import Workspace

TURNS = 10
TURN_TOKENS = 48
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)


def _reference(study: Study, material: Material) -> metrics.Reference:
    found = examples(study.tokenizer, material.system, material.questions, material.answers)
    return metrics.dense_reference(study.model, found)


def _kl(model: nn.Module, reference: metrics.Reference) -> float:
    return metrics.fidelity(model, reference).kl


def _people(study: Study, least: int = 1) -> range:
    if len(study.names) < least:
        raise InputError(f"this study needs at least {least} personas, there are {len(study.names)}")
    return range(len(study.names))


def seeds(study: Study, ratio: float, count: int) -> dict:
    rows = []
    for number in _people(study):
        searches = [study.search(number, seed) for seed in range(max(2, count))]
        masks = [search.masks(search.even(ratio)) for search in searches]
        rows += [
            [f"{study.names[number]}, seeds {a} and {b}", agreement(masks[a], masks[b])]
            for a, b in itertools.combinations(range(len(masks)), 2)
        ]
    about = "Channels kept by both masks over channels kept by either; a seed is that of data, scores and search."
    return _study("Agreement of masks across seeds", f"{about} {_chance(study, ratio)}", ["masks", "agreement"], rows)


def _chance(study: Study, ratio: float) -> str:
    share = statistics.fmean(kept_width(width, ratio) / width for width in models.widths(study.model))
    return f"Two random masks of this size agree by {share / (2 - share):.3f}."


def _study(title: str, about: str, head: list[str], rows: list[list], kind: str = "bar", value: str = "") -> dict:
    plot = {"kind": kind, "value": value or head[-1]}
    return {"title": title, "about": about, "head": head, "rows": rows, "plot": plot}


@torch.inference_mode()
def description_states(study: Study) -> Tensor:
    """float32 [personas, hidden]: mean hidden state of each description's tokens at the middle layer."""
    layer = middle_layers(len(models.decoder_layers(study.model)))
    states = []
    for persona in study.personas.values():
        (batch,) = pack([Example(encode(study.tokenizer, persona.description), [0])])
        out = hidden_states(study.model, batch.to(study.model.device), output_hidden_states=True)
        states.append(out.hidden_states[layer[len(layer) // 2]][0].float().mean(0))
    return torch.stack(states)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's, ties by order; None for fewer than three pairs."""
    if len(a) < 3:
        return None
    ranks = [torch.tensor(values).argsort(stable=True).argsort(stable=True).double() for values in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def pairs(study: Study, ratio: float, count: int) -> dict:
    _people(study, 2)
    searches = [study.search(number, 0) for number in _people(study)]
    masks = [search.masks(search.even(ratio)) for search in searches]
    states = description_states(study)
    states = states - states.mean(0) if len(states) > 2 else states
    rows = []
    for a, b in itertools.combinations(_people(study), 2):
        alike = cosine_similarity(states[a], states[b], dim=0).item()
        rows.append([f"{study.names[a]} and {study.names[b]}", alike, agreement(masks[a], masks[b])])
    found = rank_correlation([row[1] for row in rows], [row[2] for row in rows])
    said = "" if found is None else f" Rank correlation of the two columns: {found:.2f}."
    about = (
        "Similarity: cosine of the descriptions' mean hidden states at the middle layer, less the mean over personas "
        f"where there are more than two. {_chance(study, ratio)}{said}"
    )
    return _study("Agreement of masks between personas", about, ["personas", "similarity", "agreement"], rows)


def cross(study: Study, ratio: float, count: int) -> dict:
    return _cross(study, ratio, "persona-scores", "slice")


def cross_masks(study: Study, ratio: float, count: int) -> dict:
    return _cross(study, ratio, "persona-global-bias", "mask")


def _by_question(study: Study, material: Material) -> tuple[list[metrics.Reference], Tensor]:
    """A reference for every held-out question, with all of its answers, and the share of answer tokens that is its."""
    found = examples(study.tokenizer, material.system, material.questions, material.answers)
    count = len(material.questions)
    references = [metrics.dense_reference(study.model, found[question::count]) for question in range(count)]
    tokens = torch.tensor([sum(len(pack.target) for pack in one.packs) for one in references], dtype=torch.float64)
    return references, tokens / tokens.sum()


def gap(own: Tensor, other: Tensor, share: Tensor) -> tuple[float, float]:
    """Mean of own - other over questions and its standard error, questions weighing their `share` of the tokens."""
    difference = own - other
    mean = (share * difference).sum()
    return mean.item(), (share * (difference - mean)).norm().item()


def _cross(study: Study, ratio: float, method: str, what: str) -> dict:
    _people(study, 2)
    tests = [_by_question(study, study.material(n, 0)) for n in _people(study)]
    rows, found = [], []
    for number in [*_people(study), None]:
        search = study.shared(0) if number is None else study.search(number, 0)
        model = own.made(method, search, ratio)
        found.append([torch.tensor([_kl(model, one) for one in references]).double() for references, _ in tests])
        name = "all together" if number is None else study.names[number]
        rows.append([name, *((share * kl).sum().item() for kl, (_, share) in zip(found[-1], tests, strict=True))])
    gaps = []
    for number, (_, share) in enumerate(tests):
        _, other = min((row[number + 1], at) for at, row in enumerate(rows) if at != number)
        mean, error = gap(found[number][number], found[other][number], share)
        gaps.append(f"{mean:+.3f} ± {error:.3f} ({study.names[number]}, {rows[other][0]})")
    table = torch.tensor([row[1:] for row in rows[:-1]], dtype=torch.float64)
    best, columns = (int((table.argmin(dim) == torch.arange(len(table))).sum()) for dim in (1, 0))
    beaten = int((table.diagonal() < torch.tensor(rows[-1][1:], dtype=torch.float64)).sum())
    about = (
        f"KL of the persona's {what} (row) on the held-out questions of each persona (column); the last row is one "
        f"{what} from as much data of all personas together. Made by {method}: {own.METHODS[method][1]}. "
        f"The diagonal is least of its row {best} times and least of its column {columns} times of {len(table)}; "
        f"it is less than what the last row has there {beaten} times. Less the best other of its column, with the "
        f"standard error over questions: {', '.join(gaps)}."
    )
    title = f"One persona's {what} on another's questions"
    return _study(title, about, [f"{what} of", *study.names], rows, "heat")


def data(study: Study, ratio: float, count: int) -> dict:
    rows = []
    found = [study.material(n, 0).calibration for n in _people(study)]
    references = [_reference(study, study.material(n, 0)) for n in _people(study)]
    for share in SHARES:
        kls = []
        for number in _people(study):
            part = found[number][:: round(1 / share)]  # every n-th: own and bank questions in proportion
            key = files.digest([study.data_key(number, 0, ()), share])
            search = study.search_on(part, 0, f"{study.names[number]}-share-{share:g}", key)
            channels = search.even(ratio)
            masks = [channels.best(), search.masks(channels)]
            kls.append([len(part), *(_kl(search.repaired(mask), references[number]) for mask in masks)])
        size, *means = (statistics.fmean(column) for column in zip(*kls, strict=True))
        rows.append([round(size), *means])
    about = "Mean over personas; every n-th calibration example. Scores and repair, without and with search."
    head = ["examples", "KL without search", "KL"]
    return _study("Drop against the amount of data", about, head, rows, "line", "KL")


def conversation(study: Study, material: Material, turns: int = TURNS) -> list[Example]:
    """A conversation on held-out questions, answered by the dense model: the prompt of turn t is all that was said."""
    said: list[str] = []
    out = []
    stops = stop_ids(study.model, study.tokenizer)
    for turn in range(turns):
        said.append(material.questions[turn % len(material.questions)])
        prompt = encode(study.tokenizer, render(study.tokenizer, chat(material.system, *said)))
        (answer,) = generate(study.model, [prompt], stops, TURN_TOKENS, seed=turn)
        out.append(Example(prompt, answer))
        said.append(study.tokenizer.decode(answer, skip_special_tokens=True).strip())
    return out


def turns(study: Study, ratio: float, count: int) -> dict:
    kls: list[list[list[float]]] = []
    wanda = prune("wanda", Context(study.model, study.generic.packs()), ratio)
    for number in _people(study):
        talk = conversation(study, study.material(number, 0))
        references = [metrics.dense_reference(study.model, [example]) for example in talk]
        slices = (own.made("persona", study.search(number, 0), ratio), wanda)
        kls.append([[_kl(model, reference) for model in slices] for reference in references])
    rows = [[turn + 1, *(statistics.fmean(one[turn][i] for one in kls) for i in (0, 1))] for turn in range(len(kls[0]))]
    about = (
        "KL of each turn's answer, mean over personas, in a conversation on held-out questions that the dense model "
        f"answered ({TURN_TOKENS} tokens a turn); each turn sees all turns before it."
    )
    return _study("Ten turns", about, ["turn", "KL", "KL of Wanda, generic"], rows, "line", "KL")


def estimators(study: Study, ratio: float, count: int) -> dict:
    kinds = {"scores alone": None, "straight-through": None} | dict.fromkeys(relaxed.KINDS)
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for number in _people(study):
        search, reference = study.search(number, 0), _reference(study, study.material(number, 0))
        names = ("steps", "lr", "budget", "seed")
        settings = ste.Settings(ratio=ratio, **{name: getattr(search.config, name) for name in names})
        channels, (examples, teacher) = search.even(ratio), search.weighed()
        for kind in kinds:
            if kind in relaxed.KINDS:
                masks = relaxed.search(study.model, examples, channels.scores, settings, teacher, kind)
            else:
                masks = search.masks(channels) if kind == "straight-through" else channels.best()
            found[kind].append([_kl(slim_copy(study.model, masks), reference), _kl(search.repaired(masks), reference)])
    rows = [[kind, *(statistics.fmean(kl[i] for kl in kls) for i in (0, 1))] for kind, kls in found.items()]
    steps = study.config(0).steps
    about = f"{steps} steps from the same scores on the same data, mean over personas; without repair and with it."
    return _study("Straight-through against relaxations", about, ["estimator", "KL of the mask", "KL"], rows)


def _variant(study: Study, folder: str, **settings) -> Study:
    changed = {**study.settings, **settings}
    return replace(study, folder=study.folder / folder, settings=changed, materials={})


def _slices(study: Study, ratio: float, sources: Mapping[str, Study]) -> list[list]:
    """Mean KL over personas, on the held-out questions of `study`, of slices made from the data of each source."""
    rows = []
    for name, source in sources.items():
        kls = []
        for number in _people(study):
            slim = own.made("persona", source.search(number, 0), ratio)
            kls.append(_kl(slim, _reference(study, study.material(number, 0))))
        rows.append([name, statistics.fmean(kls)])
    return rows


def sensitivity(study: Study, ratio: float, count: int) -> dict:
    """Bank questions only, since the filter does not touch the persona's own."""
    most = {"own_questions": 0, "bank_questions": study.config(0).bank_questions + study.config(0).own_questions // 2}
    most["bank_candidates"] = max(study.config(0).bank_candidates, 2 * most["bank_questions"])
    filtered, drawn = (_variant(study, f"filter-{on}", filter=on, **most) for on in (True, False))
    sources = {"most sensitive questions": filtered, "questions drawn at random": drawn}
    rows = _slices(study, ratio, sources)
    about = f"{most['bank_questions']} questions of the bank and none of the persona's own, mean over personas."
    return _study("Sensitivity filter", about, ["calibration", "KL"], rows)


def character(study: Study, ratio: float, count: int) -> dict:
    plain = _variant(study, "out-of-character", in_character=False)
    sources = {"answers in character": study, "answers without the persona's prompt": plain}
    rows = _slices(study, ratio, sources)
    return _study("Answers in character", "Same questions, mean over personas.", ["calibration", "KL"], rows)


def thin(persona: Persona, questions: Sequence[str]) -> Persona:
    """The persona with the first sentence of its description alone, and the same held-out questions."""
    first = persona.description.strip().split(". ")[0].rstrip(".") + "."
    return replace(Persona.from_text(first, persona.name), raw={"questions": list(questions)})


def description(study: Study, ratio: float, count: int) -> dict:
    people = enumerate(study.personas.items())
    small = {name: thin(persona, study.material(n, 0).questions) for n, (name, persona) in people}
    poor = replace(study, folder=study.folder / "one-line", personas=small, materials={})
    rows = _slices(study, ratio, {"the whole description": study, "its first sentence": poor})
    about = (
        "Slices made from data under the whole description and under its first sentence, both measured under the whole "
        "one, mean over personas."
    )
    return _study("A rich description against one line", about, ["made from", "KL"], rows)


STUDIES: dict[str, Callable[[Study, float, int], dict]] = {
    "seeds": seeds,
    "personas": pairs,
    "cross": cross,
    "cross-masks": cross_masks,
    "data": data,
    "turns": turns,
    "estimators": estimators,
    "filter": sensitivity,
    "character": character,
    "description": description,
}
SEVERAL = ("personas", "cross", "cross-masks")  # need at least two personas


@kept_memory()
def analyse(
    model: nn.Module,
    tokenizer,
    personas: Mapping[str, Persona],
    out: str | Path,
    studies: Sequence[str] = (),
    ratio: float = 0.25,
    seeds: int = 2,
    base: str | None = None,
    progress: Progress | None = None,
    **settings,
) -> dict:
    """The studies asked for (all by default; those of several personas only where there are several), also written to
    `out` as Markdown, JSON and a page of plots. A finished study is not made again.

    Raises InputError for an unknown study, or settings out of range.
    """
    settings = {name: value for name, value in settings.items() if name not in ("ratio", "seed")}
    SculptConfig.of(**settings)
    for width in models.widths(model):
        kept_width(width, ratio)
    for name in studies:
        if name not in STUDIES:
            raise InputError(f"study {name!r} is not one of {', '.join(STUDIES)}")
    wanted = list(studies) or [name for name in STUDIES if len(personas) > 1 or name not in SEVERAL]
    progress, folder, known = progress or Progress(), Path(out), models.base_name(model, base)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; the results need a folder")
    study = Study(model, tokenizer, personas, folder, known, settings, progress)
    work = Workspace(folder / "studies")
    who = [[name, persona.system_prompt()] for name, persona in personas.items()]
    found = {}
    for name in wanted:
        progress.note(f"study {name}")
        key = files.digest([study.root, who, SculptConfig.of(**settings).dump(), ratio, seeds])
        found[name] = work.value(name, key, lambda name=name: STUDIES[name](study, ratio, seeds))
    run = {
        "model": known,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "version": __version__,
        "date": datetime.now(UTC).date().isoformat(),
        "personas": study.names,
        "ratio": ratio,
        "seeds": seeds,
        "settings": settings,
    }
    result = {"run": run, "studies": found}
    report.write_analysis(result, folder)
    return result
