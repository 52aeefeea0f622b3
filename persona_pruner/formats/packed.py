"""The packed checkpoint: a Hugging Face folder whose linear layers are 2:4 packed; docs/packed-format.md has the bytes.

A layer X is stored as X.values, X.meta, X.scales (int8 only) and X.weight, one NaN (see SparseLinear24); all other
weights as ever. config.json names the packed layers under `quantization_config`. After `import persona_pruner`,
`AutoModelForCausalLM.from_pretrained(folder)` reads it; without, PLEA makes transformers refuse, and X.weight others.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from persona_pruner import files, models
from persona_pruner.errors import InputError
from persona_pruner.nn.sparse import packed_layers, sparsify_
from persona_pruner.ops.select24 import pack_meta

METHOD = "persona_pruner"
VERSION = 1
# Stands in config.json as `transformers_weights`, the file with the weights: transformers raises ValueError with these
# words, for there is no such file, unless the quantizer has taken them out.
PLEA = "import persona_pruner before loading this packed checkpoint"
PT = {"format": "pt"}  # what transformers expects in a safetensors header
KINDS = {"int8": torch.int8, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quantization_config(model: nn.Module) -> dict:
    """What config.json says of a model's packed layers: {name: dtype of its values, None for the model's own}."""
    modules = {}
    for name, layer in packed_layers(model).items():
        stored = layer.values.dtype
        if stored not in KINDS.values() or (stored == torch.int8 and layer.weight.dtype != model.dtype):
            raise InputError(f"{name}: {stored} values computing in {layer.weight.dtype} do not fit the format")
        modules[name] = None if stored == model.dtype else str(stored).removeprefix("torch.")
    return {"quant_method": METHOD, "version": VERSION, "modules": modules}


def _check_plain(model: nn.Module) -> None:
    """Raises InputError unless the config alone gives layers of the packed shapes."""
    with torch.device("meta"), models.quiet_transformers():
        skeleton = type(model)(copy.deepcopy(model.config))
    for name, layer in packed_layers(model).items():
        plain = skeleton.get_submodule(name)
        if (plain.in_features, plain.out_features) != (layer.in_features, layer.out_features):
            raise InputError(
                f"{name} is not of the width that the config gives: layers of different width do not fit a checkpoint"
            )


def save_packed(
    model: nn.Module,
    folder: str | Path,
    tokenizer=None,
    *,
    max_shard_size: int | str = "5GB",
    extra: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Writes a model packed by `sparsify_` (and its tokenizer) so that transformers loads it again, bit for bit.

    The folder appears whole or not at all and takes the place of an older one; `extra` may add files to it. Raises
    InputError when nothing is packed, metadata is corrupt or layers of a kind differ in width, RunError when the
    disk refuses.
    """
    if not hasattr(model, "save_pretrained"):
        raise InputError(f"{type(model).__name__} is not a model of transformers; store its state_dict() instead")
    layers = packed_layers(model)
    if not layers:
        raise InputError("the model has no packed layers; call sparsify_ first")
    for layer in layers.values():
        layer.check()
    _check_plain(model)
    found = quantization_config(model)

    def write(temporary: Path) -> None:
        with models.quiet_transformers():
            model.save_pretrained(temporary, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        config = files.read_json(temporary / "config.json")
        added = {"quantization_config": found, "transformers_weights": PLEA}
        files.write_json(temporary / "config.json", {**config, **added})
        extra(temporary)

    return files.write_folder(folder, write)


@torch.no_grad()
def is_packed(folder: str | Path) -> bool:
    """Whether a folder's config.json says that it is a packed checkpoint."""
    config = Path(folder) / "config.json"
    return config.exists() and _method(files.read_json(config)) == METHOD


def unpack(folder: str | Path, out: str | Path) -> Path:
    """Writes a packed checkpoint as an ordinary one, dense with zeros, in its own dtype, with its tokenizer.

    Raises InputError when the folder is no packed checkpoint or damaged, RunError when the disk refuses.
    """
    if not is_packed(folder):
        raise InputError(f"{folder} is not a packed checkpoint")
    model, tokenizer = _load(folder)
    model.dequantize()

    def write(temporary: Path) -> None:
        with models.quiet_transformers():
            model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)

    return files.write_folder(out, write)


def read_sparse(folder: str | Path):
    """(model, tokenizer or None) packed from a local checkpoint that already is 2:4 sparse; nothing is rounded.

    Reads dense weights with zeros, where every linear of the decoder layers must be 2:4, and the retired
    `sparse-24-bitmask` of compressed-tensors. Raises InputError for anything else, packed checkpoints included.
    """
    config = files.read_json(Path(folder) / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder}/config.json is not an object")
    if not config.get("quantization_config") and "compression_config" not in config:
        model, tokenizer = _load(folder)
        sparsify_(model, exact=True)
        return model, tokenizer
    quantized = config.get("quantization_config") or config.get("compression_config")
    sparsity = quantized.get("sparsity_config") if isinstance(quantized, dict) else None
    if not isinstance(sparsity, dict) or sparsity.get("format") != "sparse-24-bitmask":
        raise InputError(f"{folder} is neither dense nor sparse-24-bitmask: {_method(config) or 'unknown format'}")
    if quantized.get("config_groups"):
        raise InputError(f"{folder} is quantized as well as sparse; only unquantized sparse-24-bitmask is read")
    return _load_bitmask(Path(folder), config)


def _method(config) -> str | None:
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found.get("quant_method") if isinstance(found, dict) else None


def _load(folder):
    """(model, tokenizer or None) of a local folder."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with models.quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(folder)
            has_tokenizer = any(Path(folder).glob("tokenizer*"))
            tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder} cannot be loaded: {reason}") from error
    return models.prepare(model), tokenizer


def bitmask24(shape: Tensor, compressed: Tensor, bitmask: Tensor) -> tuple[Tensor, Tensor]:
    """(values, meta) of a weight in the sparse-24-bitmask format of compressed-tensors.

    shape: the two sizes of the dense weight; compressed [R, C/2]: the two kept weights of every four in order;
    bitmask uint8 [R, ceil(C/8)]: bit c % 8 of byte c // 8 is set where column c is kept. Source: the class
    Sparse24BitMaskCompressor of https://github.com/neuralmagic/compressed-tensors (0.9, Apache-2.0), retired in 2026.
    Raises InputError when sizes disagree or a group of four does not keep two.
    """
    sizes = shape.flatten().tolist()
    if len(sizes) != 2 or sizes[1] % 4 or compressed.shape != (sizes[0], sizes[1] // 2):
        raise InputError(f"sparse-24-bitmask: {list(compressed.shape)} values for a weight of {sizes}")
    rows, cols = sizes
    if bitmask.dtype != torch.uint8 or bitmask.shape != (rows, -(-cols // 8)):
        raise InputError(f"sparse-24-bitmask: a mask of {bitmask.dtype} {list(bitmask.shape)} for a weight of {sizes}")
    bits = np.unpackbits(bitmask.numpy(), axis=1, count=cols, bitorder="little").reshape(rows, cols // 4, 4)
    if not (bits.sum(-1) == 2).all():
        raise InputError("sparse-24-bitmask: a group of four does not keep exactly two weights")
    kept = torch.from_numpy(bits.nonzero()[2].reshape(rows, cols // 4, 2))
    return compressed, pack_meta(kept)


def _load_bitmask(folder, config):
    """The folder's model by way of a packed copy: transformers takes tensors from files only."""
    from safetensors.torch import save_file

    state, modules = {}, {}
    tensors = _read_tensors(folder)
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "compressed":
            trio = [tensors.get(f"{layer}.{key}") for key in ("shape", "compressed", "bitmask")]
            if any(one is None for one in trio):
                raise InputError(f"{folder}: {layer} lacks its shape or bitmask")
            state[f"{layer}.values"], state[f"{layer}.meta"] = bitmask24(*trio)
            state[f"{layer}.weight"] = torch.full((1,), torch.nan, dtype=tensor.dtype)
            modules[layer] = None
        elif f"{layer}.compressed" not in tensors or part == "bias":
            state[name] = tensor
    config = {key: value for key, value in config.items() if key != "compression_config"}
    config["quantization_config"] = {"quant_method": METHOD, "version": VERSION, "modules": modules}
    with tempfile.TemporaryDirectory() as name:
        copied = Path(name)
        for file in folder.iterdir():
            if file.is_file() and ".safetensors" not in file.name:
                shutil.copy(file, copied)
        files.write_json(copied / "config.json", config)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, copied / "model.safetensors", PT)
        model, tokenizer = _load(copied)
    model.config.name_or_path = str(folder)
    return model, tokenizer


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        try:
            names = sorted(set(files.read_json(index)["weight_map"].values()))
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{index} is damaged") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index} names a file outside its folder: {name}")
        try:
            tensors |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder / name} cannot be read: {error}") from error
    return tensors
