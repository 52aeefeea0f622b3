"""Many sculpts: each folder is that of a plain sculpt, what is common is computed once, and what is done is skipped."""

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from jobs import ShortJob, every
from safetensors import safe_open
from sculpting import HELD_OUT, QUICK, QUICK_ARGUMENTS, command, comparable, environment, save_tiny, snapshot

import persona_pruner as pp
from persona_pruner import executors, files, generic, many, models
from persona_pruner.errors import InputError
from persona_pruner.many import cards_in, sculpt_many, totals
from persona_pruner.synthesis import bank
from persona_pruner.synthesis.sensitivity import REFERENCES
from persona_pruner.testing import tiny_model, tiny_tokenizer

TEXTS = {
    "bram": "Bram is a gruff blacksmith of few words who distrusts mages and talks of iron.",
    "lyra": "Lyra is a star pilot, quick and cheerful, who sings to her ship's engine at night.",
}
SETTINGS = {**QUICK, "compare": False, "eval_questions": HELD_OUT}
FILES = ("persona.persona.safetensors", "slim/model.safetensors")


def same_results(one: Path, two: Path) -> bool:
    """Equal in every tensor and header; the order within a safetensors header is not fixed."""
    for name in FILES:
        with safe_open(one / name, "pt") as a, safe_open(two / name, "pt") as b:
            assert a.metadata() == b.metadata() and set(a.keys()) == set(b.keys())
            if not all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys()):  # noqa: SIM118
                return False
    return True


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "notes.pdf").write_text("no card")
    return folder


@pytest.fixture(scope="module")
def plain(base, cards, tmp_path_factory):
    """Output folders of plain sculpts of the cards, with three neutral passages."""
    out = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank, "passages", lambda split: every(split)[:3])
        for card in cards_in(cards):
            model, tokenizer = models.load_model(base, dtype="float32")
            pp.sculpt(model, tokenizer, pp.Persona.load(card), out=out / card.stem, base=str(base), **SETTINGS)
    return out


@pytest.fixture
def local_ray(monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    assert not ray.is_initialized()


class Watch(executors.Watch):
    def __init__(self):
        self.heard = []

    def said(self, index, text):
        self.heard.append((index, text))


@pytest.mark.parametrize("engine", ["serial", "ray"])  # processes: test_ctrl_c_and_resume
def test_every_folder_is_that_of_a_plain_sculpt(engine, base, cards, plain, tmp_path, request, monkeypatch):
    monkeypatch.setattr(many, "Job", ShortJob)
    if engine == "ray":
        request.getfixturevalue("local_ray")
    out, watch = tmp_path / "out", Watch()
    options = {"model": str(base), "dtype": "float32", "threads": 1, "watch": watch}
    rows = sculpt_many(cards_in(cards), out, engine=engine, workers=2, **options, **SETTINGS)
    assert [row.get("error") for row in rows] == [None, None]
    assert [(row["name"], row["status"], row["attempts"]) for row in rows] == [("bram", "done", 1), ("lyra", "done", 1)]
    assert {path.name for path in out.iterdir()} == {"bram", "lyra", "shared", "summary.csv", "index.html"}
    for row in rows:
        mine, other = out / row["folder"], plain / row["name"]
        assert set(snapshot(mine)) == set(snapshot(other))
        assert same_results(mine, other)
        numbers, wanted = (json.loads((folder / "metrics.json").read_text()) for folder in (mine, other))
        assert comparable(numbers) == comparable(wanted)
        assert row["kl"] == numbers["methods"][0]["kl"] and row["bytes"] == (mine / FILES[0]).stat().st_size
    assert {text for _, text in watch.heard} > {"straight-through search", "opening the base model"}

    before = snapshot(out)
    again = sculpt_many(cards_in(cards), out, engine=engine, workers=2, **options, **SETTINGS)
    assert again == rows
    after = snapshot(out)
    assert {name for name in before if before[name] != after[name]} == {"summary.csv", "index.html"}


def test_what_is_common_is_computed_once(tmp_path, monkeypatch):
    counts = dict.fromkeys(("scores", "nll", "references"), 0)

    def counted(name, function):
        def call(*arguments, **named):
            counts[name] += 1
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(generic, "channel_scores", counted("scores", generic.channel_scores))
    monkeypatch.setattr(generic.metrics, "text_nll", counted("nll", generic.metrics.text_nll))
    monkeypatch.setattr(generic, "reference_directions", counted("references", generic.reference_directions))
    monkeypatch.setattr(bank, "passages", lambda split, every=bank.passages: every(split)[:2])
    seen = []
    for name, text in TEXTS.items():
        before = dict(counts)
        pp.sculpt(
            tiny_model(), tiny_tokenizer(), pp.Persona.from_text(text), out=tmp_path / name, base="tiny",
            shared=tmp_path / "shared", **{**SETTINGS, "compare": True, "eval_questions": None},
        )  # fmt: skip
        seen.append({key: counts[key] - before[key] for key in counts})
    assert seen[0] == {"scores": 4, "nll": 4 + 3, "references": 2}  # scores of three baselines and of neutral prose
    assert seen[1] == {"scores": 0, "nll": 3, "references": 0}
    monkeypatch.undo()
    monkeypatch.setattr(bank, "passages", lambda split, every=bank.passages: every(split)[:2])
    own = pp.sculpt(
        tiny_model(), tiny_tokenizer(), pp.Persona.from_text(TEXTS["lyra"]), out=tmp_path / "own", base="tiny",
        **{**SETTINGS, "compare": True, "eval_questions": None},
    )  # fmt: skip
    shared = json.loads((tmp_path / "lyra" / "metrics.json").read_text())
    assert comparable(shared) == comparable(json.loads(json.dumps(own.metrics)))


def test_shared_statistics_belong_to_their_base_and_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(bank, "passages", lambda split, every=bank.passages: every(split)[:2])
    told = []

    def of(root, seed=0, model_seed=0):
        return generic.Generic(tiny_model(seed=model_seed), tiny_tokenizer(), root, tmp_path)

    first = of("a").neutral_nll()
    assert of("b", model_seed=1).neutral_nll() != first == of("a", model_seed=1).neutral_nll()  # the root decides
    masks, nll = of("a").baseline("wanda", 0.25, 0)
    assert of("a").baseline("wanda", 0.5, 0)[1] != nll == of("a").baseline("wanda", 0.25, 0)[1]
    assert [int(mask.sum()) for mask in masks] == [48] * 3
    one, two, three = (
        of("a").references(q, told.append) for q in (["Who?", "Why?"], ["Why?", "Who?"], ["Who?", "Why?"])
    )
    torch.testing.assert_close(one, two.flip(0))
    assert torch.equal(one, three) and sum(told) == 3 * 2 * len(REFERENCES)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"damaged")
    assert of("a").baseline("wanda", 0.25, 0)[1] == nll


def test_failures_are_rows(base, cards, tmp_path, call, monkeypatch):
    monkeypatch.setattr(many, "Job", ShortJob)
    folder, out = shutil.copytree(cards, tmp_path / "cards"), tmp_path / "out"
    (folder / "bad <b>.json").write_text("{")
    (folder / "=word.txt").write_text("Blacksmith")
    arguments = ["--cards", folder, "--model", base, "--out", out, "--dtype", "float32", "--threads", 1]
    arguments += [*QUICK_ARGUMENTS, "--eval-questions", HELD_OUT, "--no-compare", "--json"]
    code, said, errors = call("sculpt", *arguments)
    assert code == 1 and "Traceback" not in errors
    assert "persona-pruner: 2 of 4 characters failed; the first: =word: " in errors.splitlines()[-1]
    found = json.loads(said)
    assert [row["status"] for row in found["characters"]] == ["failed", "failed", "done", "done"]
    assert found["failed"] == 2 == found["done"] and found["characters"][0]["attempts"] == 1
    rows = list(csv.DictReader((out / "summary.csv").open()))
    assert [row["name"] for row in rows] == ["'=word", "bad <b>", "bram", "lyra"] and "not valid" in rows[1]["error"]
    assert float(rows[2]["kl"]) == found["characters"][2]["kl"] and rows[2]["kl_removed"] == ""
    page = (out / "index.html").read_text()
    assert "bad &lt;b&gt;" in page and "<b>" not in page and 'href="bram/report.html"' in page
    assert not [word for word in ("<script", "<link", 'src="', "url(", "@import") if word in page]
    (folder / "bad <b>.json").unlink()
    (folder / "=word.txt").write_text("A blacksmith of few words.")
    before = snapshot(out / "bram")
    code, said, errors = call("sculpt", *arguments)
    assert code == 0 and [line.split()[0] for line in errors.splitlines()] == ["=word"]
    assert snapshot(out / "bram") == before and totals(json.loads(said)["characters"])["done"] == 3


def test_ctrl_c_and_resume(base, cards, plain, tmp_path, call):
    """A real signal to the command and its workers; the same command goes on and ends where plain sculpts do."""
    out = tmp_path / "out"
    words = ["sculpt", "--cards", cards, "--model", base, "--out", out, "--dtype", "float32", "--threads", 1]
    words += [*QUICK_ARGUMENTS, "--eval-questions", HELD_OUT, "--no-compare", "--engine", "process", "--workers", 2]
    heard = ["env", "--default-signal=INT", *command(*words)]
    with subprocess.Popen(heard, stdout=-1, stderr=-1, text=True, env=environment(), start_new_session=True) as process:
        until = time.monotonic() + 120
        while not list(out.glob("*/stages/questions.json")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and said == "" and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("persona-pruner: interrupted; the same command goes on")
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    assert "waiting" in (out / "index.html").read_text()
    code, said, errors = call(*words)
    assert code == 0 and said.startswith("2 of 2 characters are done, median KL "), errors
    for name in TEXTS:
        masks, wanted = (pp.PersonaFile.load(folder / name).masks for folder in (out, plain))
        assert all(torch.equal(*pair) for pair in zip(masks, wanted, strict=True))


def test_a_base_of_another_dtype_is_converted_once(base, tmp_path):
    assert many._base(str(base), "cpu", "float32", 0.5, tmp_path) == str(base)
    assert many._base(str(base), "cpu", "bfloat16", 0.5, None) == str(base) and not list(tmp_path.iterdir())
    where = many._base(str(base), "cpu", "bfloat16", 0.5, tmp_path)
    before = snapshot(Path(where))
    assert where != str(base) and many._base(str(base), "cpu", "bfloat16", 0.5, tmp_path) == where
    assert snapshot(Path(where)) == before and files.read_json(Path(where) / "config.json")["dtype"] == "bfloat16"
    mapped, converted = (models.load_model(path, dtype="bfloat16")[0].state_dict() for path in (where, base))
    assert all(torch.equal(mapped[name], value) for name, value in converted.items())


def test_cards(tmp_path):
    with pytest.raises(InputError, match="no folder of cards"):
        cards_in(tmp_path / "none")
    with pytest.raises(InputError, match="holds no character card"):
        cards_in(tmp_path)
    for name in ("b.json", "a.txt", "c.png"):
        (tmp_path / name).write_text("")
    assert [path.name for path in cards_in(tmp_path)] == ["a.txt", "b.json", "c.png"]
    (tmp_path / "A.json").write_text("")
    with pytest.raises(InputError, match=r"both A.json and a.txt would be written to the folder a"):
        cards_in(tmp_path)
    (tmp_path / "A.json").rename(tmp_path / "shared.json")
    with pytest.raises(InputError, match=r"shared.json would be written to the folder shared: rename"):
        cards_in(tmp_path)


@pytest.mark.parametrize(
    "arguments, why",
    [
        ([], "either --persona or --cards"),
        (["--persona", "A smith of iron", "--cards", "."], "either --persona or --cards"),
        (["--persona", "A smith of iron", "--engine", "ray"], "belong to --cards"),
        (["--cards", "CARDS", "--engine", "slurm"], "engine 'slurm' is not one of serial, process, ray"),
        (["--cards", "nowhere"], "no folder of cards nowhere"),
        (["--cards", "CARDS", "--ratio", "2"], "setting ratio"),
        (["--cards", "CARDS", "--model", "./nowhere"], "no model folder ./nowhere"),
        (["--cards", "CARDS", "--model", "./nowhere", "--engine", "process"], "no model folder ./nowhere"),
    ],
)
def test_bad_requests(cards, tmp_path, call, arguments, why):
    words = [cards if word == "CARDS" else word for word in arguments]
    code, said, errors = call("sculpt", "--out", tmp_path / "out", *words)
    assert code == 2 and said == "" and len(errors.splitlines()) == 1 and why in errors
    assert not (tmp_path / "out").exists()
