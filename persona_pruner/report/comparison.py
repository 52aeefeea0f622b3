"""What `compare` and `analyse` found: Markdown, CSV, JSON, a page of plots, and a table for the terminal."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from persona_pruner import files
from persona_pruner.report.facts import percent
from persona_pruner.report.pages import template

COLUMNS = {
    "kl": ("KL", "{:.3f}", 1),
    "nll_drop": ("NLL drop", "{:.3f}", 1),
    "neutral_nll_drop": ("neutral NLL drop", "{:.3f}", 1),
    "rouge_l": ("ROUGE-L", "{:.3f}", 1),
    "quiz": ("quiz", "{:.0%}", 1),
    "judge_drop": ("judge drop", "{:.1f}", 1),
    "parameters": ("parameters, M", "{:.1f}", 1e-6),
    "seconds": ("seconds", "{:.0f}", 1),
    "peak_bytes": ("peak GB", "{:.2f}", 1e-9),
}
NOTES = (
    "Drop: pruned minus dense, lower is better; mean over personas (± sample standard deviation over them) of the mean "
    "over seeds. KL and NLL: nats per token of the dense model's own answers to held-out questions. ROUGE-L: greedy "
    "answers against the dense model's greedy answers. Quiz: 60 multiple-choice questions, length-normalised. "
    "Parameters: nonzero ones outside the embedding table and the head. Seconds: scores, search, repair and recovery; "
    "the data of the persona are not in them."
)


def _cell(line: dict, name: str) -> str:
    _, form, unit = COLUMNS[name]
    if line.get(name) is None:
        return ""
    spread = line.get(f"{name}_sd")
    return form.format(line[name] * unit) + (f" ± {spread:.3f}" if spread is not None else "")


def _names(table: Sequence[dict]) -> list[str]:
    return [name for name in COLUMNS if any(line.get(name) is not None for line in table)]


def headline(found: dict) -> list[str]:
    """One sentence for each own method of one headline."""
    base = f"{found['baseline']} (KL {found['kl']:.3f})"
    out = []
    for method, share in sorted(found["own"].items(), key=lambda item: -item[1]["kl_removed"]):
        less = "less" if share["neutral_difference"] < 0 else "more"
        out.append(
            f"ratio {found['ratio']:g}, {found['kind']}: {method} removes {share['kl_removed']:.1%} of the KL and "
            f"{share['nll_removed']:.1%} of the NLL drop of the strongest baseline with generic calibration, {base}; "
            f"{abs(share['neutral_difference']):.3f} {less} neutral NLL drop."
        )
    return out


def _rows(lines: Sequence[Sequence[str]]) -> list[str]:
    head, *body = lines
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]


def markdown(result: dict) -> str:
    """The tables and headlines as Markdown."""
    run, names = result["run"], _names(result["table"])
    out = [f"# {run['model']}: {len(run['personas'])} personas, {run['seeds']} seed(s)", ""]
    crew = f"{run['workers']} processes of " if run["workers"] > 1 else ""
    out += [f"{_about(run)}, {crew}{run['threads']} thread(s).", ""]
    for ratio in run["ratios"]:
        out += [f"## {percent(ratio)} of the FFN channels removed", ""]
        head = ["method", "calibration", *(COLUMNS[name][0] for name in names)]
        body = [
            [line["method"], line["calibration"], *(_cell(line, name) for name in names)]
            for line in result["table"]
            if line["ratio"] == ratio
        ]
        out += [*_rows([head, *body]), ""]
        for found in result["headlines"]:
            if found["ratio"] == ratio:
                out += [f"- {text}" for text in headline(found)]
        out.append("")
    tasks = sorted({name for line in result["table"] for name in line["tasks"]})
    if tasks:
        head = ["method", "calibration", "ratio", *tasks]
        body = [
            [line["method"], line["calibration"], f"{line['ratio']:g}"]
            + [f"{line['tasks'][name]:.3f}" if line["tasks"].get(name) is not None else "" for name in tasks]
            for line in result["table"]
        ]
        out += ["## lm-eval", "", *_rows([head, *body]), ""]
    out += ["## Methods", "", *(f"- **{name}**: {how}." for name, how in result["methods"].items()), "", NOTES, ""]
    if result["judge"]:
        out += [*_judge(result), ""]
    return "\n".join(out)


def _judge(result: dict) -> list[str]:
    judge = result["judge"]
    out = [
        "## Judge",
        "",
        f"{judge['judge']} at {judge['url']}; drop in points of 0 to 100 from the dense model's score.",
        "",
    ]
    head = ["persona", "dense score", "scored", "refusals", "not understood", "probability covered", "prompt sha256"]
    body = [
        [name, *(_number(found[key]) for key in ("score", "scored", "refusals", "unread", "mass")), found["prompt"]]
        for name, found in judge["dense"].items()
    ]
    out += _rows([head, *body])
    scored = [cell["judge"] for cell in result["cells"]]
    masses = [found["mass"] for found in scored if found["mass"] is not None]
    wins = [found["preferred_to_dense"] for found in scored if found["preferred_to_dense"] is not None]
    refusals, unread = (sum(found[key] for found in scored) for key in ("refusals", "unread"))
    said = f"Over all cells: {refusals} refusals, {unread} not understood"
    if masses:
        said += f", mean probability of number tokens covered {sum(masses) / len(masses):.3f}"
    if wins:
        said += f"; preferred to the dense answer (both orders) {sum(wins) / len(wins):.1%}"
    return [*out, "", f"{said}."]


def _number(value) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def csv_text(cells: Sequence[dict]) -> str:
    """Every cell as a line."""
    out = io.StringIO()
    names = ["method", "calibration", "ratio", "seed", "persona", *COLUMNS, "judge_score"]
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        writer.writerow(cell | {"judge_score": (cell.get("judge") or {}).get("score")})
    return out.getvalue()


def page(title: str, about: str, sentences: Sequence[str], pictures: dict[str, str]) -> str:
    """A self-contained page of plots: pictures are inline SVG by caption."""
    from markupsafe import Markup

    shown = {caption: Markup(svg) for caption, svg in pictures.items()}
    return template("comparison.html").render(title=title, about=about, sentences=sentences, pictures=shown)


def _about(run: dict) -> str:
    return f"{run['date']}, {run['machine']}, {run['dtype']}, version {run['version']}"


def write_comparison(result: dict, folder: Path) -> None:
    """compare.json, .csv, .md and .html in a folder."""
    from persona_pruner.report import comparison_plots as plots

    files.write_json(folder / "compare.json", result)
    files.write_text(folder / "compare.csv", csv_text(result["cells"]))
    files.write_text(folder / "compare.md", markdown(result))
    pictures = {}
    for ratio in result["run"]["ratios"]:
        lines = [line for line in result["table"] if line["ratio"] == ratio]
        if lines:
            pictures[f"KL to the dense model, {percent(ratio)} removed"] = plots.bars(lines)
            pictures[f"The persona against everything else, {percent(ratio)} removed"] = plots.trade(lines)
    sentences = [text for found in result["headlines"] for text in headline(found)]
    run = result["run"]
    title = f"{run['model']}: {len(run['personas'])} personas, every method"
    files.write_text(folder / "compare.html", page(title, _about(run), sentences, pictures))


def comparison_table(result: dict) -> Group:
    """Tables and headlines for `Console.print`."""
    names = [name for name in _names(result["table"]) if name not in ("parameters", "peak_bytes")]
    parts = []
    for ratio in result["run"]["ratios"]:
        table = Table(title=f"{percent(ratio)} of the FFN channels removed", title_justify="left", title_style="bold")
        table.add_column("method", no_wrap=True)
        table.add_column("calibration")
        for name in names:
            table.add_column(COLUMNS[name][0], justify="right")
        for line in result["table"]:
            if line["ratio"] == ratio:
                style = "bold" if line["method"].startswith("persona") else None
                cells = [_cell(line, name) for name in names]
                table.add_row(Text(line["method"]), line["calibration"], *cells, style=style)
        parts.append(table)
    return Group(*parts, *(Text(text) for found in result["headlines"] for text in headline(found)))


def write_analysis(result: dict, folder: Path) -> None:
    """analyse.json, .md and .html in a folder; each study is {"title", "about", "head", "rows", "plot"}."""
    from persona_pruner.report import comparison_plots as plots

    files.write_json(folder / "analyse.json", result)
    out, run = (
        [f"# {result['run']['model']}: what the mask depends on", "", f"{_about(result['run'])}.", ""],
        result["run"],
    )
    pictures = {}
    for study in result["studies"].values():
        rows = [[_number(value) for value in row] for row in study["rows"]]
        out += [f"## {study['title']}", "", study["about"], "", *_rows([study["head"], *rows]), ""]
        pictures[study["title"]] = plots.study(study)
    files.write_text(folder / "analyse.md", "\n".join(out))
    files.write_text(folder / "analyse.html", page(out[0].removeprefix("# "), _about(run), [], pictures))
