"""Tasks of EleutherAI's lm-evaluation-harness by name (PIQA, OpenBookQA, ...), where it is installed."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from persona_pruner.errors import InputError, RunError


def harness(
    model: nn.Module, tokenizer, tasks: Sequence[str], limit: int | None = None, include: str | Path | None = None
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of lm-eval on a model in memory.

    tasks: names that lm-eval knows, or that task files in the folder `include` define; `limit` questions of each, all
    by default. Raises InputError without the extra `lm-eval` and for unknown tasks, RunError when a data set cannot be
    had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("tasks by name need the extra `lm-eval` (pip install persona-pruner[lm-eval])") from None
    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise InputError(f"lm-eval knows no task {unknown[0]!r}")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    try:
        found = simple_evaluate(
            model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False
        )
    except (OSError, ConnectionError) as error:
        raise RunError(f"the data of {', '.join(tasks)} cannot be had: {str(error).splitlines()[0]}") from error
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and "stderr" not in name
        }
        for task, values in found["results"].items()
    }
