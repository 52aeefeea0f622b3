"""sculpt() end to end on tiny random models: artefacts, numbers, formats, and what is kept apart."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from sculpting import BARE, CHEAP, QUICK, TEXT, Recorder, environment, save_tiny, sculpt, snapshot, stage

import persona_pruner as pp
from persona_pruner import models, pipeline
from persona_pruner.errors import InputError
from persona_pruner.nn import masked, slim_copy
from persona_pruner.nn.sparse import packed_layers
from persona_pruner.search.repair import repair_
from persona_pruner.synthesis import bank
from persona_pruner.synthesis.prompts import encode
from persona_pruner.testing import FAMILIES, tiny_examples, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("short_texts")

WHOLE = {"compare": True, "eval_questions": None, "base": "tiny"}
IDS = torch.tensor([tiny_examples(1)[0].prompt])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, short_texts):
    """(result, folder, recorder) of a sculpt with everything on; not to be changed."""
    folder, progress = tmp_path_factory.mktemp("whole") / "run", Recorder()
    return sculpt(folder, **WHOLE, progress=progress), folder, progress


def test_artefacts(whole):
    result, folder, progress = whole
    assert {path.name for path in folder.iterdir()} == {
        "persona.persona.safetensors", "slim", "run.yaml", "metrics.json", "report.html", "README.md", "stages",
    }  # fmt: skip
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.rglob("*") if path.is_file())
    persona = folder / "persona.persona.safetensors"
    assert persona.stat().st_size < 32_768 and pp.PersonaFile.load(persona).widths == [48] * 3
    assert result.persona_file.system == pp.Persona.from_text(TEXT).system_prompt()
    written = yaml.safe_load((folder / "run.yaml").read_text())
    assert written["settings"] == pp.SculptConfig(**QUICK).dump() and written["model"] == "tiny"
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(result.metrics))
    page = (folder / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>") and "<svg" in page and result.metrics["run"]["persona"] in page
    assert not [word for word in ("<script src", "<link", 'src="http', "url(http", "@import") if word in page]
    for card in (folder / "README.md", folder / "slim" / "README.md"):
        assert "persona-pruner" in card.read_text()
    assert len(progress.seconds) >= 11 and set(result.metrics["seconds"]) <= set(progress.seconds)


def test_numbers(whole):
    result, folder, _ = whole
    numbers = result.metrics
    names = [row["name"] for row in numbers["methods"]]
    assert names[0] == "persona-pruner" and {"magnitude", "wanda", "taylor"} < set(names) and len(names) == 6
    assert all(row["kl"] > 0 and sum(row["kept"]) == 3 * 48 for row in numbers["methods"])
    assert numbers["ffn_bytes"]["pruned"] == sum(
        p.numel() * 4 for mlp in models.gated_mlps(result.model) for p in mlp.parameters()
    )
    assert numbers["headline"]["kl_removed"] == 1 - numbers["methods"][0]["kl"] / min(
        row["kl"] for row in numbers["methods"] if row["name"] in ("magnitude", "wanda", "taylor")
    )
    for engine in ("tokens_per_second", "fleet_tokens_per_second"):
        assert min(numbers[engine][name] for name in ("dense", "pruned")) > 0
    assert len(numbers["dialogue"]) == 3 and len(numbers["search"]["losses"]) == 3
    assert numbers["held_out"]["questions"] == 4 == len(stage(folder, "held_out")["answers"])


def test_the_slim_checkpoint_needs_no_plug_in(whole, tmp_path):
    result, folder, _ = whole
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"where = {str(folder / 'slim')!r}\n"
        "model, words = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)\n"
        f"torch.save(model(torch.tensor({IDS.tolist()})).logits, {str(tmp_path / 'logits')!r})\n"
        "chat = words.apply_chat_template([{'role': 'user', 'content': 'Hi'}], add_generation_prompt=True, "
        "return_tensors='pt', return_dict=True)\n"
        "print(model.generate(**chat, max_new_tokens=5, min_new_tokens=5).shape[1] - chat['input_ids'].shape[1])\n"
        "print(model.config.intermediate_size, 'persona_pruner' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout.split() == ["5", "48", "False"], done.stderr
    plain = torch.load(tmp_path / "logits", weights_only=True)
    torch.testing.assert_close(plain, result.model(IDS).logits)  # another process may run other threads


def test_persona_file_applies_to_the_base(whole):
    result, folder, _ = whole
    model = tiny_model()
    pp.PersonaFile.load(folder).apply(model)
    with masked(dense := tiny_model(), result.persona_file.masks):
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (model(IDS).logits - result.model(IDS).logits).abs().max() > 1e-2  # the checkpoint is repaired as well
    for other in (tiny_model("qwen2"), model):
        with pytest.raises(InputError, match="does not fit"):
            pp.PersonaFile.load(folder).apply(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_repair_the_checkpoint_is_the_masked_model(tmp_path, family):
    from transformers import AutoModelForCausalLM

    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    result = sculpt(tmp_path / "run", model, repair=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    slim = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "slim", dtype=torch.float32)
    with masked(model, result.persona_file.masks):
        assert (slim(IDS).logits - model(IDS).logits).abs().max() < 1e-4
    assert models.widths(slim) == [48] * 3
    assert [row["name"] for row in result.metrics["methods"]] == ["persona-pruner"]


def test_a_second_run_computes_nothing(whole):
    result, folder, _ = whole
    before, progress = snapshot(folder), Recorder()
    again = sculpt(folder, **WHOLE, progress=progress)
    assert snapshot(folder) == before and progress.stages == [] and "complete" in progress.notes[0]
    assert again.metrics == json.loads(json.dumps(result.metrics))
    assert torch.equal(again.model(IDS).logits, result.model(IDS).logits)
    assert again.persona_file.fingerprint == result.persona_file.fingerprint


def test_scores_take_some_examples_and_the_rest_all(monkeypatch):
    """The search has dense targets of all examples, those that the scores did not see included."""
    rows: dict[str, list[int]] = {"scores": [], "repair": []}
    scores, mend = pipeline.channel_scores, pipeline.repair_

    def seen(name, context):
        rows["scores"] += [row for batch in context.packs for row in batch.rows]
        return scores(name, context)

    def mended(slim, dense, packs, *args, **kwargs):
        rows["repair"] += [row for batch in packs for row in batch.rows]
        return mend(slim, dense, packs, *args, **kwargs)

    monkeypatch.setattr(pipeline, "channel_scores", seen)
    monkeypatch.setattr(pipeline, "repair_", mended)
    found = sculpt(score_examples=3).metrics["search"]["examples"]
    assert found > 6 and sorted(rows["scores"]) == [0, found // 3, 2 * found // 3]
    assert sorted(rows["repair"]) == list(range(found + QUICK["neutral_examples"]))


def test_a_published_question_set_is_its_own_test():
    raw = {"instruction": [{"pos": "Act as this persona: A gruff smith named Bram."}], "questions": ["Who are you?"]}
    result = sculpt(persona=pp.Persona._from_raw(raw, "set.json"), eval_questions=None, steps=0)
    assert [row["question"] for row in result.metrics["dialogue"]] == ["Who are you?"] and result.folder is None


def test_held_out_words_never_reach_calibration(tmp_path):
    """What the first run was calibrated on is put into the second run's test."""
    more, held_out, secret = tmp_path / "more.json", tmp_path / "held.json", "the old key lies under a flat blue stone"
    rows = [{"question": f"Is it true that {secret}?"}, {"question": "Where is it?", "answer": f"Well, {secret}."}]
    more.write_text(json.dumps([*rows, {"question": "Where do you keep your coal?"}]))
    settings = {"own_questions": 60, "bank_candidates": 500, "bank_questions": 500, "filter": False, **CHEAP}
    settings |= {"questions": (str(more),), "answer_tokens": 1}
    first = sculpt(tmp_path / "one", **settings)
    used = stage(tmp_path / "one", "questions")
    assert used["own"] and {row["question"] for row in rows} < set(used["bank"])
    assert first.metrics["search"]["examples"] == len(used["own"]) + len(used["bank"])
    bundled = bank.bundled("search")[7]
    held_out.write_text(json.dumps([used["own"][0], bundled, f"Do you know that {secret}"]))
    sculpt(tmp_path / "two", eval_questions=str(held_out), **settings)
    kept = stage(tmp_path / "two", "questions")
    assert kept["own"] == used["own"][1:] or used["own"][0] not in kept["own"]
    assert set(used["bank"]) - set(kept["bank"]) == {bundled, *(row["question"] for row in rows)}


def test_answers_of_the_test_are_dropped(tmp_path):
    settings = {"own_questions": 0, "bank_questions": 12, "filter": False, "answer_tokens": 30, "steps": 0}
    assert sculpt(tmp_path / "one", **settings).metrics["search"]["examples"] == 10
    spoken = [tiny_tokenizer().decode(ids, skip_special_tokens=True) for ids in stage(tmp_path / "one", "answers")]
    held_out = tmp_path / "held.json"
    held_out.write_text(json.dumps(spoken[2:5]))
    second = sculpt(tmp_path / "two", eval_questions=str(held_out), **settings)
    assert second.metrics["search"]["examples"] == 7 and len(stage(tmp_path / "two", "answers")) == 10


def test_nothing_left_to_calibrate_on(tmp_path):
    held_out = tmp_path / "held.json"
    settings = {"own_questions": 0, "bank_questions": 1, "bank_candidates": 1, "filter": False, "answer_tokens": 30}
    sculpt(tmp_path / "one", **settings)
    (answer,) = stage(tmp_path / "one", "answers")
    held_out.write_text(json.dumps([tiny_tokenizer().decode(answer, skip_special_tokens=True)]))
    with pytest.raises(InputError, match="no calibration example is left"):
        sculpt(tmp_path / "two", eval_questions=str(held_out), **settings)
    with pytest.raises(InputError, match="no calibration questions"):
        sculpt(own_questions=0, bank_questions=0)


def test_global_widths(tmp_path):
    folder = tmp_path / "run"
    sculpt(folder)
    result = sculpt(folder, scope="global", ratio=0.5)
    widths = result.persona_file.widths
    assert sum(widths) == 96 and len(set(widths)) > 1 and models.widths(result.model) == widths
    assert not (folder / "slim").exists()  # that of the first run would be taken for this one's
    assert models.widths(pp.PersonaFile.load(folder).apply(tiny_model())) == widths
    again = sculpt(folder, scope="global", ratio=0.5, progress=(progress := Recorder()))
    assert set(progress.stages) <= {"repair, block by block"} and again.metrics == json.loads(
        json.dumps(result.metrics)
    )
    assert torch.equal(again.model(IDS).logits, result.model(IDS).logits)


def test_a_packed_checkpoint_takes_the_place_of_a_slim_one(tmp_path):
    sculpt(tmp_path)
    result = sculpt(tmp_path, format="packed")
    assert (tmp_path / "packed" / "config.json").exists() and not (tmp_path / "slim").exists()
    assert len(packed_layers(result.model)) == 21
    numbers = result.metrics
    assert numbers["parameters"]["pruned"] < numbers["parameters"]["dense"] / 1.5
    assert numbers["ffn_bytes"]["pruned"] < 0.5 * numbers["ffn_bytes"]["dense"]
    again = sculpt(tmp_path, format="packed", progress=(progress := Recorder()))
    assert progress.stages == []
    assert torch.equal(again.model(IDS).logits, result.model(IDS).logits)


def test_two_of_four_alone(tmp_path):
    result = sculpt(tmp_path, format="packed", ratio=0, compare=True, progress=(progress := Recorder()))
    assert not [name for name in progress.stages if "scores" in name or "search" in name]
    assert all(mask.all() for mask in result.persona_file.masks) and len(packed_layers(result.model)) == 21
    product, published = result.metrics["methods"]
    assert product["how"] == "repair, 2:4" and published["name"] == "sparsegpt-2:4"
    assert 0 < product["kl"] < published["kl"]
    assert result.metrics["headline"] == {
        "baseline": "sparsegpt-2:4",
        "kl_removed": pytest.approx(1 - product["kl"] / published["kl"]),
    }
    assert result.persona_file.metrics["mask"] == {"kl": 0, "nll_drop": 0, "neutral_nll_drop": 0}
    assert "No channel was removed" in (tmp_path / "README.md").read_text()
    again = sculpt(tmp_path, format="packed", ratio=0, compare=True, progress=(progress := Recorder()))
    assert progress.stages == [] and torch.equal(again.model(IDS).logits, result.model(IDS).logits)
    with pytest.raises(InputError, match="0 removes nothing"):
        sculpt(tmp_path, ratio=0, scope="global")


def test_neutral_prose_among_the_data(tmp_path, monkeypatch):
    seen = []

    def watched(model, dense, packs, *rest, **options):
        seen.append(packs)
        return repair_(model, dense, packs, *rest, **options)

    monkeypatch.setattr(pipeline, "repair_", watched)
    searched, search = [], pipeline.ste.search
    monkeypatch.setattr(pipeline.ste, "search", lambda *args: searched.append(args[1]) or search(*args))
    settings = {"shared": tmp_path / "shared"}
    own = sculpt(tmp_path / "own", neutral_examples=0, **settings)
    both = sculpt(tmp_path / "both", neutral_examples=2, **settings)
    texts = [encode(tiny_tokenizer(), text) for text in bank.passages("calibration")[:2]]
    held = [batch.input_ids.tolist() for batch in seen[1]]
    assert [ids for ids in held if ids in (texts[0][:-1], texts[1][:-1], texts[0][:-1] + texts[1][:-1])]
    assert sum(map(len, held)) == sum(len(b.input_ids) for b in seen[0]) + sum(map(len, texts)) - 2
    assert len(searched[1]) == len(searched[0]) + 2 and [e.answer for e in searched[1][-2:]] == [t[1:] for t in texts]
    assert both.metrics["methods"][0]["kl"] != own.metrics["methods"][0]["kl"]
    scores = [load_file(folder / "stages" / "scores.safetensors") for folder in (tmp_path / "own", tmp_path / "both")]
    assert scores[0].keys() == scores[1].keys() and all((scores[1][k] > v).any() for k, v in scores[0].items())
    (shared,) = (tmp_path / "shared").glob("scores-fisher-*.safetensors")
    again = sculpt(tmp_path / "again", neutral_examples=2, **settings)
    assert again.metrics["methods"][0] == both.metrics["methods"][0] and shared.exists()
    sculpt(tmp_path / "both", neutral_examples=2, neutral_weight=20, **settings)  # the stored scores are of another
    heavy = load_file(tmp_path / "both" / "stages" / "scores.safetensors")
    assert all((heavy[k] > v).any() for k, v in scores[1].items())
    assert len(searched[3]) - len(searched[1]) in range(2, 200, 2) and searched[3][-2:] == searched[1][-2:]
    assert len(list((tmp_path / "shared").glob("scores-fisher-*.safetensors"))) == 1


def test_recovery_follows_the_repair(tmp_path):
    before = sculpt(tmp_path / "repaired").metrics["methods"][0]
    result = sculpt(tmp_path / "trained", recovery_steps=3, progress=(progress := Recorder()))
    assert progress.told["recovery"] == [1, 1, 1]
    after = result.metrics["methods"][0]
    assert after["how"] == "scores, search, repair, recovery" and after["kl"] != before["kl"]
    packed = sculpt(tmp_path / "packed", format="packed", recovery_steps=3)
    assert packed.metrics["methods"][0]["how"] == "scores, search, repair, recovery, 2:4"
    assert len(packed_layers(packed.model)) == 21
    with pytest.raises(InputError, match="packed needs recovery weights"):
        sculpt(tmp_path / "lora", format="packed", recovery_steps=3, recovery="lora")


def test_a_packed_checkpoint_without_repair_keeps_weights_as_they_are(tmp_path):
    result = sculpt(tmp_path, format="packed", repair=False)
    rows = {row["name"]: row for row in result.metrics["methods"]}
    assert rows["persona-pruner"]["kl"] > rows["persona-pruner, mask only"]["kl"]
    assert result.persona_file.metrics["mask"]["kl"] == rows["persona-pruner, mask only"]["kl"]
    slim = slim_copy(tiny_model(), result.persona_file.masks)
    for name, layer in packed_layers(result.model).items():
        found, weight = layer.dequantize(), slim.get_submodule(name).weight
        kept = found != 0
        assert torch.equal(found[kept], weight[kept]) and int(kept.unflatten(1, (-1, 4)).sum(-1).max()) == 2


def test_seeds_and_starts_find_other_masks():
    first = sculpt().persona_file.masks

    def same(**settings):
        masks = sculpt(**settings).persona_file.masks
        return all(torch.equal(a, b) for a, b in zip(first, masks, strict=True))

    assert same() and not same(seed=1)
    assert not any(same(start=start, loss="ce") for start in ("wanda", "taylor", "random"))


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"ratio": 0}, "setting ratio: 0 removes nothing"),
        ({"ratio": 1.0}, "setting ratio: .*less than 1"),
        ({"ratio": -1}, "setting ratio"),
        ({"ratio": 1.5}, "setting ratio"),
        ({"ratio": float("nan")}, "setting ratio"),
        ({"ratio": 0.001}, "ratio 0.001 removes none of 64 channels"),
        ({"nonsense": 1}, "setting nonsense"),
        ({"questions": ("nowhere.json",)}, "cannot read nowhere.json"),
        ({"eval_questions": "nowhere.json"}, "cannot read nowhere.json"),
        ({"model": tiny_model(hidden_act="relu")}, "activation 'relu'"),
        ({"model": torch.nn.Linear(2, 2)}, "no decoder layers"),
    ],
)
def test_bad_requests_write_nothing(tmp_path, changes, why):
    with pytest.raises(InputError, match=why):
        sculpt(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_capped_attention_is_refused(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = tiny_model("gemma3").config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "eos_token_id", "pad_token_id")  # fmt: skip
    model = Gemma2ForCausalLM(Gemma2Config(**{key: sizes[key] for key in keys}))
    with pytest.raises(InputError, match="caps its attention"):
        sculpt(tmp_path / "run", model)
    assert not (tmp_path / "run").exists()


def test_results_need_a_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match="run is a file"):
        sculpt(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_model_from_a_folder_keeps_its_name(tmp_path):
    model, tokenizer = pp.load_model(save_tiny(tmp_path / "base"), dtype="float32")
    result = pp.sculpt(model, tokenizer, pp.Persona.from_text(TEXT), ratio=0.5, **BARE)
    assert result.persona_file.base == str(tmp_path / "base") and result.persona_file.ratio == 0.5
    assert result.metrics["run"]["dtype"] == "float32"
