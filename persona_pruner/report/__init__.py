"""What a sculpt found, for people: a page, a model card, settings as YAML, a table for the terminal."""

import importlib

# Names by the module that makes them; loaded on first use, so that importing this package does not load matplotlib.
_PUBLIC = {
    "html": "page",
    "model_card": "card",
    "run_yaml": "card",
    "table": "console",
    "comparison_table": "comparison",
    "write_analysis": "comparison",
    "write_comparison": "comparison",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'persona_pruner.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f"persona_pruner.report.{_PUBLIC[name]}"), name)


def __dir__():
    return __all__
