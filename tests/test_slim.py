"""The slim checkpoint: plain transformers loads it and gets the logits of the masked dense model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from limits import files_up_to

from persona_pruner import models
from persona_pruner.errors import InputError, RunError
from persona_pruner.formats.slim import save_slim
from persona_pruner.nn import slim_copy
from persona_pruner.testing import FAMILIES, tiny_model, tiny_tokenizer

IDS = torch.arange(3, 43).reshape(2, 20)

PLAIN = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, out, *folders = sys.argv[1:]
logits = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    logits[folder] = model(torch.tensor(json.loads(ids))).logits.detach()
    generated = model.generate(torch.tensor(json.loads(ids))[:1], max_new_tokens=3, do_sample=False)
    assert generated.shape[0] == 1
assert "persona_pruner" not in sys.modules
save_file(logits, out)
"""


def equal_widths(seed=0, keep=40):
    generator = torch.Generator().manual_seed(seed)
    return [torch.zeros(64, dtype=torch.bool).index_fill_(0, torch.randperm(64, generator=generator)[:keep], True)
            for _ in range(3)]  # fmt: skip


def plainly_masked(family, masks):
    model = tiny_model(family)
    for layer, mask in zip(model.model.layers, masks, strict=True):
        layer.mlp.down_proj.weight[:, ~mask] = 0
    return model


def test_plain_transformers_loads_it(tmp_path):
    from safetensors.torch import load_file

    masks, folders = equal_widths(), [tmp_path / family for family in FAMILIES]
    for family, folder in zip(FAMILIES, folders, strict=True):
        save_slim(slim_copy(tiny_model(family), masks), tiny_tokenizer(), folder)
        assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 40
    command = [sys.executable, "-P", "-c", PLAIN, json.dumps(IDS.tolist()), tmp_path / "logits", *folders]
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path)
    logits = load_file(tmp_path / "logits")
    for family, folder in zip(FAMILIES, folders, strict=True):
        want = plainly_masked(family, masks)(IDS).logits
        assert (logits[str(folder)] - want).abs().max() < 1e-4, family
        assert (tiny_model(family)(IDS).logits - want).abs().max() > 0.1


def test_slim_copy_leaves_the_model_as_it_is():
    model = tiny_model()
    before = model(IDS).logits
    assert models.widths(slim_copy(model, equal_widths())) == [40] * 3
    assert torch.equal(model(IDS).logits, before) and models.widths(model) == [64] * 3


def test_widths_that_differ_are_refused(tmp_path):
    masks = equal_widths()
    masks[1] = ~masks[1]
    with pytest.raises(InputError, match="different width"):
        save_slim(slim_copy(tiny_model(), masks), tiny_tokenizer(), tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_more_files_and_a_second_save(tmp_path):
    model = slim_copy(tiny_model(), equal_widths())
    save_slim(model, tiny_tokenizer(), tmp_path / "x", lambda folder: (folder / "README.md").write_text("one"))
    (tmp_path / "x" / "stray").write_text("")
    save_slim(model, tiny_tokenizer(), tmp_path / "x", lambda folder: (folder / "README.md").write_text("two"))
    assert (tmp_path / "x" / "README.md").read_text() == "two" and not (tmp_path / "x" / "stray").exists()
    assert os.listdir(tmp_path) == ["x"]
    loaded, _ = models.load_model(tmp_path / "x", dtype="float32")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, limit):
    model = slim_copy(tiny_model(), equal_widths())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("old")
    with pytest.raises(RunError, match=r"could not write .*x: "), files_up_to(limit):
        save_slim(model, tiny_tokenizer(), tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["old"]
