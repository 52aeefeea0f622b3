"""sculpt(): from one persona and a base model to the slice that plays it. The one function that walks the whole way.

    persona -> held-out questions -> persona questions -> answers in character      (stage 1, synthesis)
            -> channel scores -> straight-through search -> mask -> repair           (stage 2, search)
            -> persona file, slim checkpoint, numbers, report

Every stage reads only what stands left of it, and is stored under a hash of its inputs: a run that was stopped goes
on where it was. Held-out questions are fixed first and nothing that shares eight words with them is kept.
"""

import shutil
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from persona_pruner import __version__, files, models, report
from persona_pruner.config import SculptConfig
from persona_pruner.errors import InputError
from persona_pruner.evaluation import metrics, speed
from persona_pruner.formats.packed import save_packed
from persona_pruner.formats.persona_file import SUFFIX, PersonaFile
from persona_pruner.formats.slim import save_slim
from persona_pruner.material import HELD_OUT_SEED, Run, stage_one
from persona_pruner.memory import kept_memory
from persona_pruner.nn import ffn_bytes, masked, slim_copy, sparsify_, weights
from persona_pruner.packing import Example, evenly, pack
from persona_pruner.persona import Persona
from persona_pruner.progress import Progress
from persona_pruner.search import masks as choice
from persona_pruner.search import recovery, ste
from persona_pruner.search.baselines import two_four
from persona_pruner.search.layerwise import replace_weights_
from persona_pruner.search.repair import TOKENS, repair_
from persona_pruner.search.scores import Context, channel_scores, everything
from persona_pruner.synthesis.generate import generate
from persona_pruner.synthesis.prompts import prompt_ids, stop_ids
from persona_pruner.workspace import Workspace

BASELINES = ("magnitude", "wanda", "taylor")
TWO_FOUR = "sparsegpt-2:4"  # the baseline where no channel goes
MASK_ONLY = "persona-pruner, mask only"
NEUTRAL = ("neutral_examples", "neutral_weight")
SAVE_EVERY = 8  # search steps between stored states
ALWAYS = (f"persona{SUFFIX}", "run.yaml", "metrics.json", "report.html", "README.md")
CHECKPOINTS = ("slim", "packed")


@dataclass
class SculptResult:
    """What a sculpt made: the persona file, the slim model, all numbers, and the folder they were written to."""

    persona_file: PersonaFile
    model: nn.Module
    metrics: dict
    folder: Path | None = None


def _scores(
    run: Run, calibration: list[Example], neutral: list[Example], before: str
) -> tuple[list[Tensor], ste.Targets]:
    """Channel scores on persona and neutral examples, which the search starts from, and the dense targets of both, as
    far as they were seen on the way."""
    config = run.config
    key = files.digest([before, run.settings("start", "score_examples", *NEUTRAL, "seed", "budget")])
    device = run.model.get_input_embeddings().weight.device
    stored, targets = run.work.read_tensors("scores", key), ste.Targets([*calibration, *neutral])
    packs = pack(calibration, config.budget, evenly(len(calibration), config.score_examples))
    if stored is None:
        with run.progress.stage(f"channel scores ({config.start})", len(packs)) as step:
            found = channel_scores(config.start, Context(run.model, packs, config.seed, step, targets.add))
        if neutral:
            with run.progress.stage("channel scores of neutral prose", 1):
                settings = (config.start, len(neutral), config.neutral_weight, config.budget, config.seed)
                found = run.generic.balanced(found, packs, *settings)
        stored = {str(layer): score for layer, score in enumerate(found)}
        run.work.write_tensors("scores", key, stored)
    return [stored[str(layer)].to(device) for layer in range(len(stored))], targets


def _search(
    run: Run, examples: list[Example], neutral: int, scores: list[Tensor], targets: ste.Targets, before: str
) -> tuple[list[Tensor], ste.State]:
    """The mask after the straight-through steps, and the state with its curve; the state is stored on the way. The last
    `neutral` examples are neutral prose."""
    config = run.config
    names = ("ratio", "scope", "loss", "steps", "lr", "budget", "seed")
    settings = ste.Settings(**run.settings(*names))
    key = files.digest([before, asdict(settings)])
    state = ste.start(scores, config.scope)
    if (stored := run.work.read_tensors("search", key)) is not None:
        state = ste.State.from_tensors(stored, scores[0].device)
    if config.steps and state.done < config.steps:
        if config.loss == "kl" and (missing := targets.missing()):
            with run.progress.stage("dense targets", len(pack(examples, config.budget, missing))) as step:
                ste.teacher_states(run.model, examples, config.budget, step, targets)
        examples, teacher = ste.weighed(examples, targets.states, neutral, config.neutral_weight)
        with run.progress.stage("straight-through search", config.steps) as step:
            step(state.done)

            def after_step(now: ste.State) -> None:
                step(1)
                if now.done % SAVE_EVERY == 0 or now.done == config.steps:
                    run.work.write_tensors("search", key, now.to_tensors())

            ste.search(run.model, examples, state, settings, teacher, after_step)
    return choice.choose(state.scores, config.ratio, config.scope), state


def _cut(run: Run, masks: list[Tensor], examples: list[Example]) -> nn.Module:
    """The slim model, repaired and trained where asked for; for format packed 2:4, on the packed kernels."""
    slim, packs = slim_copy(run.model, masks), pack(examples, TOKENS)
    packed = run.config.format == "packed"
    if run.config.repair:
        replace = two_four.sparsegpt_weight if packed else None
        with run.progress.stage("repair, block by block", len(masks)) as step:
            repair_(slim, run.model, packs, run.config.ridge, step=step, replace=replace)
    elif packed:
        with run.progress.stage("two of every four weights", len(masks)) as step:
            replace_weights_(slim, packs, two_four.wanda_weight, step=step)
    if steps := run.config.recovery_steps:
        options = {"budget": run.config.budget, "seed": run.config.seed + 1}
        with run.progress.stage("recovery", steps) as step:
            recovery.recover_(run.config.recovery, slim, run.model, examples, steps, step=step, **options)
    if packed:
        sparsify_(slim)
    return slim


def _recovered(config: SculptConfig) -> list[str]:
    return ["recovery"] if config.recovery_steps else []


def _row(name: str, how: str, found: metrics.Fidelity, neutral: float, masks: list[Tensor]) -> dict:
    kept = [int(mask.sum()) for mask in masks]
    return {"name": name, "how": how, **asdict(found), "neutral_nll_drop": neutral, "kept": kept}


def _variants(run: Run, masks: list[Tensor], scores: list[Tensor], slim: nn.Module) -> list[tuple]:
    """What `_measure` measures of ours, and the published 2:4 model where no channel goes."""
    config, model = run.config, run.model
    if not config.ratio:
        how = ", ".join([*["repair"] * config.repair, *_recovered(config), "2:4"])
        variants = [("persona-pruner", how, masks, slim)]
        if config.compare:
            variants.append((TWO_FOUR, "generic calibration", masks, run.generic.pruned(TWO_FOUR)))
        return variants
    found = "scores, search" if config.steps else "scores"
    how = ", ".join([found, *["repair"] * config.repair, *_recovered(config), *["2:4"] * (config.format == "packed")])
    variants = [("persona-pruner", how, masks, slim)]
    if how != found:
        variants.append((MASK_ONLY, found, masks, model))
    if config.compare:
        other = "global" if config.scope == "layer" else "layer"
        spread = choice.choose(scores, config.ratio, other)
        variants.append((f"persona-pruner, {other} widths", "scores", spread, model))
    return variants


def _measure(run: Run, reference: metrics.Reference, variants: list[tuple], slim: nn.Module, held_out: dict) -> dict:
    """The numbers of the report: `variants` are (name, how, masks, model: run.model for weights untouched), the product
    first."""
    rows, generic, texts = [], run.generic, run.config.neutral_texts
    names = BASELINES if run.config.compare and run.config.ratio else ()
    with run.progress.stage("numbers on held-out questions", len(variants) + len(names) + 1) as step:
        dense_neutral = generic.neutral_nll(texts)
        step(1)
        known = {}
        for name in names:
            masks, known[name] = generic.baseline(name, run.config.ratio, run.config.seed, texts)
            how = "weights alone" if name == "magnitude" else "generic calibration"
            variants.append((name, how, masks, run.model))
        for name, how, masks, model in variants:
            with masked(model, masks) if model is run.model else nullcontext():
                neutral = known[name] if name in known else generic.neutral_nll_of(model, texts)
                found = metrics.fidelity(model, reference)
            rows.append(_row(name, how, found, neutral - dense_neutral, masks))
            step(1)
    baselines = [row for row in rows if row["name"] in (*BASELINES, TWO_FOUR)]
    best = min(baselines, key=lambda row: row["kl"], default=None)
    out = {
        "parameters": {"dense": weights(run.model), "pruned": weights(slim)},
        "ffn_bytes": {"dense": ffn_bytes(run.model), "pruned": ffn_bytes(slim)},
        "held_out": {
            "questions": len(held_out["questions"]),
            "tokens": sum(map(len, held_out["answers"])),
            "dense_nll": reference.nll,
        },
        "neutral": {"dense_nll": dense_neutral, "tokens": generic.neutral_tokens(texts)},
        "methods": rows,
    }
    if best:
        out["headline"] = {"baseline": best["name"], "kl_removed": 1 - rows[0]["kl"] / best["kl"]}
    if run.config.compare:
        with run.progress.stage("tokens per second", 1):
            prompt = prompt_ids(run.tokenizer, run.system, held_out["questions"][0])
            dense, pruned = speed.decode_speeds([run.model, slim], prompt)
            threads = torch.get_num_threads()
            out["tokens_per_second"] = {"dense": dense, "pruned": pruned, "threads": threads}
            if run.model.device.type == "cpu":
                with suppress(InputError):  # no such family in the engine, packed weights, or large ones
                    dense, pruned = speed.fleet_speeds([run.model, slim], run.tokenizer, prompt)
                    out["fleet_tokens_per_second"] = {"dense": dense, "pruned": pruned, "threads": threads}
    return out


def _dialogue(run: Run, slim: nn.Module, questions: list[str]) -> list[dict]:
    """The same questions answered by the dense and by the pruned model, same seed."""
    prompts = [prompt_ids(run.tokenizer, run.system, question) for question in questions]
    stops = stop_ids(run.model, run.tokenizer)
    how = {"max_new_tokens": run.config.answer_tokens, "temperature": 0.6, "seed": HELD_OUT_SEED}
    with run.progress.stage("side by side", 2):
        said = [generate(model, prompts, stops, **how) for model in (run.model, slim)]
    rows = zip(questions, *said, strict=True)
    return [{"question": q, "dense": run.text(d), "pruned": run.text(p)} for q, d, p in rows]


def _checkpoint(config: SculptConfig) -> str | None:
    """Folder of the checkpoint; none for widths that differ between layers, which no engine loads."""
    return config.format if config.scope == "layer" else None


def made(config: SculptConfig) -> list[str]:
    """Names of what a finished sculpt leaves in its folder."""
    return [name for name in (*ALWAYS, _checkpoint(config)) if name]


def _write(run: Run, folder: Path, result: SculptResult) -> None:
    """Everything a user takes away. A checkpoint only for equal widths; other engines have one width."""
    files.write_text(folder / "run.yaml", report.run_yaml(result.metrics["run"]))
    result.persona_file.save(folder / f"persona{SUFFIX}")
    card = report.model_card(result.metrics)
    for name in CHECKPOINTS:
        if name != _checkpoint(run.config):  # of an earlier run with other settings
            shutil.rmtree(folder / name, ignore_errors=True)
    readme = lambda to: files.write_text(to / "README.md", card)  # noqa: E731
    if run.config.format == "packed":
        save_packed(result.model, folder / "packed", run.tokenizer, extra=readme)
    elif run.config.scope == "layer":
        save_slim(result.model, run.tokenizer, folder / "slim", readme)
    files.write_text(folder / "README.md", card)
    files.write_text(folder / "report.html", report.html(result.metrics, result.persona_file))
    files.write_json(folder / "metrics.json", result.metrics)


@kept_memory()
def sculpt(
    model: nn.Module,
    tokenizer,
    persona: Persona,
    ratio: float = 0.25,
    out: str | Path | None = None,
    base: str | None = None,
    progress: Progress | None = None,
    shared: str | Path | None = None,
    **settings,
) -> SculptResult:
    """Finds the slice of `model` that `persona` needs (Persona-Pruner, arXiv 2606.14695) and cuts the rest away.

    Args:
        model, tokenizer: a causal LM of transformers with gated MLPs, and its tokenizer; the model is left as it is.
        persona: who to play.
        ratio: share of FFN channels to remove, in [0, 1); 0 is for format packed alone.
        out: folder for the artefacts; a second run with the same arguments goes on where the first stopped.
        base: name of the model in what is written, by default the one it was loaded by.
        progress: who is told of stages; silent by default.
        shared: folder for what does not depend on the persona, so that other sculpts on this base need not compute it.
        settings: the fields of `SculptConfig`.

    Raises InputError for settings out of range, question files that cannot be read or a model without gated MLPs,
    RunError when the disk refuses.
    """
    config = SculptConfig.of(ratio=ratio, **settings)
    models.prepare(model)
    choice.check_widths(models.widths(model), config.ratio)
    folder = Path(out) if out else None
    if folder and folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; the results need a folder")
    progress = progress or Progress()
    work = Workspace(folder / "stages" if folder else None)
    run = Run(model, tokenizer, persona, models.base_name(model, base), config, work, progress, shared)

    held_out, calibration = stage_one(run)
    config = run.config
    root = run.key([[example.prompt, example.answer] for example in calibration])
    neutral = run.generic.examples(config.neutral_examples)
    examples = [*calibration, *neutral]

    masks, state, scores = everything(model), ste.State([], [], []), []
    if config.ratio:
        scores, targets = _scores(run, calibration, neutral, root)
        start = files.digest([root, run.settings("start", "score_examples", *NEUTRAL)])
        masks, state = _search(run, examples, len(neutral), scores, targets, start)

    finished = files.digest([root, held_out, persona.name, persona.greeting(), run.base, config.dump()])
    whole = folder and all((folder / name).exists() for name in made(config))
    numbers = work.read("finished", finished) if whole else None
    if numbers and (kind := _checkpoint(config)):
        progress.note(f"{folder} is complete for these settings; nothing was computed anew")
        slim, _ = models.load_model(folder / kind, model.device, model.dtype)
        return SculptResult(PersonaFile.load(folder), slim, numbers, folder)

    slim = _cut(run, masks, examples)
    if numbers:
        return SculptResult(PersonaFile.load(folder), slim, numbers, folder)

    variants = _variants(run, masks, scores, slim)
    reference = metrics.dense_reference(model, run.examples(held_out["questions"], held_out["answers"]))
    numbers = _measure(run, reference, variants, slim, held_out)
    numbers["dialogue"] = _dialogue(run, slim, held_out["questions"][:3])
    numbers["search"] = {"losses": state.losses, "flips": state.flips, "examples": len(calibration)}
    numbers["search"]["tokens"] = sum(len(example.answer) for example in calibration)
    numbers["seconds"] = {name: round(seconds, 1) for name, seconds in progress.seconds.items()}
    numbers["run"] = {
        "persona": persona.name,
        "model": run.base,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "version": __version__,
        "date": datetime.now(UTC).date().isoformat(),
        "settings": config.dump(),
    }
    product = {key: numbers["methods"][0][key] for key in ("kl", "nll_drop", "neutral_nll_drop")}
    bare = next((row for row in numbers["methods"] if row["name"] == MASK_ONLY), None)
    untouched = bare is None and config.ratio  # the product is the mask
    if bare is None:
        bare = product if config.ratio else dict.fromkeys(product, 0.0)  # a mask that keeps all costs nothing
    file = PersonaFile.of(
        model,
        persona.name,
        run.system,
        masks,
        run.base,
        ratio=config.ratio,
        greeting=persona.greeting(),
        metrics={"repaired": None if untouched else product, "mask": {key: bare[key] for key in product}},
    )
    result = SculptResult(file, slim, numbers, folder)
    if folder:
        work.forget("finished")
        _write(run, folder, result)
        work.write("finished", finished, numbers)
    return result
