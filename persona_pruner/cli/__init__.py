"""The `persona-pruner` command. Exit codes: 0 done, 1 the run failed, 2 the request cannot be met.

A command is a function in a module of this folder, which is imported here.
"""

import os
import sys

from persona_pruner.cli import character, checkpoints, compare, machine, sculpt, serve  # noqa: F401
from persona_pruner.cli.app import app, err
from persona_pruner.errors import InputError, PersonaPrunerError


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and exits with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def fail(text: str, code: int) -> None:
        err.print(f"persona-pruner: {text}", style="red")
        sys.exit(code)

    try:
        app(args=arguments)
    except PersonaPrunerError as error:
        if debug:
            raise
        fail(str(error), 2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        fail("interrupted", 1)
    except Exception as error:
        if debug:
            raise
        reason = str(error).splitlines()[0] if str(error) else "no message"
        fail(f"{type(error).__name__}: {reason} (--debug shows where)", 1)
    return 0
