"""Names and files of the paper's code release."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

import persona_pruner
from persona_pruner import load_topk_indices, models, prune_llama_ffn, resolve_decoder_layers
from persona_pruner.errors import InputError
from persona_pruner.nn import masked
from persona_pruner.testing import FAMILIES, tiny_examples, tiny_model

ROWS = [[0, 3, 5, 63], [1, 2, 7, 9], [4, 5, 6, 8]]


def save(value, path):
    if path.suffix == ".json":
        path.write_text(json.dumps(value))
    elif path.suffix == ".safetensors":
        save_file(value, path)
    else:
        torch.save(value, path)
    return path


@pytest.mark.parametrize(
    "name, value",
    [
        ("a.pt", ROWS),
        ("a.pt", torch.tensor(ROWS)),
        ("a.pt", [torch.tensor(row) for row in ROWS]),
        ("a.pt", {layer: torch.tensor(ROWS[layer], dtype=torch.int32) for layer in (2, 0, 1)}),
        ("a.bin", {f"model.layers.{layer}.mlp": ROWS[layer][::-1] for layer in (1, 2, 0)}),
        ("a.json", ROWS),
        ("a.json", {"2": ROWS[2], "0": ROWS[0], "1": ROWS[1]}),
        ("a.safetensors", {f"layer.{layer}": torch.tensor(row) for layer, row in enumerate(ROWS)}),
    ],
)
def test_indices_from_files(tmp_path, name, value):
    assert load_topk_indices(save(value, tmp_path / name)) == ROWS


def test_more_than_ten_layers_stay_in_order(tmp_path):
    rows = {f"layer.{layer}": torch.tensor([layer]) for layer in range(12)}
    assert load_topk_indices(save(rows, tmp_path / "a.safetensors")) == [[layer] for layer in range(12)]


@pytest.mark.parametrize(
    "name, value, why",
    [
        ("a.pt", [], "row of channel indices for each layer"),
        ("a.pt", "rows", "row of channel indices for each layer"),
        ("a.pt", torch.tensor([1, 2]), "layer 0: channel indices must be whole numbers"),
        ("a.pt", torch.tensor([[0.5, 1.0]]), "whole numbers"),
        ("a.json", [[0, 1], []], "layer 1: channel indices must be whole numbers"),
        ("a.json", [[True, False]], "whole numbers"),
        ("a.json", [[-1, 2]], "whole numbers"),
        ("a.json", [[2, 2]], "listed twice"),
        ("a.json", {"0": [1], "2": [1]}, "layers 0 to 1, each once"),
        ("a.json", {"gate": [1]}, "layers 0 to 0, each once"),
        ("a.json", {"0": [1], "x.0": [1]}, "layers 0 to 1, each once"),
    ],
)
def test_files_that_are_refused(tmp_path, name, value, why):
    with pytest.raises(InputError, match=why):
        load_topk_indices(save(value, tmp_path / name))


class Harm:
    def __reduce__(self):
        return open, ("harm", "w")


def test_damaged_missing_and_harmful_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no file of channel indices"):
        load_topk_indices(tmp_path / "none.pt")
    for name in ("a.pt", "a.safetensors", "a.json"):
        (tmp_path / name).write_bytes(b"garbage")
        with pytest.raises(InputError, match=name):
            load_topk_indices(tmp_path / name)
    torch.save([Harm()], "b.pt")
    (tmp_path / "c.pt").write_bytes(pickle.dumps([Harm()], protocol=2))
    for name in ("b.pt", "c.pt"):
        with pytest.raises(InputError, match=f"{name} cannot be read") as caught:
            load_topk_indices(name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_equals_masking(family):
    dense, pruned = tiny_model(family), tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    indices = [torch.randperm(64, generator=generator)[:40].tolist() for _ in range(3)]
    assert prune_llama_ffn(pruned, indices) is pruned and models.widths(pruned) == [40] * 3
    assert pruned.config.get_text_config().intermediate_size == 40
    masks = [torch.zeros(64, dtype=torch.bool).index_fill(0, torch.tensor(row), True) for row in indices]
    ids = torch.tensor([tiny_examples(1)[0].prompt])
    with masked(dense, masks):
        torch.testing.assert_close(pruned(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_pruning_refusals_and_layers():
    model = tiny_model()
    assert resolve_decoder_layers(model) == list(model.model.layers)
    for indices, why in (
        ([[1]] * 2, "for 2 layers, the model has 3"),
        ([[1], [64], [1]], "layer 1: channel 64 does not exist, the layer has 64"),
        ([[1], [1], []], "layer 2: channel indices"),
    ):
        with pytest.raises(InputError, match=why):
            prune_llama_ffn(model, indices)
    with pytest.raises(InputError, match="no decoder layers"):
        resolve_decoder_layers(torch.nn.Linear(2, 2))
    assert models.widths(model) == [64] * 3
    assert {"resolve_decoder_layers", "load_topk_indices", "prune_llama_ffn"} <= set(dir(persona_pruner))
