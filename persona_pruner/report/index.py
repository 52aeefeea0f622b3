"""summary.csv and index.html: many sculpts on one page."""

import csv
import io
import statistics

from persona_pruner.config import SculptConfig
from persona_pruner.report import facts
from persona_pruner.report.pages import template

COLUMNS = (
    "name", "persona", "status", "kl", "nll_drop", "neutral_nll_drop", "baseline", "kl_removed", "kept", "bytes",
    "seconds", "attempts", "folder", "error",
)  # fmt: skip


def csv_text(rows: list[dict]) -> str:
    """The rows of `many.sculpt_many` as CSV. A text that a spreadsheet would take for a formula gets a quote before."""

    def cell(value):
        dangerous = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        return f"'{value}" if dangerous else value

    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(row.get(name)) for name in COLUMNS} for row in rows)
    return out.getvalue()


def html(rows: list[dict], model: str, config: SculptConfig) -> str:
    """The page that links all reports; the rows are those of `many.sculpt_many`."""
    done = [row for row in rows if row["status"] == "done"]
    gains = [row["kl_removed"] for row in done if row.get("kl_removed") is not None]
    return template("index.html").render(
        rows=rows,
        model=model,
        removed=facts.removed(config.ratio, config.format),
        done=len(done),
        failed=sum(row["status"] == "failed" for row in rows),
        bytes=sum(row["bytes"] for row in done),
        median_kl=statistics.median(row["kl"] for row in done) if done else None,
        median_gain=statistics.median(gains) if gains else None,
        most=max((row["kl"] for row in done), default=0) or 1,
    )
