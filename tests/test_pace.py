"""Sizes that fit a time: what is made smaller, and that a run which goes on keeps them."""

import pytest
import yaml
from sculpting import HELD_OUT, QUICK, TEXT, Recorder, comparable

import persona_pruner as pp
from persona_pruner import pace
from persona_pruner.errors import InputError
from persona_pruner.study.compare import compare
from persona_pruner.testing import tiny_model, tiny_tokenizer

SETTINGS = {**QUICK, "compare": False, "eval_questions": HELD_OUT, "score_examples": 5}


def sculpt(out, progress=None, **settings):
    persona = pp.Persona.from_text(TEXT)
    return pp.sculpt(tiny_model(), tiny_tokenizer(), persona, out=out, progress=progress, **SETTINGS, **settings)


def written(folder):
    return yaml.safe_load((folder / "run.yaml").read_text())["settings"]


def test_what_is_made_smaller():
    config = pp.SculptConfig(minutes=1, bank_questions=0)
    small = pace.scaled(config, 1)
    assert [getattr(small, name) for name in pace.SCALED] == [24, 0, 16, 24, 2, 0, 4, 4] and small.minutes is None
    assert pace.scaled(config, pace.EIGHTHS) == config.model_copy(update={"minutes": None})
    least = pace.scaled(config.model_copy(update={"steps": 1, "own_questions": 3, "neutral_texts": 2}), 1)
    assert (least.steps, least.own_questions, least.neutral_texts) == (1, 1, 2)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"repair": False},
        {"steps": 0},
        {"ratio": 0, "format": "packed"},
        {"recovery_steps": 8},
        {"neutral_examples": 0},
    ],
)
def test_more_takes_longer(change):
    config = pp.SculptConfig(**change)
    costs = [pace.tokens(pace.scaled(config, eighths), 380) for eighths in range(1, pace.EIGHTHS + 1)]
    assert costs == sorted(set(costs)) and pace.tokens(config, 900) > costs[-1] > pace.COMPARED
    assert pace.tokens(config.model_copy(update={"compare": False}), 380) < costs[-1]


def test_as_much_as_fits():
    config, second = pp.SculptConfig(), 0.005
    for eighths in range(1, pace.EIGHTHS + 1):
        takes = pace.tokens(pace.scaled(config, eighths), 380) * second
        assert pace.fit(config, 380, second, takes) == (eighths, takes)
        if eighths > 1:
            assert pace.fit(config, 380, second, takes * 0.999)[0] == eighths - 1
    assert pace.fit(config, 380, second, 0)[0] == 1 and pace.fit(config, 380, second, 1e9)[0] == pace.EIGHTHS


def test_a_short_run_goes_on_with_its_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "second_per_token", lambda *_: 1.0)
    first = Recorder()
    result = sculpt(tmp_path / "run", first, minutes=5)
    found = written(tmp_path / "run")
    assert [found[name] for name in pace.SCALED] == [1, 1, 2, 1, 1, 0, 4, 2] and found["minutes"] is None
    assert result.metrics["search"]["examples"] <= 2
    assert [note for note in first.notes if note.startswith("1/8 of the questions and steps will take about ")]
    monkeypatch.setattr(pace, "second_per_token", lambda *_: pytest.fail("measured again"))
    again = Recorder()
    assert comparable(sculpt(tmp_path / "run", again, minutes=5).metrics) == comparable(result.metrics)
    assert not again.stages and "is complete for these settings" in again.notes[-1]


def test_enough_time_changes_nothing(tmp_path):
    progress = Recorder()
    timed = sculpt(tmp_path / "timed", progress, minutes=600)
    assert comparable(timed.metrics) == comparable(sculpt(None).metrics) and not progress.notes


def test_refused(tmp_path):
    with pytest.raises(InputError, match=r"setting minutes: .*greater than 0"):
        sculpt(None, minutes=0)
    personas = {"bram": pp.Persona.from_text(TEXT)}
    with pytest.raises(InputError, match="minutes is a setting of sculpt"):
        compare(tiny_model(), tiny_tokenizer(), personas, tmp_path / "study", ["magnitude"], minutes=5)
