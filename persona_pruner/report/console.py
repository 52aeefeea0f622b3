"""The numbers as tables for the terminal."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from persona_pruner.report import facts


def table(metrics: dict) -> Group:
    """Size and speed, then fidelity of every method, then the result in one sentence; for `Console.print`."""
    run = metrics["run"]
    title = Text(f"{facts.one_line(run['persona'])} on {run['model']}", overflow="ellipsis", no_wrap=True)
    size = Table("", title=title, title_justify="left", title_style="bold")
    for name in ("dense", "pruned", "pruned / dense"):
        size.add_column(name, justify="right")
    for line in facts.sizes(metrics):
        size.add_row(line.label, line.dense, line.pruned, line.ratio)

    test = metrics["held_out"]
    method = Table(
        "method",
        title=f"{test['questions']} held-out questions, {test['tokens']:,} answer tokens; nats per token, lower is better",
        title_justify="left",
        title_style="",
    )
    for name in ("NLL drop", "KL", "neutral NLL drop", "kept a layer"):
        method.add_column(name, justify="right")
    for row in facts.methods(metrics):
        name = f"{row.name} (best baseline)" if row.best else row.name
        style = "bold" if row.product else None
        method.add_row(Text(name), row.nll_drop, row.kl, row.neutral, row.kept, style=style)
    return Group(size, method, Text(facts.headline(metrics)))
