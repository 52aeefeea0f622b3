"""analyse: studies that run on tiny models, and the quantities in them by hand."""

import json
import re
from dataclasses import replace

import pytest
import torch
from sculpting import QUICK, TEXT, Recorder, run, save_tiny

from persona_pruner.errors import InputError
from persona_pruner.evaluation import metrics
from persona_pruner.persona import Persona
from persona_pruner.search.masks import agreement
from persona_pruner.study import analyse as analysing
from persona_pruner.study.analyse import STUDIES, analyse, gap, rank_correlation, thin
from persona_pruner.study.compare import Study
from persona_pruner.study.own import made
from persona_pruner.synthesis.prompts import chat, encode, examples, render
from persona_pruner.testing import tiny_model, tiny_tokenizer

ASKED = ["Who taught you the forge?", "What would you never make for money?", "Which sound do you like best of all?"]
SETTINGS = {**QUICK, "own_questions": 6, "bank_questions": 4, "held_out_questions": 3}


def person(text, name):
    return replace(Persona.from_text(text, name), raw={"questions": ASKED})


PEOPLE = {
    "bram": person(TEXT + " He fears nothing. He likes rain.", "Bram"),
    "mara": person("Mara is a ship's cook who hates the sea. She counts everything twice.", "Mara"),
    "otto": person("Otto is a schoolboy who wants to fly. He draws engines.", "Otto"),
}


@pytest.fixture
def study(tmp_path):
    people = {name: PEOPLE[name] for name in ("bram", "mara")}
    return Study(tiny_model(), tiny_tokenizer(), people, tmp_path, "tiny", dict(SETTINGS), Recorder())


def kl(study, number, model):
    material = study.material(number, 0)
    found = examples(study.tokenizer, material.system, material.questions, material.answers)
    return metrics.fidelity(model, metrics.dense_reference(study.model, found)).kl


@pytest.mark.parametrize("name, method", [("cross", "persona-scores"), ("cross-masks", "persona-global-bias")])
def test_cross_table(study, name, method):
    study = replace(study, settings={**SETTINGS, "held_out_answers": 2}, materials={})
    found = STUDIES[name](study, 0.5, 1)
    searches = [study.search(0, 0), study.search(1, 0), study.shared(0)]
    assert [row[0] for row in found["rows"]] == [*study.names, "all together"]
    for search, row in zip(searches, found["rows"], strict=True):
        model = made(method, search, 0.5)
        assert row[1:] == [pytest.approx(kl(study, number, model)) for number in range(2)]
    *own, together = torch.tensor([row[1:] for row in found["rows"]])
    table = torch.stack(own)
    rows = sum(int(table[i].argmin()) == i for i in range(2))
    columns = sum(int(table[:, i].argmin()) == i for i in range(2))
    less = int((table.diagonal() < together).sum())
    assert f"least of its row {rows} times and least of its column {columns} times of 2" in found["about"]
    assert f"less than what the last row has there {less} times" in found["about"]
    column = [row[2] for row in found["rows"]]
    best = min(range(3), key=lambda i: (i == 1, column[i]))
    assert re.search(
        rf"[,:] {re.escape(f'{column[1] - column[best]:+.3f}')} ± [\d.]+ \(mara, {found['rows'][best][0]}\)",
        found["about"],
    )


def test_a_gap_and_its_standard_error():
    own, other = torch.tensor([[1.0, 2.0, 6.0], [2.0, 1.0, 2.0]])
    mean, error = gap(own, other, torch.tensor([0.25, 0.25, 0.5]))
    assert mean == -0.25 + 0.25 + 2.0 and error == pytest.approx((9 / 16 + 1 / 16 + 4 / 4) ** 0.5)
    even = torch.full((3,), 1 / 3)
    assert gap(own, other, even)[1] == pytest.approx((own - other).std().item() * (2 / 9) ** 0.5)


def test_seeds(study):
    found = STUDIES["seeds"](study, 0.5, 2)
    searches = [study.search(1, seed) for seed in (0, 1)]
    masks = [search.masks(search.even(0.5)) for search in searches]
    assert found["rows"][1] == ["mara, seeds 0 and 1", pytest.approx(agreement(*masks))]
    assert "agree by 0.333" in found["about"]  # half of half over three quarters


def test_pairs_and_similarity(study):
    study = replace(study, personas=PEOPLE, materials={})
    found = STUDIES["personas"](study, 0.5, 1)
    assert len(found["rows"]) == 3 and all(-1 <= row[1] <= 1 and 0 < row[2] <= 1 for row in found["rows"])
    expected = rank_correlation([row[1] for row in found["rows"]], [row[2] for row in found["rows"]])
    assert f"{expected:.2f}" in found["about"]
    states = analysing.description_states(study)
    ids = torch.tensor([encode(study.tokenizer, PEOPLE["mara"].description)])
    layers = analysing.middle_layers(3)
    hidden = study.model(ids, output_hidden_states=True).hidden_states[layers[len(layers) // 2]]
    torch.testing.assert_close(states[1], hidden[0, :].mean(0), rtol=1e-3, atol=1e-3)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 7, 5, 3]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert rank_correlation([1, 2], [1, 2]) is None


def test_a_conversation_holds_all_that_was_said(study):
    talk = analysing.conversation(study, study.material(0, 0), 4)
    system, said = study.material(0, 0).system, []
    for turn, example in enumerate(talk):
        said.append(ASKED[turn % 3])
        assert example.prompt == encode(study.tokenizer, render(study.tokenizer, chat(system, *said)))
        assert 0 < len(example.answer) <= analysing.TURN_TOKENS
        said.append(study.tokenizer.decode(example.answer, skip_special_tokens=True).strip())


def test_one_line_keeps_the_held_out_questions():
    small = thin(PEOPLE["bram"], ASKED)
    assert small.name == "Bram" and small.description == TEXT and small.raw["questions"] == ASKED


def test_all_studies(tmp_path, monkeypatch):
    monkeypatch.setattr(analysing, "TURNS", 3)
    monkeypatch.setattr(analysing, "SHARES", (1 / 2, 1))
    people = {name: PEOPLE[name] for name in ("bram", "mara")}
    progress = Recorder()
    arguments = (tiny_model(), tiny_tokenizer(), people, tmp_path)
    result = analyse(*arguments, ratio=0.5, base="tiny", progress=progress, **SETTINGS)
    assert list(result["studies"]) == list(STUDIES)
    for found in result["studies"].values():
        assert found["rows"] and all(len(row) == len(found["head"]) for row in found["rows"])
        assert found["plot"]["value"] in found["head"]
    sizes = [row[0] for row in result["studies"]["data"]["rows"]]
    assert sizes[0] * 2 in (sizes[1], sizes[1] + 1)
    names = [row[0] for row in result["studies"]["estimators"]["rows"]]
    assert names == ["scores alone", "straight-through", "gumbel", "soft-top-k"]
    page = (tmp_path / "analyse.html").read_text()
    assert page.count("<svg") == len(STUDIES)
    assert json.loads((tmp_path / "analyse.json").read_text())["studies"].keys() == STUDIES.keys()
    text = (tmp_path / "analyse.md").read_text()
    assert all(f"## {found['title']}" in text for found in result["studies"].values())
    monkeypatch.setattr(analysing, "STUDIES", dict.fromkeys(STUDIES))  # nothing is made again
    again = analyse(*arguments, ratio=0.5, base="tiny", **SETTINGS)
    assert again["studies"] == json.loads(json.dumps(result["studies"]))


def test_what_cannot_be_analysed(tmp_path):
    arguments = (tiny_model(), tiny_tokenizer(), {"bram": PEOPLE["bram"]}, tmp_path)
    with pytest.raises(InputError, match="study 'moon' is not one of seeds, personas"):
        analyse(*arguments, ["moon"])
    with pytest.raises(InputError, match="needs at least 2 personas, there are 1"):
        analyse(*arguments, ["cross"], **SETTINGS)
    with pytest.raises(InputError, match=r"ratio 1\.0"):
        analyse(*arguments, ratio=1.0)


def test_the_command(tmp_path):
    base = save_tiny(tmp_path / "base")
    (tmp_path / "bram.txt").write_text(TEXT)
    settings = [word for name, value in QUICK.items() for word in ("--set", f"{name}={value}")]
    arguments = ("analyse", "--model", base, "--personas", tmp_path / "bram.txt", "--out", tmp_path / "out")
    done = run(*arguments, "--studies", "seeds", "--ratio", 0.5, *settings)
    assert done.returncode == 0, done.stderr
    assert "Agreement of masks across seeds" in done.stdout and "bram, seeds 0 and 1" in done.stdout
