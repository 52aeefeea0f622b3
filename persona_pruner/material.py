"""Stage 1 of a sculpt: from a persona to its held-out questions and to calibration examples in character.

Held-out questions are fixed first, and nothing that shares eight words with them is kept. Every step is stored under a
hash of its inputs.
"""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from persona_pruner import __version__, files, models, pace
from persona_pruner.config import SculptConfig
from persona_pruner.errors import InputError
from persona_pruner.generic import Generic
from persona_pruner.packing import Example
from persona_pruner.persona import Persona
from persona_pruner.progress import Progress
from persona_pruner.synthesis import answers as answering
from persona_pruner.synthesis import bank
from persona_pruner.synthesis.generate import generate
from persona_pruner.synthesis.overlap import HeldOut
from persona_pruner.synthesis.own import own_questions
from persona_pruner.synthesis.prompts import encode, examples, prompt_ids, stop_ids
from persona_pruner.synthesis.sensitivity import REFERENCES, sensitivity
from persona_pruner.workspace import Workspace

HELD_OUT_SEED = 20260614  # the test is the same for every seed of the search


@dataclass
class Run:
    """One sculpt in progress: its inputs, and where stages are stored."""

    model: nn.Module
    tokenizer: object
    persona: Persona
    base: str
    config: SculptConfig
    work: Workspace
    progress: Progress
    shared: str | Path | None = None
    system: str = ""
    root: str = field(default="", repr=False)
    generic: Generic = field(init=False, repr=False)
    sources: dict[str, list[bank.Question]] = field(init=False, repr=False)  # of the files that the settings name

    def __post_init__(self):
        self.begun = time.perf_counter()
        named = (*self.config.questions, self.config.eval_questions)
        self.sources = {name: bank.load_questions(name) for name in named if name}
        self.system = self.persona.system_prompt()
        weights = [p.flatten()[:16].float().tolist() for p in self.model.parameters()]
        base = [__version__, models.fingerprint(self.model), weights, str(self.model.dtype)]
        self.root = files.digest([*base, self.system])
        self.generic = Generic(self.model, self.tokenizer, files.digest(base), self.shared)

    def key(self, *parts) -> str:
        return files.digest([self.root, *parts])

    def settings(self, *names: str) -> dict:
        return {name: getattr(self.config, name) for name in names}

    def examples(self, questions, answers, in_character: bool = True) -> list[Example]:
        return examples(self.tokenizer, self.system if in_character else "", questions, answers)

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def most_sensitive(self, questions: list[str], stage: str) -> list[str]:
        """The questions, those that depend most on the persona first."""
        with self.progress.stage(stage, len(questions) * (1 + len(REFERENCES))) as step:
            found = sensitivity(self.model, self.tokenizer, self.system, questions, step, self.generic.references)
        return [questions[i] for i in found.argsort(descending=True, stable=True).tolist()]


def _held_out(run: Run) -> dict:
    """{"questions", "answers"}: the test, answered by the dense model once or in several rounds; made before anything
    else."""
    config = run.config
    published = run.persona.raw.get("questions") if run.persona.raw else None

    def make() -> dict:
        count = config.held_out_questions
        if config.eval_questions:
            questions = [question.text for question in run.sources[config.eval_questions]][:count]
        elif isinstance(published, list) and published:
            questions = [str(question) for question in published][:count]
        else:
            questions = run.most_sensitive(bank.bundled("heldout"), "held-out questions")[:count]
        prompts = [prompt_ids(run.tokenizer, run.system, question) for question in questions]
        found = []
        with run.progress.stage("held-out answers", len(prompts) * config.held_out_answers) as step:
            stops = stop_ids(run.model, run.tokenizer)
            count_done = lambda batch: step(len(batch))  # noqa: E731
            for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + config.held_out_answers):
                found += generate(run.model, prompts, stops, config.held_out_tokens, seed=seed, done=count_done)
        return {"questions": questions, "answers": found}

    given = published, run.sources.get(config.eval_questions)
    names = ("held_out_questions", "held_out_answers", "held_out_tokens", "eval_questions")
    key = run.key("held-out", run.settings(*names), given)
    return run.work.value("held_out", key, make)


def _questions(run: Run, held_out: HeldOut, before: str) -> dict:
    """{"own", "bank", "references"}: calibration questions by source, and the bank's reference answers."""
    config = run.config

    def make() -> dict:
        own = []
        if config.own_questions:
            with run.progress.stage("questions of its own", config.own_questions * 3 // 2) as step:
                own = own_questions(
                    run.model, run.tokenizer, run.system, config.own_questions, held_out, config.seed, step=step
                )
        pool = {question: "" for question in bank.bundled("search")}
        for source in config.questions:
            pool |= {question.text: question.answer for question in run.sources[source]}
        pool = {q: a for q, a in pool.items() if not held_out.touches(q) and not held_out.touches(a) and q not in own}
        drawn = random.Random(config.seed).sample(list(pool), min(len(pool), config.bank_candidates))
        if config.filter and config.bank_questions:
            drawn = run.most_sensitive(drawn, "persona-sensitive questions")
        kept = drawn[: config.bank_questions]
        if not own and not kept:
            raise InputError(
                "no calibration questions: own_questions and bank_questions are both 0, or nothing was found"
            )
        return {"own": own, "bank": kept, "references": [pool[question] for question in kept]}

    names = ("own_questions", "bank_questions", "bank_candidates", "filter", "questions", "seed")
    given = [run.sources[source] for source in config.questions]
    return run.work.value("questions", files.digest([before, run.settings(*names), given]), make)


def _answers(run: Run, questions: dict, before: str) -> list[list[int]]:
    """Token ids of an answer to each of own + bank; stored batch by batch."""
    config = run.config
    asked = [*questions["own"], *questions["bank"]]
    key = files.digest([before, asked, run.settings("answers", "answer_tokens", "in_character", "seed")])
    found: list[list[int]] = run.work.read("answers", key) or []
    if len(found) == len(asked):
        return found
    system = run.system if config.in_character else ""
    common = {"seed": config.seed + 1, "start": len(found)}
    with run.progress.stage("answers in character", len(asked)) as step:
        step(len(found))

        def done(batch: list[list[int]]) -> None:
            found.extend(batch)
            run.work.write("answers", key, found)
            step(len(batch))

        common["done"] = done
        if config.answers == "self":
            answering.self_distilled(run.model, run.tokenizer, system, asked, config.answer_tokens, **common)
        elif config.answers.startswith(("http://", "https://")):
            references = [""] * len(questions["own"]) + questions["references"]
            answering.from_endpoint(
                config.answers, run.tokenizer, system, asked, config.answer_tokens, references, **common
            )
        else:
            answering.from_model(config.answers, run.tokenizer, system, asked, config.answer_tokens, **common)
    return found


def _paced(run: Run) -> SculptConfig:
    """The settings with sizes that fit `minutes`; stored, so that a run that goes on has the same."""

    def make() -> int:
        prompt = len(encode(run.tokenizer, run.system))
        second = pace.second_per_token(run.model, run.generic.calibration[: pace.PASSAGES], run.config.seed)
        left = run.config.minutes * 60 - (time.perf_counter() - run.begun)
        eighths, takes = pace.fit(run.config, prompt, second, left)
        if eighths < pace.EIGHTHS or takes > left:
            share = f"{eighths}/{pace.EIGHTHS} of the questions and steps" if eighths < pace.EIGHTHS else "the rest"
            run.progress.note(f"{share} will take about {takes / 60:.1f} min of the {left / 60:.1f} that are left")
        return eighths

    return pace.scaled(run.config, run.work.value("pace", run.key(run.config.dump()), make))


def stage_one(run: Run) -> tuple[dict, list[Example]]:
    """The held-out questions with their answers, and the calibration examples, none of which shares eight words with
    them. With `minutes` the run's settings become those that fit."""
    held_out = _held_out(run)
    if run.config.minutes:
        run.config = _paced(run)
    guard = HeldOut([*held_out["questions"], *map(run.text, held_out["answers"])])
    questions = _questions(run, guard, run.key(held_out))
    answers = _answers(run, questions, run.key(held_out))
    pairs = zip([*questions["own"], *questions["bank"]], answers, strict=True)
    clean = [(question, answer) for question, answer in pairs if not guard.touches(run.text(answer))]
    if not clean:
        raise InputError("no calibration example is left: every answer shares eight words with held-out material")
    return held_out, run.examples(*map(list, zip(*clean, strict=True)), in_character=run.config.in_character)


@dataclass(frozen=True)
class Material:
    """Stage 1 of one persona: its prompt, held-out questions and the dense model's answers (token ids; as many rounds
    as `held_out_answers`), and the calibration examples of own and bank questions."""

    system: str
    questions: list[str]
    answers: list[list[int]]
    calibration: list[Example]


def prepare(
    model: nn.Module,
    tokenizer,
    persona: Persona,
    folder: str | Path | None = None,
    base: str | None = None,
    progress: Progress | None = None,
    **settings,
) -> Material:
    """Stage 1 of `sculpt` alone, with the same settings and the same stored stages (in `folder`)."""
    config = SculptConfig.of(**settings)
    work = Workspace(folder)
    run = Run(model, tokenizer, persona, models.base_name(model, base), config, work, progress or Progress())
    held_out, calibration = stage_one(run)
    return Material(run.system, held_out["questions"], held_out["answers"], calibration)
