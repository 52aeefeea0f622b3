"""Characters opened from what a sculpt wrote, and their streamed answers."""

import shutil

import pytest
import torch
from sculpting import HELD_OUT, QUICK, TEXT, save_tiny

import persona_pruner as pp
from persona_pruner import models, runtime
from persona_pruner.errors import InputError
from persona_pruner.nn import masked
from persona_pruner.runtime import open_character, saved_config
from persona_pruner.synthesis.prompts import prompt_ids
from persona_pruner.testing import tiny_examples, tiny_model, tiny_tokenizer

IDS = torch.tensor([tiny_examples(1)[0].prompt])
ASKED = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(sculpt's result, its folder, the base's folder); not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    base = save_tiny(folder / "base")
    model, tokenizer = pp.load_model(base, dtype="float32")
    card = {"name": "Bram", "description": TEXT, "first_mes": "What do you want, {{user}}?"}
    persona, settings = pp.Persona._from_raw(card, "card.json"), {**QUICK, "compare": False, "eval_questions": HELD_OUT}
    return pp.sculpt(model, tokenizer, persona, out=folder / "run", base=str(base), **settings), folder / "run", base


def opened(*args, **kwargs):
    return open_character(*args, dtype="float32", **kwargs)


def test_an_output_folder_is_its_checkpoint(made):
    result, run, _ = made
    who = opened(run)
    assert torch.equal(who.model(IDS).logits, result.model(IDS).logits)
    assert who.name == "Bram" and who.greeting == "What do you want, User?"
    assert who.system == result.persona_file.system and TEXT in who.system
    bare = opened(run / "slim")
    assert torch.equal(bare.model(IDS).logits, who.model(IDS).logits)
    assert (bare.name, bare.system, bare.file) == ("slim", "", None)


def test_a_persona_file_is_cut_from_its_base(made, tmp_path):
    result, run, base = made
    file = shutil.copy(run / "persona.persona.safetensors", tmp_path)
    for who in (opened(file), opened(file, base=str(base)), opened(tmp_path)):
        assert models.widths(who.model) == [48] * 3 and who.system == result.persona_file.system
    with masked(dense := tiny_model(), result.persona_file.masks):
        torch.testing.assert_close(who.model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    for path in (run, file):
        who = opened(path, dense=True)
        assert torch.equal(who.model(IDS).logits, tiny_model()(IDS).logits) and who.name == "Bram"


def test_global_widths_and_packed_checkpoints(made, tmp_path):
    _, _, base = made
    model, tokenizer = pp.load_model(base, dtype="float32")
    settings = {**QUICK, "compare": False, "eval_questions": HELD_OUT, "base": str(base), "start": "wanda", "steps": 0}
    persona = pp.Persona.from_text(TEXT)
    result = pp.sculpt(model, tokenizer, persona, out=tmp_path / "global", scope="global", **settings)
    assert models.widths(opened(tmp_path / "global").model) == result.persona_file.widths
    pp.sculpt(model, tokenizer, persona, out=tmp_path / "packed", format="packed", **settings)
    assert next(opened(tmp_path / "packed").stream(ASKED, 4))


def test_what_cannot_be_opened(made, tmp_path):
    _, run, base = made
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    other = save_tiny(tmp_path / "other", family="qwen2")
    for path, rest, why in (
        (tmp_path / "none", {}, "no such file or folder"),
        (tmp_path / "empty", {}, "neither a persona file, an output folder"),
        (tmp_path / "x.safetensors", {}, "is damaged"),
        (base, {"dense": True}, "neither a persona file"),
        (run / "persona.persona.safetensors", {"base": str(other)}, "'Bram' was made for .*base and does not fit"),
        (run / "persona.persona.safetensors", {"base": "./nowhere"}, "no model folder"),
        (run, {"device": "abacus"}, "not a torch device"),
        (run, {"device": "meta"}, "device 'meta' cannot be used here"),
    ):
        with pytest.raises(InputError, match=why):
            opened(path, **rest)


def test_saved_config(made, tmp_path):
    _, run, base = made
    assert saved_config(run) == saved_config(run / "persona.persona.safetensors")
    assert saved_config(run)["model"] == str(base) and saved_config(run)["settings"]["steps"] == QUICK["steps"]
    assert saved_config(tmp_path) == {} == saved_config(tmp_path / "x.persona.safetensors")


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_pieces_join_to_what_generate_says(made, temperature):
    _, run, _ = made
    who = opened(run)
    for question in ("Who are you?", "What is iron?", "Sing!"):
        prompt = torch.tensor([prompt_ids(who.tokenizer, who.system, question)])
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {}
        torch.manual_seed(3)
        ids = who.model.generate(prompt, max_new_tokens=48, **{"do_sample": False, **sampling})[0, prompt.shape[1] :]
        torch.manual_seed(3)
        pieces = list(who.stream([{"role": "user", "content": question}], 48, temperature))
        assert "".join(pieces) == who.tokenizer.decode(ids, skip_special_tokens=True)
        assert len(pieces) > 1 and all(pieces)


def test_the_fleet_says_what_generate_says(made):
    talks = [ASKED, [*ASKED, {"role": "assistant", "content": "Bram."}, {"role": "user", "content": "And iron?"}]]
    plain, fast = opened(made[1]), opened(made[1])
    assert plain.use("transformers") == "transformers" and fast.use("auto") == "fleet" and fast.model is None
    for talk in talks:
        pieces = list(fast.stream(talk, 40, 0))
        whole = "".join(plain.stream(talk, 40, 0)).rstrip("\ufffd")  # of a character cut off the fleet says nothing
        assert len(pieces) > 1 and "".join(pieces).rstrip("\ufffd") == whole
    said = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        said.append("".join(fast.stream(ASKED, 40, 0.9)))
    assert said[0] == said[1] != said[2]
    with pytest.raises(InputError, match="temperature must be"):
        list(fast.stream(ASKED, 20, -1.0))


def test_who_cannot_be_in_the_fleet(made):
    packed = runtime.Character(tiny_model(), tiny_tokenizer(), "Bram", "")
    pp.sparsify_(packed.model)
    other = runtime.Character(tiny_model(), tiny_tokenizer(), "Bram", "")
    other.model.__class__ = type("GptForCausalLM", (type(other.model),), {})
    for who, why in ((packed, "packed 2:4 layers"), (other, "not GptForCausalLM")):
        with pytest.raises(InputError, match=why):
            who.use("fleet")
        assert who.use("auto") == "transformers" and list(who.stream(ASKED, 3))
    with pytest.raises(InputError, match="'warp' is not one of auto, fleet, transformers"):
        packed.use("warp")


def test_the_persona_and_the_conversation_are_in_the_prompt(made, monkeypatch):
    who, seen = opened(made[1]), []
    who.model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].tolist()))
    talk = [*ASKED, {"role": "assistant", "content": "Bram."}, {"role": "user", "content": "And what is iron?"}]
    list(who.stream(talk, 1))
    text = tiny_tokenizer().decode(seen[0])
    places = [text.index(part) for part in (who.system, "Who are you?", "Bram.<|im_end|>", "And what is iron?")]
    assert places == sorted(places) and text.endswith("assistant\n")
    who.system = ""
    list(who.stream(ASKED, 1))
    assert "system" not in tiny_tokenizer().decode(seen[1])


@pytest.mark.parametrize("after", [0, 3])
def test_errors_within_generation_reach_the_caller(made, after):
    who, calls = opened(made[1]), []

    def fail(*_):
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError("the third anvil is cracked")

    who.model.model.layers[1].register_forward_pre_hook(fail)
    pieces = []
    with pytest.raises(RuntimeError, match="third anvil"):
        pieces.extend(who.stream(ASKED, 20, 0))
    assert len(calls) == after + 1
    with pytest.raises(ValueError):
        list(who.stream(ASKED, 20, -1.0))


def test_it_is_plain_about_its_parts():
    who = runtime.Character(tiny_model(), tiny_tokenizer(), "Bram", "")
    assert who.greeting == "" and who.file is None and list(who.stream(ASKED, 3))
