"""sculpt() that goes on: what is missing, damaged, interrupted or changed is made again, and nothing else."""

import json
import shutil

import pytest
import torch
from limits import files_up_to
from sculpting import CHEAP, TEXT, Recorder, comparable, sculpt, snapshot, stage

from persona_pruner.errors import RunError
from persona_pruner.pipeline import SAVE_EVERY
from persona_pruner.synthesis.generate import BATCH
from persona_pruner.testing import tiny_examples, tiny_model

pytestmark = pytest.mark.usefixtures("short_texts")

IDS = torch.tensor([tiny_examples(1)[0].prompt])


@pytest.fixture(scope="module")
def base(tmp_path_factory, short_texts):
    """(result, folder, stages) of a sculpt by `BARE`; not to be changed."""
    folder, progress = tmp_path_factory.mktemp("base") / "run", Recorder()
    return sculpt(folder, progress=progress), folder, progress.stages


def test_what_is_missing_or_damaged_is_made_again(base, tmp_path):
    first, folder = base[0], shutil.copytree(base[1], tmp_path / "run")
    for name, stages in (
        ("report.html", set()),
        ("persona.persona.safetensors", set()),
        ("stages/search.safetensors", {"straight-through search"}),
        ("stages/answers.json", {"answers in character"}),
        ("stages/held_out.json", {"held-out answers"}),
    ):
        whole = (folder / name).read_bytes()
        for damage in (b"", whole[: len(whole) // 2]) if name.startswith("stages") else (None,):
            (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage)
            progress = Recorder()
            again = sculpt(folder, progress=progress)
            assert stages <= set(progress.stages) and (folder / name).exists()
            assert comparable(again.metrics) == comparable(json.loads(json.dumps(first.metrics)))
            assert "questions of its own" not in progress.stages and "channel scores (fisher)" not in progress.stages


STAGES = ("held_out.json", "questions.json", "answers.json", "scores.safetensors", "search.safetensors")


@pytest.mark.parametrize(
    "change, anew",
    [
        ({"ratio": 0.5}, "search"),
        ({"scope": "global"}, "search"),
        ({"steps": 4}, "search"),
        ({"start": "wanda"}, "scores search"),
        ({"answer_tokens": 9}, "answers scores search"),
        ({"seed": 1}, "questions answers scores search"),
        ({"bank_questions": 5}, "questions answers scores search"),
        ({"held_out_tokens": 9}, "held_out questions answers"),  # the answers come out the same, so the rest stands
        ({"held_out_answers": 2}, "held_out questions answers"),
        ({"persona": TEXT + " He hums."}, "held_out questions answers scores search"),
        ({"model": tiny_model(seed=1)}, "held_out questions answers scores search"),
        ({"ridge": 0.2}, ""),
        ({"repair": False}, ""),
    ],
)
def test_only_what_depends_on_a_setting_is_recomputed(base, tmp_path, change, anew):
    folder = tmp_path / "run"
    shutil.copytree(base[1], folder)
    before = snapshot(folder / "stages")
    result = sculpt(folder, **change)
    after = snapshot(folder / "stages")
    assert {name.split(".")[0] for name in STAGES if after[name] != before[name]} == set(anew.split())
    assert after["finished.json"] != before["finished.json"]
    if "held_out_answers" in change:
        once, twice = (stage(where, "held_out") for where in (base[1], folder))
        assert twice["questions"] == once["questions"] and twice["answers"][:4] == once["answers"]
        assert len(twice["answers"]) == 8 and twice["answers"][4:] != once["answers"]
    if "ratio" in change or "seed" in change:
        assert comparable(result.metrics) == comparable(sculpt(**change).metrics)


def test_files_of_questions_count_by_their_content(tmp_path):
    held_out, more, folder = tmp_path / "held.json", tmp_path / "more.json", tmp_path / "run"
    settings = {"eval_questions": str(held_out), "questions": (str(more),), "bank_questions": 500, "filter": False}
    settings |= {"bank_candidates": 500, "own_questions": 0, "answer_tokens": 1, **CHEAP}
    held_out.write_text(json.dumps(["Which hammer would you never lend to anyone?"]))
    more.write_text(json.dumps(["What rhymes with anvil in your village song?"]))
    sculpt(folder, **settings)
    assert stage(folder, "held_out")["questions"] == json.loads(held_out.read_text())
    assert json.loads(more.read_text())[0] in stage(folder, "questions")["bank"]
    more.write_text(json.dumps(["What do you hum while the iron cools?"]))
    sculpt(folder, progress=(progress := Recorder()), **settings)
    assert json.loads(more.read_text())[0] in stage(folder, "questions")["bank"]
    assert "held-out answers" not in progress.stages
    held_out.write_text(json.dumps(["Which tongs are the oldest in the forge?"]))
    result = sculpt(folder, **settings)
    assert stage(folder, "held_out")["questions"] == json.loads(held_out.read_text())
    assert result.metrics["dialogue"][0]["question"] == json.loads(held_out.read_text())[0]


def test_interrupted_in_every_stage(base, tmp_path):
    """The result is that of a run in one go, and a stage that was finished is not computed again."""
    want, _, stages = base
    folder, stored = tmp_path / "run", stages[: stages.index("repair, block by block")]
    for name in stages:
        progress = Recorder(stop=name)
        with pytest.raises(KeyboardInterrupt):
            sculpt(folder, progress=progress)
        assert progress.stages[-1] == name and len(progress.stages) <= 3  # what one artefact takes, and this one
        assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
        assert {path.name for path in folder.glob("*")} <= {"stages"}
    result = sculpt(folder, progress=(final := Recorder()))
    assert not set(final.stages) & set(stored)
    assert comparable(result.metrics) == comparable(want.metrics)
    assert torch.equal(result.model(IDS).logits, want.model(IDS).logits)


def test_interrupted_within_answers_and_within_the_search(tmp_path):
    settings = {"bank_questions": BATCH + 10, "bank_candidates": BATCH + 10, "filter": False, "steps": SAVE_EVERY + 4}
    want = sculpt(tmp_path / "one", **settings)
    folder = tmp_path / "two"
    with pytest.raises(KeyboardInterrupt):  # the first step tells how many are there already
        sculpt(folder, progress=Recorder("answers in character", 2), **settings)
    assert len(stage(folder, "answers")) == BATCH
    with pytest.raises(KeyboardInterrupt):
        sculpt(folder, progress=(progress := Recorder("straight-through search", SAVE_EVERY + 3)), **settings)
    assert progress.told["answers in character"][0] == BATCH
    got = sculpt(folder, progress=(progress := Recorder()), **settings)
    assert progress.told["straight-through search"][0] == SAVE_EVERY
    assert comparable(got.metrics) == comparable(want.metrics)


def test_a_full_disk(base, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(RunError, match=r"could not write .*slim: .*too large"), files_up_to(100_000):
        sculpt(folder)
    assert not (folder / "slim").exists() and not [p for p in folder.rglob("*") if p.name.startswith(".")]
    with pytest.raises(RunError, match=r"could not write .*held_out\.json"), files_up_to(200):
        sculpt(tmp_path / "other")
    assert not any(path.is_file() for path in (tmp_path / "other").rglob("*"))
    result = sculpt(folder, progress=(progress := Recorder()))
    assert "straight-through search" not in progress.stages and (folder / "slim" / "config.json").exists()
    assert comparable(result.metrics) == comparable(base[0].metrics)
