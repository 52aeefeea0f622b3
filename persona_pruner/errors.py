"""The two kinds of failure a user meets; the command line turns them into exit codes."""


class PersonaPrunerError(Exception):
    """Base of every error raised on purpose; its text is one sentence for the user."""


class InputError(PersonaPrunerError, ValueError):
    """The request cannot be met as asked: bad card, ratio, model, file (exit code 2)."""


class RunError(PersonaPrunerError, RuntimeError):
    """The request was fine but the run failed: disk full, endpoint down (exit code 1)."""
