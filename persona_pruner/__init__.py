"""Run a language model as one character at a fraction of its cost."""

import importlib

from persona_pruner.formats import plugin as _plugin

__version__ = "0.1.0"

# Public names by the module that defines them; loaded on first use, so that importing the package is quick.
_PUBLIC = {
    "Persona": "persona",
    "PersonaFile": "formats.persona_file",
    "sculpt": "pipeline",
    "Fleet": "fleet",
    "Sampling": "fleet",
    "SculptResult": "pipeline",
    "sculpt_many": "many",
    "SculptConfig": "config",
    "load_model": "models",
    "SparseLinear24": "nn.sparse",
    "sparsify_": "nn.sparse",
    "save_packed": "formats.packed",
    "ops": "ops",
    "resolve_decoder_layers": "compat",
    "load_topk_indices": "compat",
    "prune_llama_ffn": "compat",
    "InputError": "errors",
    "RunError": "errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'persona_pruner' has no attribute {name!r}")
    module = importlib.import_module(f"persona_pruner.{_PUBLIC[name]}")
    return module if name == _PUBLIC[name] else getattr(module, name)


def __dir__():
    return __all__


_plugin.install()
