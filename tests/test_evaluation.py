"""`eval` against what the sculpt itself measured, and decode speeds."""

import json
import shutil

import pytest
import torch
from sculpting import HELD_OUT, QUICK, TEXT, Recorder, save_tiny

import persona_pruner as pp
from persona_pruner.errors import InputError
from persona_pruner.evaluation import speed
from persona_pruner.evaluation.character import evaluate_character
from persona_pruner.evaluation.metrics import text_nll
from persona_pruner.evaluation.speed import decode_speeds, fleet_speeds
from persona_pruner.fleet import Fleet
from persona_pruner.synthesis import bank
from persona_pruner.testing import tiny_examples, tiny_model, tiny_tokenizer
from persona_pruner.workspace import stored_held_out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base = save_tiny(folder / "base")
    model, tokenizer = pp.load_model(base, dtype="float32")
    settings = {**QUICK, "compare": False, "eval_questions": HELD_OUT, "held_out_answers": 2, "base": str(base)}
    return pp.sculpt(model, tokenizer, pp.Persona.from_text(TEXT), out=folder / "run", **settings), folder / "run"


def evaluate(path, **rest):
    return evaluate_character(path, dtype="float32", **rest)


def test_the_sculpts_own_numbers_come_out_again(made):
    result, run = made
    found, numbers = evaluate(run, progress=(progress := Recorder())), result.metrics
    row = numbers["methods"][0]
    assert found["dense_nll"] == pytest.approx(numbers["held_out"]["dense_nll"], rel=1e-4)
    for name in ("kl", "nll_drop", "neutral_nll_drop"):
        assert found[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5)
    assert (found["questions"], found["tokens"]) == (4, numbers["held_out"]["tokens"])
    assert found["persona"] == "Bram" and found["base"] == result.persona_file.base
    assert "dense answers" not in progress.stages and json.loads(json.dumps(found)) == found
    few, answers = evaluate(run, count=2), stored_held_out(run)["answers"]
    assert few["questions"] == 2 and few["tokens"] == sum(len(answers[i]) for i in (0, 1, 4, 5))


def test_a_persona_file_alone_is_the_mask_without_repair(made, tmp_path):
    result, run = made
    file = shutil.copy(run / "persona.persona.safetensors", tmp_path)
    found = evaluate(file, questions=HELD_OUT, progress=(progress := Recorder()))
    bare = next(row for row in result.metrics["methods"] if row["name"].endswith("mask only"))
    assert found["questions"] == 4 and "dense answers" in progress.stages
    assert found["neutral_nll_drop"] == pytest.approx(bare["neutral_nll_drop"], rel=1e-3, abs=1e-5)
    assert evaluate(file, count=3)["questions"] == 3  # the bundled ones
    assert evaluate(run / "persona.persona.safetensors")["kl"] == pytest.approx(bare["kl"], rel=1e-3)


def test_requests_that_cannot_be_met(made, tmp_path):
    _, run = made
    other = save_tiny(tmp_path / "other", family="qwen2")
    for path, rest, why in (
        (run / "slim", {}, "has no persona file"),
        (run, {"base": str(other)}, "does not fit"),
        (run, {"questions": "nowhere.json"}, "cannot read nowhere.json"),
        (run, {"count": 0}, "no held-out answers"),
        (tmp_path / "none", {}, "no such file or folder"),
    ):
        with pytest.raises(InputError, match=why):
            evaluate(path, **rest)


def test_the_neutral_text_is_measured_on_both(made):
    result, run = made
    texts = [pp.load_model(run / "slim")[1](text)["input_ids"] for text in bank.passages("neutral")]
    drop = text_nll(result.model, texts) - text_nll(tiny_model(), texts)
    assert evaluate(run, count=1)["neutral_nll_drop"] == pytest.approx(drop, rel=1e-3, abs=1e-5)


def test_decode_speeds_decode_what_they_say():
    models, lengths = [tiny_model(), tiny_model(num_hidden_layers=1)], []
    for model in models:
        run = model.generate
        model.generate = lambda *args, run=run, **kwargs: lengths.append(run(*args, **kwargs).shape[1])
    prompt = tiny_examples(1)[0].prompt
    speeds = decode_speeds(models, prompt, tokens=6, rounds=2)
    assert len(speeds) == 2 and all(speed > 0 for speed in speeds)
    warm, once = [1, 3], [1, 7]
    assert [length - len(prompt) for length in lengths] == [*warm, *warm, *once * 4]
    assert not torch.is_inference_mode_enabled()


def test_the_fleet_decodes_as_many(monkeypatch):
    models, counts, prompt = [tiny_model(), tiny_model(num_hidden_layers=1)], [], tiny_examples(1)[0].prompt
    step = Fleet.step
    monkeypatch.setattr(Fleet, "step", lambda fleet: [counts.append(len(events := step(fleet))), events][1])
    speeds = fleet_speeds(models, tiny_tokenizer(), prompt, tokens=6, rounds=2)
    assert len(speeds) == 2 and all(speed > 0 for speed in speeds)
    assert sum(counts) == 2 * 3 + 4 * 7
    monkeypatch.setattr(speed, "MOST_COPIED", 1000)
    with pytest.raises(InputError, match="copies of these models"):
        fleet_speeds(models, tiny_tokenizer(), prompt)
