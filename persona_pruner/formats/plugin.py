"""Makes transformers load packed checkpoints, whichever of the two packages is imported first.

transformers has a public registry of quantizers but no entry point that would call us, and `import persona_pruner`
must stay quick. So the import of the registry's module is watched: right after it has run, ours registers itself.
"""

import importlib
import sys
import warnings
from importlib.machinery import PathFinder

REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Registers the quantizer; a transformers that lacks the registry's functions is a warning, not a failed import."""
    try:
        importlib.import_module("persona_pruner.formats.quantizer")
    except Exception as error:
        warnings.warn(f"persona_pruner cannot load packed checkpoints with this transformers: {error}", stacklevel=2)


class _Watch:
    """An entry of sys.meta_path that finds the registry as usual and registers once it has been executed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != REGISTRY or (spec := PathFinder.find_spec(name, path, target)) is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            execute(module)
            sys.meta_path[:] = [entry for entry in sys.meta_path if entry is not _Watch]
            register()

        spec.loader.exec_module = execute_and_register
        return spec


def install() -> None:
    """Registers now if transformers' registry is loaded, else as soon as it is."""
    if REGISTRY in sys.modules:
        register()
    elif _Watch not in sys.meta_path:
        sys.meta_path.insert(0, _Watch)
