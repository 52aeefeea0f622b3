"""compare: the plan, cells that are never made twice, numbers by hand, and the fence around held-out material."""

import json
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
from sculpting import QUICK, TEXT, Recorder, run, save_tiny

from persona_pruner.cli import main
from persona_pruner.errors import InputError, RunError
from persona_pruner.evaluation import metrics
from persona_pruner.material import Material
from persona_pruner.packing import Example
from persona_pruner.search.baselines import BASELINES, prune
from persona_pruner.search.scores import Context
from persona_pruner.study import cells as making
from persona_pruner.study import measure, own
from persona_pruner.study.cells import Clock, Workers
from persona_pruner.study.compare import compare
from persona_pruner.study.fence import fenced, hashes
from persona_pruner.study.plan import GROUPS, builds, chosen_methods, load_personas
from persona_pruner.study.summary import headlines, kind_of, lines
from persona_pruner.synthesis.generate import generate
from persona_pruner.synthesis.prompts import encode, examples, prompt_ids
from persona_pruner.testing import tiny_model, tiny_tokenizer

ASKED = ["Who taught you the forge?", "What would you never make for money?", "Which sound do you like best of all?"]
OTHER = "Mara is a ship's cook who counts everything twice and hates the sea."


def questions(text, name, asked=ASKED):
    prompt = f"You are roleplaying as a user with this persona: {text}"
    return {"instruction": [{"pos": prompt, "neg": ""}], "questions": list(asked), "eval_prompt": "{question}{answer}"}


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "people"
    where.mkdir()
    for name, text in (("specific_a", TEXT), ("specific_b", OTHER)):
        (where / f"{name}.json").write_text(json.dumps(questions(text, name)))
    (where / "general_a.json").write_text(json.dumps(questions(TEXT, "a", ["What is two and two?"])))
    return where


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two passages, four quiz questions, short answers and two steps of recovery are enough to see what is measured."""
    from persona_pruner.synthesis import bank

    items, passages = bank.quiz()[:4], bank.passages
    monkeypatch.setattr(bank, "quiz", lambda: items)
    monkeypatch.setattr(bank, "passages", lambda split: passages(split)[:2])
    monkeypatch.setattr(measure, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(own, "RECOVERY_STEPS", 2)


def go(out, people, methods, **changes):
    options = {"ratios": [0.5], "base": "tiny", "bank_questions": 4, "own_questions": 6}
    progress = changes.pop("progress", Recorder())
    return compare(
        tiny_model(), tiny_tokenizer(), people, out, chosen_methods(methods), progress=progress,
        **{**QUICK, **options, **changes},
    )  # fmt: skip


def test_each_persona_once(folder):
    people = load_personas(folder)
    assert list(people) == ["specific_a", "specific_b"] and people["specific_a"].raw["questions"] == ASKED
    assert list(load_personas(folder, 1)) == ["specific_a"] and list(load_personas(folder / "general_a.json"))
    with pytest.raises(InputError, match="no personas at"):
        load_personas(folder / "none")
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="holds no card"):
        load_personas(folder / "empty")


def test_the_plan():
    assert chosen_methods(["wanda,own"])[0] == "wanda" and set(chosen_methods(["all"])) >= set(BASELINES)
    with pytest.raises(InputError, match="method 'luck' is not one of baselines, own"):
        chosen_methods(["luck"])
    made = builds(chosen_methods(["all"]), [0.25, 0.5], 2, 3)
    assert len(set(made)) == len(made)
    count = lambda **want: sum(all(getattr(b, k) == v for k, v in want.items()) for b in made)  # noqa: E731
    assert count(method="random") == 4 and count(method="magnitude") == 2  # by seed only where it matters
    assert count(method="wanda", calibration="generic") == 2 and count(method="wanda", calibration="persona") == 12
    assert count(method="persona") == 12 and count(method="shared") == 4
    assert count(method="sparsegpt-2:4") == 1 + 6 and count(method="persona-2:4") == 6
    assert {b.method for b in made if "2:4" in b.method and b.ratio != 0.5} == {"persona-slim-2:4"}
    assert not [b for b in builds(["shared"], [0.5], 1, 1)]
    some = builds(chosen_methods(["all"]), [0.25, 0.5], 2, 3, "generic")
    assert some == [b for b in made if b.calibration != "persona" or b.method not in BASELINES]
    assert {*GROUPS["baselines"]} == {name for name, method in BASELINES.items() if not method.two_four}


def test_every_method(folder, tmp_path):
    people = load_personas(folder)
    progress = Recorder()
    result = go(tmp_path / "out", people, ["all"], progress=progress)
    rows = {(line["method"], line["calibration"]): line for line in result["table"]}
    data = [name for name, method in BASELINES.items() if method.data]
    assert set(rows) == {
        *((name, "generic") for name in data), *((name, "persona") for name in data),
        *((name, "none") for name in ("random", "magnitude", "magnitude-2:4")),
        *((name, "persona") for name in (*own.OWN, *own.OWN_24)), ("shared", "shared"),
    }  # fmt: skip
    for line in rows.values():
        assert line["personas"] == 2 and line["kl"] > 0 and line["kl_sd"] is not None and 0 <= line["rouge_l"] <= 1
        assert line["seconds"] >= 0 and line["peak_bytes"] > 1e8 and line["parameters"] > 0
    channel = {rows[name, "persona"]["parameters"] for name in ("persona", "persona-mask", "wanda", "llm-pruner")}
    assert channel == {rows["magnitude", "none"]["parameters"]}
    assert all(rows[name, "persona"]["parameters"] <= max(channel) for name in ("persona-global", "persona-recovered"))
    assert {entry["kind"] for entry in result["headlines"]} == {"channels", "2:4", "2:4 of the FFN"}
    assert progress.notes[-1].startswith(f"[{len(rows) * 2 - len(data) - 4}/")  # generic, free and shared ones once
    out = tmp_path / "out"
    text = (out / "compare.md").read_text()
    assert "| persona-global | persona |" in text and "removes" in text and "## Methods" in text
    table = (out / "compare.csv").read_text().splitlines()
    assert len(table) == 1 + len(result["cells"]) and table[0].startswith("method,calibration,ratio,seed,persona,kl")
    assert json.loads((out / "compare.json").read_text())["table"] == result["table"]
    page = (out / "compare.html").read_text()
    assert page.count("<svg") == 2 and "http://" not in page.replace("http://www.w3.org", "")


def test_numbers_are_those_of_the_yardstick(folder, tmp_path):
    people = load_personas(folder, 1)
    result = go(tmp_path / "out", people, ["magnitude"])
    (cell,) = result["cells"]
    model, tokenizer = tiny_model(), tiny_tokenizer()
    system = people["specific_a"].system_prompt()
    prompts = [prompt_ids(tokenizer, system, question) for question in ASKED]
    answers = generate(model, prompts, {2}, QUICK["held_out_tokens"], seed=20260614)
    reference = metrics.dense_reference(model, examples(tokenizer, system, ASKED, answers))
    pruned = prune("magnitude", Context(model), 0.5)
    found = metrics.fidelity(pruned, reference)
    assert cell["kl"] == pytest.approx(found.kl) and cell["nll_drop"] == pytest.approx(found.nll_drop)
    said = generate(pruned, prompts, {2}, measure.ANSWER_TOKENS, temperature=0.0)
    assert cell["answers"] == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
    from persona_pruner.synthesis import bank

    texts = [encode(tokenizer, text) for text in bank.passages("neutral")]
    drop = metrics.text_nll(pruned, texts) - metrics.text_nll(model, texts)
    assert cell["neutral_nll_drop"] == pytest.approx(drop, abs=1e-6)
    assert result["dense"]["nll"] == [pytest.approx(reference.nll)]


def test_a_stopped_run_goes_on(folder, tmp_path):
    people = load_personas(folder)
    methods = ["magnitude,wanda,persona-mask,shared"]

    class Stopping(Recorder):
        def note(self, text):
            super().note(text)
            if text.startswith("[4/"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "out", people, methods, progress=Stopping())
    assert not (tmp_path / "out" / "compare.json").exists()
    stored = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "cells").iterdir()}
    progress = Recorder()
    result = go(tmp_path / "out", people, methods, progress=progress)
    assert "4 of 7 models are known already" in progress.notes and progress.notes[-1].startswith("[3/3]")
    assert all((tmp_path / "out" / "cells" / name).stat().st_mtime_ns == when for name, when in stored.items()
               if not name.startswith("dense"))  # fmt: skip
    whole = go(tmp_path / "whole", people, methods)
    keys = ("kl", "nll_drop", "rouge_l", "quiz", "answers")
    assert [{k: c[k] for k in keys} for c in result["cells"]] == [{k: c[k] for k in keys} for c in whole["cells"]]
    again = Recorder()
    go(tmp_path / "out", people, methods, progress=again)
    assert not [note for note in again.notes if note.startswith("[")]
    other = Recorder()  # another setting of the search makes what depends on it anew, baselines do not
    go(tmp_path / "out", people, methods, progress=other, steps=2)
    assert sum(note.startswith("[") for note in other.notes) == 3


def test_workers_make_the_same_cells(folder, tmp_path):
    people, methods = load_personas(folder), ["magnitude,persona-mask,persona-scores"]
    base, progress = save_tiny(tmp_path / "base"), Recorder()
    workers = Workers(2, (str(base), "cpu", "float32"))
    result = go(tmp_path / "out", people, methods, progress=progress, workers=workers)
    assert sorted(note[1] for note in progress.notes if note.startswith("[")) == list("12345")
    assert (result["run"]["workers"], result["run"]["threads"]) == (2, workers.threads)
    assert "2 processes of" in (tmp_path / "out" / "compare.md").read_text()
    alone = go(tmp_path / "alone", people, methods)
    assert [c["method"] for c in result["cells"]] == [c["method"] for c in alone["cells"]]
    for one, other in zip(result["cells"], alone["cells"], strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-4)
    again = Recorder()
    go(tmp_path / "out", people, methods, progress=again)
    assert not any(note.startswith("[") for note in again.notes)


def test_a_worker_that_fails(folder, tmp_path):
    people = load_personas(folder, 1)
    workers = Workers(2, (str(tmp_path / "none"), "cpu", "float32"))
    with pytest.raises(RunError, match="1 of 1 models were not made; magnitude"):
        go(tmp_path / "out", people, ["magnitude"], workers=workers)


def test_the_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(making.time, "perf_counter", lambda: now[0])
    clock, now[0] = Clock(4), 120.0
    line = clock.line("wanda", 1.0)
    assert line.startswith("[1/4] wanda") and "KL  1.000" in line and "2.0 min, about 6 left" in line
    now[0] = 180.0
    assert "about 3 left" in clock.line("flap", 1.0)


def test_lines_and_headlines_by_hand():
    base = {"ratio": 0.5, "neutral_nll_drop": 1.0, "rouge_l": 0.2, "quiz": 0.5, "parameters": 10, "seconds": 1.0}
    base |= {"peak_bytes": 5, "nll_drop": 2.0}

    def cell(method, calibration, persona, seed, kl):
        return {**base, "method": method, "calibration": calibration, "persona": persona, "seed": seed, "kl": kl}

    cells = [
        cell("wanda", "generic", "a", 0, 1.0), cell("wanda", "generic", "b", 0, 3.0),
        cell("wanda", "persona", "a", 0, 0.1), cell("wanda", "persona", "b", 0, 0.1),
        cell("flap", "generic", "a", 0, 4.0), cell("flap", "generic", "b", 0, 4.0),
        cell("persona", "persona", "a", 0, 0.2), cell("persona", "persona", "a", 1, 0.4),
        cell("persona", "persona", "b", 0, 0.5),
    ]  # fmt: skip
    table = lines(cells)
    by_name = {(line["method"], line["calibration"]): line for line in table}
    mean = by_name["persona", "persona"]
    assert mean["kl"] == pytest.approx((0.3 + 0.5) / 2) and mean["seeds"] == 2  # seeds first, then personas
    assert mean["kl_range"] == [pytest.approx(0.3), 0.5] and mean["kl_sd"] == pytest.approx(0.2 / 2**0.5)
    (found,) = headlines(table)
    assert found["baseline"] == "wanda" and found["kl"] == 2.0  # generic calibration, though persona data are better
    assert found["own"] == {
        "persona": {"kl_removed": pytest.approx(0.8), "nll_removed": 0.0, "neutral_difference": 0.0}
    }
    kinds = [kind_of(name) for name in ("wanda", "sparsegpt-2:4", "persona-2:4-ffn", "shared")]
    assert kinds == ["channels", "2:4", "2:4 of the FFN", "channels"]


def test_held_out_material_never_reaches_a_method(folder, tmp_path, monkeypatch):
    """By content: everything that scores, search, repair and recovery are handed is decoded and looked through for
    held-out questions and answers."""
    seen: list[list[int]] = []
    people = load_personas(folder)

    def watch(module, name, rows):
        inner = getattr(module, name)

        def watched(*args, **kwargs):
            seen.extend(rows(args))
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    def of_packs(packs):
        return [batch.input_ids.tolist() for batch in packs]

    def of_examples(found):
        return [example.prompt + example.answer for example in found]

    watch(making, "prune", lambda args: of_packs(args[1].packs))
    watch(own, "channel_scores", lambda args: of_packs(args[1].packs))
    watch(own, "repair_", lambda args: of_packs(args[2]))
    watch(own.ste, "search", lambda args: of_examples(args[1]))
    watch(own.recovery, "lora_", lambda args: of_examples(args[2]))
    watch(own.recovery, "distill_", lambda args: of_examples(args[2]))
    result = go(tmp_path / "out", people, ["wanda,persona,persona-recovered,persona-2:4,shared"], recovery="lora")
    tokenizer = tiny_tokenizer()
    assert len(seen) > 20
    held = json.loads((tmp_path / "out" / "stages" / "specific_a-0" / "held_out.json").read_text())["value"]
    texts = [tokenizer.decode(ids) for ids in seen]
    assert any("Bram" in text for text in texts) and any("Mara" in text for text in texts)
    for question in ASKED:
        assert not [text for text in texts if f"user\n{question}<" in text]
    answers = {tuple(ids) for ids in held["answers"] if len(ids) > 4}
    runs = {tuple(ids[i : i + len(a)]) for a in answers for ids in seen for i in range(len(ids) - len(a) + 1)}
    assert answers and answers.isdisjoint(runs)
    closed = hashes([prompt_ids(tokenizer, people[n].system_prompt(), q) for n in people for q in ASKED], answers)
    assert closed.isdisjoint(hashes(seen, seen)) and result["cells"]


def test_the_fence_refuses():
    tokenizer = tiny_tokenizer()
    fine = [Example(prompt_ids(tokenizer, "sys", "Who?"), [5, 6])]
    material = Material("sys", ["Why?"], [[7, 8, 2]], fine)
    assert fenced(tokenizer, material) == fine
    for bad in (
        Example(prompt_ids(tokenizer, "sys", "Why?"), [5]),
        Example(prompt_ids(tokenizer, "", "Why?"), [5]),
        Example(prompt_ids(tokenizer, "sys", "How?"), [7, 8, 2]),
    ):
        with pytest.raises(RunError, match="is held-out material"):
            fenced(tokenizer, replace(material, calibration=[*fine, bad]))


def test_cost():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the mark of the memory's peak cannot be reset here: {error}")
    with measure.cost() as spent:
        held = mmap.mmap(-1, 160 << 20)  # new pages; a tensor may lie in memory that earlier tests have freed
        held[::4096] = b"1" * (len(held) // 4096)
        held.close()
    with measure.cost() as after:
        pass
    assert spent.seconds > 0 and spent.bytes - after.bytes > 100e6
    assert "cores" in measure.machine()


def test_what_cannot_be_compared(folder, tmp_path):
    people = load_personas(folder)
    for changes, word in (
        ({"ratios": [1.5]}, "ratio 1.5"), ({"seeds": 0}, "at least one persona"), ({"ratios": []}, "at least one"),
        ({"colour": 1}, "setting colour"), ({"steps": -1}, "setting steps"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=word):
            go(tmp_path / "out", people, ["magnitude"], **changes)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        go(tmp_path / "file", people, ["magnitude"])


def test_the_command(folder, tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    settings = [word for name, value in QUICK.items() for word in ("--set", f"{name}={value}")]
    arguments = ("compare", "--model", base, "--personas", folder, "--count", 1, "--out", tmp_path / "out")
    done = run(*arguments, "--methods", "magnitude,persona-mask", "--ratios", 0.25, 0.5, "--json", *settings)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {(line["method"], line["ratio"]) for line in found["table"]} == {
        (method, ratio) for method in ("magnitude", "persona-mask") for ratio in (0.25, 0.5)
    }
    assert "[4/4] persona-mask" in done.stderr
    for wrong, word in (
        (["--methods", "luck"], "method 'luck' is not one of"),
        (["--ratios", "half"], "--ratios half is not a list of numbers"),
        (["--set", "steps"], "--set steps is not of the form"),
        (["--calibration", "own"], "calibration 'own' is neither both nor generic"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*map(str, arguments), *wrong])
        assert caught.value.code == 2 and word in capsys.readouterr().err
