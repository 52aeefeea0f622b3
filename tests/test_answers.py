"""Answers in character: by the base model, another model, and an OpenAI-compatible server (llama.cpp, the real one)."""

import json
import sys

import llama_server
import pytest
from sculpting import HELD_OUT, QUICK, TEXT, Recorder, save_tiny

import persona_pruner as pp
from persona_pruner.errors import InputError, RunError
from persona_pruner.synthesis.answers import from_endpoint, from_model, self_distilled
from persona_pruner.synthesis.generate import generate
from persona_pruner.synthesis.prompts import prompt_ids
from persona_pruner.testing import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("no_waiting")

SYSTEM = "You are Bram, a smith. Answer in a few words."
QUESTIONS = ["Who are you?", "What is iron?", "Do you like rain?"]
NOBODY = "http://127.0.0.1:9/v1"  # the discard port: nothing listens there


def sculpt(out, answers="self", **settings):
    settings = {**QUICK, "compare": False, "eval_questions": HELD_OUT, "steps": 0, "repair": False, **settings}
    persona = pp.Persona.from_text(TEXT)
    return pp.sculpt(tiny_model(), tiny_tokenizer(), persona, out=out, answers=answers, **settings)


def stage(folder, name):
    return json.loads((folder / "stages" / f"{name}.json").read_text())["value"]


def test_self_distilled_is_what_generate_says():
    model, tokenizer, told = tiny_model(), tiny_tokenizer(), []
    got = self_distilled(model, tokenizer, SYSTEM, QUESTIONS, 9, seed=4, done=told.extend)
    assert got == told == generate(model, [prompt_ids(tokenizer, SYSTEM, q) for q in QUESTIONS], {2}, 9, seed=4)
    bare = self_distilled(model, tokenizer, "", QUESTIONS, 9, seed=4)
    assert bare == generate(model, [prompt_ids(tokenizer, "", q) for q in QUESTIONS], {2}, 9, seed=4) != got


def test_another_model_answers_in_the_base_models_tokens(tmp_path):
    other = save_tiny(tmp_path / "other", seed=5)
    tokenizer, told = tiny_tokenizer(), []
    got = from_model(str(other), tokenizer, SYSTEM, QUESTIONS, 12, seed=4, done=told.extend)
    model, _ = pp.load_model(other)
    own = self_distilled(model, tokenizer, SYSTEM, QUESTIONS, 12, seed=4)
    assert got == told and len(got) == 3 and max(map(len, got)) <= 12
    for ids, said in zip(got, own, strict=True):
        text = tokenizer.decode(said, skip_special_tokens=True).strip()
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.startswith(whole) and (ids[-1] == 2 or len(ids) == 12)
    assert from_model(str(other), tokenizer, SYSTEM, QUESTIONS, 12, seed=4, start=3) == []
    with pytest.raises(InputError, match=r"no model folder \./nowhere"):
        from_model("./nowhere", tokenizer, SYSTEM, QUESTIONS, 12)


def test_a_server_answers(llama):
    _, url = llama
    tokenizer, told = tiny_tokenizer(), []
    got = from_endpoint(url, tokenizer, SYSTEM, QUESTIONS, 40, done=told.append)
    assert [ids for (ids,) in told] == got and len(got) == 3
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in got]
    assert all(text.strip() and text.isprintable() for text in texts) and len(set(texts)) == 3
    assert all(len(ids) <= 40 for ids in got)
    named = from_endpoint(f"{url}#any-name", tokenizer, SYSTEM, QUESTIONS, 40, start=2)
    assert len(named) == 1 and tokenizer.decode(named[0]).strip()


def test_seeds_and_reference_answers(llama):
    def ask(*references, system=SYSTEM, **rest):
        return from_endpoint(llama[1], tiny_tokenizer(), system, QUESTIONS[:1], 40, references, **rest)

    one = ask()
    assert ask() == one == ask("") != ask(seed=7)
    assert ask("I am the king of the seven hills, and nobody else.") != one != ask(system="")


def test_no_server():
    with pytest.raises(RunError, match=rf"the endpoint {NOBODY} failed: Connection error") as caught:
        from_endpoint(NOBODY, tiny_tokenizer(), SYSTEM, QUESTIONS, 8)
    assert "\n" not in str(caught.value)


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match="needs the extra `endpoint`"):
        from_endpoint(NOBODY, tiny_tokenizer(), SYSTEM, QUESTIONS, 8)


def test_a_sculpt_whose_server_dies_goes_on_later(llama, tmp_path):
    """The last test with this server. Another one at the same address finishes the work."""
    process, url = llama
    settings = {"own_questions": 0, "bank_questions": 4, "filter": False, "answers": url, "answer_tokens": 24}

    class Killer(Recorder):
        def _step(self, done):
            super()._step(done)
            if self.stages[-1] == "answers in character" and sum(self.told[self.stages[-1]]) == 2:
                process.kill()
                process.wait()

    with pytest.raises(RunError, match=f"the endpoint {url} failed"):
        sculpt(tmp_path / "run", progress=Killer(), **settings)
    with pytest.raises(RunError, match="failed"):
        sculpt(tmp_path / "run", **settings)  # still dead
    kept = stage(tmp_path / "run", "answers")
    assert len(kept) == 2 and not (tmp_path / "run" / "metrics.json").exists()
    with llama_server.running(process.args[-2], url.split(":")[2].removesuffix("/v1")) as (_, again):
        assert again == url
        result = sculpt(tmp_path / "run", progress=(progress := Recorder()), **settings)
    assert progress.told["answers in character"] == [2, 1, 1] and result.metrics["search"]["examples"] == 4
    assert stage(tmp_path / "run", "answers")[:2] == kept


def test_out_of_character(tmp_path):
    settings = {"own_questions": 0, "bank_questions": 4, "filter": False, "start": "random"}
    sculpt(tmp_path, in_character=False, **settings)
    asked, said = stage(tmp_path, "questions")["bank"], stage(tmp_path, "answers")
    assert said == self_distilled(tiny_model(), tiny_tokenizer(), "", asked, 12, seed=1)
    sculpt(tmp_path, **settings)
    assert stage(tmp_path, "questions")["bank"] == asked and stage(tmp_path, "answers") != said
