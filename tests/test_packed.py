"""The packed checkpoint: what is loaded is what was saved, bit for bit, or loading fails with a sentence."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from limits import files_up_to
from safetensors.torch import load_file, save_file
from torch import nn

from persona_pruner import cli, models
from persona_pruner.errors import InputError, RunError
from persona_pruner.formats.packed import PLEA, bitmask24, is_packed, read_sparse, save_packed, unpack
from persona_pruner.nn import slim_copy
from persona_pruner.nn.sparse import SparseLinear24, desparsify_, packed_layers, sparsify_
from persona_pruner.ops import unpack24
from persona_pruner.runtime import open_character
from persona_pruner.testing import tiny_model, tiny_tokenizer

IDS = torch.arange(3, 43).reshape(2, 20)
MASKS = [torch.arange(64) % 8 < 5 for _ in range(3)]


def packed_model(family="llama", dtype=torch.float32, weights=None, **changes):
    model = tiny_model(family, dtype=dtype, **changes)
    sparsify_(model, dtype=weights)
    return model


def load(folder, **kwargs):
    from transformers import AutoModelForCausalLM

    with models.quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def main(*arguments):
    """Exit code of the command."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(map(str, arguments)))
    return left.value.code


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name].nan_to_num(7), b[name].nan_to_num(7)), name


def edit_tensors(folder, edit):
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "family, dtype, weights",
    [
        ("llama", torch.float32, None),
        ("qwen2", torch.bfloat16, None),
        ("gemma3", torch.float16, None),
        ("qwen3", torch.float32, torch.int8),
        ("mistral", torch.bfloat16, torch.int8),
        ("llama", torch.float32, torch.bfloat16),
    ],
)
@torch.no_grad()
def test_round_trip(tmp_path, family, dtype, weights):
    model = packed_model(family, dtype, weights)
    save_packed(model, tmp_path / "x", tiny_tokenizer())
    loaded = load(tmp_path / "x")
    assert len(packed_layers(loaded)) == 21 and loaded.dtype == dtype and is_packed(tmp_path / "x")
    same_state(model, loaded)
    assert model.config.__dict__.get("quantization_config") is None
    if dtype == torch.float32:
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert loaded.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 23)
    with models.quiet_transformers():  # transformers' own saving writes the same
        loaded.save_pretrained(tmp_path / "again")
    same_state(model, load(tmp_path / "again"))
    dense = load(tmp_path / "x").dequantize()
    assert not packed_layers(dense) and not hasattr(dense.config, "quantization_config")
    same_state(dense, desparsify_(copy.deepcopy(model), dtype))


@torch.no_grad()
def test_slim_widths_and_shards(tmp_path):
    slim = slim_copy(tiny_model(), MASKS)
    sparsify_(slim)
    save_packed(slim, tmp_path / "x", tiny_tokenizer(), max_shard_size="40KB")
    assert len(list((tmp_path / "x").glob("model-*.safetensors"))) > 2
    loaded, tokenizer = models.load_model(tmp_path / "x", dtype="float32")
    same_state(slim, loaded)
    assert models.widths(loaded) == [40] * 3 and tokenizer.chat_template
    assert torch.equal(loaded(IDS).logits, slim(IDS).logits)
    sorted((tmp_path / "x").glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load_model(tmp_path / "x", dtype="float32")


@torch.no_grad()
def test_another_dtype_and_the_bare_decoder(tmp_path):
    from transformers import AutoModel

    model = packed_model()
    save_packed(model, tmp_path / "x")
    half = load(tmp_path / "x", dtype=torch.bfloat16)
    for name, layer in packed_layers(half).items():
        assert torch.equal(layer.values, model.get_submodule(name).values.bfloat16())
    decoder = AutoModel.from_pretrained(tmp_path / "x")
    assert len(packed_layers(decoder)) == 21
    assert torch.equal(decoder(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    some = tiny_model()
    sparsify_(some, filter_fn=lambda name, linear: "mlp" in name, dtype=torch.int8)
    sparsify_(some, filter_fn=lambda name, linear: "q_proj" in name)
    save_packed(some, tmp_path / "some")
    same_state(some, load(tmp_path / "some"))
    assert len(packed_layers(load(tmp_path / "some"))) == 12


# with and without the plug-in

CODE = """
import sys
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__, "persona_pruner" in sys.modules)
"""
ORDERS = (
    "import persona_pruner; from transformers import AutoModelForCausalLM",
    "from transformers import AutoModelForCausalLM; import persona_pruner",
    "import transformers.quantizers.auto, persona_pruner; from transformers import AutoModelForCausalLM",
)


def run(code, *arguments):
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize("imports", ORDERS)
def test_either_package_may_be_imported_first(tmp_path, imports):
    save_packed(packed_model(), tmp_path / "x")
    done = run(CODE.format(imports=imports), tmp_path / "x")
    assert done.stdout.split() == ["SparseLinear24", "True"], done.stderr[-2000:]


PLAIN = """
import sys, torch, transformers
for name in ("AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM"):
    for flags in ({}, {"ignore_mismatched_sizes": True}):
        try:
            getattr(transformers, name).from_pretrained(sys.argv[1], **flags)
        except ValueError as error:
            print(error)
"""


def test_without_the_plug_in_loading_fails(tmp_path):
    save_packed(packed_model(weights=torch.int8), tmp_path / "x")
    done = run(PLAIN, tmp_path / "x")
    assert done.stdout.count(PLEA) == 6, done.stderr[-2000:]


def test_without_the_plea_and_its_config_the_shapes_do_not_fit(tmp_path):
    save_packed(packed_model(weights=torch.int8), tmp_path / "x")
    edit_config(tmp_path / "x", lambda config: config.pop("transformers_weights"))
    done = run(CODE.format(imports="from transformers import AutoModelForCausalLM"), tmp_path / "x")
    assert done.returncode == 1 and done.stdout == ""
    assert "Unknown quantization type, got persona_pruner" in done.stderr and "ignore_mismatched_sizes" in done.stderr
    edit_config(tmp_path / "x", lambda config: config.pop("quantization_config"))
    done = run(CODE.format(imports=ORDERS[0]), tmp_path / "x")
    assert done.returncode == 1 and "ignore_mismatched_sizes" in done.stderr


def test_a_transformers_without_the_registry_is_a_warning(tmp_path):
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py", package / "auto.py"):
        file.write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import persona_pruner, transformers.quantizers.auto"
    done = run(code)
    assert done.returncode == 0 and "cannot load packed checkpoints with this transformers" in done.stderr


# damage

META = "model.layers.1.mlp.down_proj.meta"
VALUES = "model.layers.1.mlp.down_proj.values"


def flip(state):
    state[META][3, 2] = 0x00


@pytest.mark.parametrize(
    "spoil, said",
    [
        (flip, r"layers\.1\.mlp\.down_proj: 2:4 metadata is corrupt"),
        (lambda state: state.pop(META), r"down_proj\.meta is missing in the checkpoint or has another shape"),
        (lambda state: state.pop(VALUES), r"down_proj\.values is missing"),
        (lambda state: state.pop("model.layers.0.self_attn.q_proj.bias"), r"q_proj\.bias is missing"),
        (lambda state: state.update({VALUES: state[VALUES].to(torch.int8)}), r"values are torch\.int8"),
        (lambda state: state.update({META: state[META].to(torch.int16)}), "meta must be uint8"),
    ],
)
def test_damaged_tensors_are_refused(tmp_path, spoil, said):
    save_packed(packed_model("qwen2"), tmp_path / "x", tiny_tokenizer())
    edit_tensors(tmp_path / "x", spoil)
    with pytest.raises(InputError, match=said):
        load(tmp_path / "x")
    with pytest.raises(InputError, match=said):
        models.load_model(tmp_path / "x")


def test_another_shape_is_refused(tmp_path):
    save_packed(packed_model(), tmp_path / "x")
    edit_tensors(tmp_path / "x", lambda state: state.update({VALUES: state[VALUES][:, :-2].contiguous()}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path / "x")
    with pytest.raises(InputError, match=r"down_proj\.values is missing in the checkpoint or has another shape"):
        load(tmp_path / "x", ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"version": 2}, "version 2 of the format"),
        ({"more": 1}, "version 1 of the format"),
        ({"modules": ["model.layers.0.mlp.up_proj"]}, "is damaged"),
        ({"modules": {}}, "is damaged"),
        ({"modules": {"model.layers.0.mlp.up_proj": "int4"}}, "is damaged"),
        ({"modules": {"model.layers.0.mlp.up_proj": ["int8"]}}, "is damaged"),
        ({"modules": {"model.layers.9.mlp.up_proj": None}}, "which is no linear layer of LlamaForCausalLM"),
        ({"modules": {"model.norm": None}}, "which is no linear layer"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path, change, said):
    save_packed(packed_model(), tmp_path / "x")
    edit_config(tmp_path / "x", lambda config: config["quantization_config"].update(change))
    with pytest.raises(InputError, match=said):
        load(tmp_path / "x")


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(InputError, match="call sparsify_ first"):
        save_packed(tiny_model(), tmp_path / "x")
    uneven = slim_copy(tiny_model(), [*MASKS[:2], torch.arange(64) < 32])
    sparsify_(uneven)
    with pytest.raises(InputError, match="layers of different width"):
        save_packed(uneven, tmp_path / "x")
    corrupt = packed_model()
    corrupt.model.layers[0].mlp.up_proj.meta.zero_()
    with pytest.raises(InputError, match="corrupt"):
        save_packed(corrupt, tmp_path / "x")
    with pytest.raises(InputError, match="not a model of transformers"):
        save_packed(nn.Sequential(SparseLinear24(8, 8)), tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("old")
    model = packed_model()
    with pytest.raises(RunError, match=r"could not write .*x: "), files_up_to(20_000):
        save_packed(model, tmp_path / "x", tiny_tokenizer())
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["old"]


# other formats


def test_unpack_and_pack_commands(tmp_path):
    model = packed_model("qwen2", torch.bfloat16)
    save_packed(model, tmp_path / "packed", tiny_tokenizer())
    assert main("unpack", tmp_path / "packed", tmp_path / "dense") == 0
    code = CODE.format(imports="from transformers import AutoModelForCausalLM").replace("print(", "model.norm = (")
    assert run(code, tmp_path / "dense").returncode == 0  # plain transformers reads it
    dense = load(tmp_path / "dense")
    same_state(dense, desparsify_(copy.deepcopy(model)))
    assert dense.dtype == torch.bfloat16 and (tmp_path / "dense" / "tokenizer.json").exists()
    assert main("pack", tmp_path / "dense", tmp_path / "again") == 0
    same_state(model, load(tmp_path / "again"))
    for command, folder in (("unpack", "dense"), ("pack", "packed"), ("unpack", "nowhere")):
        assert main(command, tmp_path / folder, tmp_path / "no") == 2 and not (tmp_path / "no").exists()


def test_dense_weights_that_are_not_sparse_are_refused(tmp_path):
    dense = desparsify_(packed_model())
    dense.model.layers[2].mlp.up_proj.weight[0, :4] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    with models.quiet_transformers():
        dense.save_pretrained(tmp_path / "x")
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj: the weight is not 2:4"):
        read_sparse(tmp_path / "x")


def write_bitmask(folder, model, masks):
    """A checkpoint as Sparse24BitMaskCompressor of compressed-tensors lays it out; `masks` are bool [R, C] by layer."""
    with models.quiet_transformers():
        model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name, mask in masks.items():
        weight = state.pop(f"{name}.weight")
        rows, cols = weight.shape
        state[f"{name}.shape"] = torch.tensor([[rows], [cols]])
        state[f"{name}.compressed"] = weight[mask].reshape(rows, cols // 2)
        state[f"{name}.bitmask"] = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    sparsity = {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    }
    found = {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity}
    edit_config(folder, lambda config: config.update({"quantization_config": found}))


def random_masks(model, seed=0):
    """Two of every four at random: zeros may be among the kept ones and nonzeros among the others' places."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, layer in packed_layers(model).items():
        rows, cols = layer.out_features, layer.in_features
        order = torch.rand(rows, cols // 4, 4, generator=generator).argsort(-1)
        masks[name] = (order < 2).view(rows, cols)
    return masks


@pytest.mark.parametrize("family, dtype", [("qwen2", torch.bfloat16), ("llama", torch.float32)])
@torch.no_grad()
def test_sparse_24_bitmask(tmp_path, family, dtype):
    masks = random_masks(packed_model(family))
    dense = tiny_model(family, dtype=dtype)
    for name, mask in masks.items():
        dense.get_submodule(name).weight.mul_(mask)
    write_bitmask(tmp_path / "x", dense, masks)
    model, tokenizer = read_sparse(tmp_path / "x")
    assert tokenizer is None and len(packed_layers(model)) == 21 and model.dtype == dtype
    for name, layer in packed_layers(model).items():
        assert torch.equal(layer.dequantize(), dense.get_submodule(name).weight)
    same_state(desparsify_(copy.deepcopy(model)), dense)
    save_packed(model, tmp_path / "packed")
    same_state(model, load(tmp_path / "packed"))


def test_damaged_bitmasks_are_refused(tmp_path):
    shape, compressed = torch.tensor([[2], [12]]), torch.arange(1.0, 13).view(2, 6)
    bits = torch.tensor([[0b1001_0011, 0b0110], [0b0101_1010, 0b1100]], dtype=torch.uint8)
    values, meta = bitmask24(shape, compressed, bits)
    wanted = [[1, 2, 0, 0, 3, 0, 0, 4, 0, 5, 6, 0], [0, 7, 0, 8, 9, 0, 10, 0, 0, 0, 11, 12]]
    assert unpack24(values, meta).tolist() == wanted
    for wrong in (
        (shape, compressed[:, :4], bits),
        (torch.tensor([2, 10]), compressed[:, :5], bits),
        (shape, compressed, bits[:, :1]),
        (shape, compressed, bits.int()),
        (shape, compressed, bits | 1 << 2),
        (torch.tensor([2]), compressed, bits),
    ):
        with pytest.raises(InputError, match="sparse-24-bitmask: "):
            bitmask24(*wrong)
    model = tiny_model()
    write_bitmask(tmp_path / "x", model, random_masks(packed_model()))
    edit_tensors(tmp_path / "x", lambda state: state.pop("model.layers.0.mlp.up_proj.bitmask"))
    with pytest.raises(InputError, match="up_proj lacks its shape or bitmask"):
        read_sparse(tmp_path / "x")
    edit_config(tmp_path / "x", lambda config: config["quantization_config"].update(config_groups={"group_0": {}}))
    with pytest.raises(InputError, match="quantized as well as sparse"):
        read_sparse(tmp_path / "x")
    edit_config(tmp_path / "x", lambda config: config["quantization_config"].pop("sparsity_config"))
    with pytest.raises(InputError, match="neither dense nor sparse-24-bitmask: compressed-tensors"):
        read_sparse(tmp_path / "x")
    (tmp_path / "x" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    write = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}
    edit_config(tmp_path / "x", lambda config: config.update(quantization_config=write))
    with pytest.raises(InputError, match="outside its folder"):
        read_sparse(tmp_path / "x")


# the main job


def test_sculpt_chat_and_eval(tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_model(max_position_embeddings=2048).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    small = {"own_questions": 0, "bank_questions": 4, "bank_candidates": 4, "filter": "false", "answer_tokens": 4}
    small |= {"held_out_tokens": 4, "steps": 1, "held_out_questions": 2, "eval_questions": tmp_path / "held.json"}
    (tmp_path / "held.json").write_text('["Who forged this?", "What do you sell?"]')
    settings = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    sculpt = ["sculpt", "--persona", "A gruff smith.", "--model", str(base), "--ratio", "0.5", "--dtype", "float32"]
    sculpt += ["--out", str(out), "--format", "packed", "--no-compare", *settings]
    assert main(*sculpt) == 0
    assert is_packed(out / "packed") and not (out / "slim").exists()
    model, _ = models.load_model(out / "packed")
    assert len(packed_layers(model)) == 21 and models.widths(model) == [32] * 3
    assert len(packed_layers(open_character(out).model)) == 21
    capsys.readouterr()
    assert main("chat", out, "--prompt", "Hello", "--max-new-tokens", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["answer"] is not None
    assert main("eval", out, "--base", base, "--json", "--dtype", "float32") == 0
    found = json.loads(capsys.readouterr().out)
    kl = json.loads((out / "metrics.json").read_text())["methods"][0]["kl"]
    assert found["questions"] == 2 and found["kl"] > 0 and found["kl"] == pytest.approx(kl)
    assert main(*sculpt) == 0  # complete: the packed checkpoint is found again
    assert main(*sculpt, "--scope", "global") == 2
    assert unpack(out / "packed", tmp_path / "dense") == Path(tmp_path / "dense")
