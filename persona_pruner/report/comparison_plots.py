"""The pictures of `compare` and `analyse`, in the manner of `plots`."""

import numpy as np

from persona_pruner.report.plots import ACCENT, OTHER, TEXT, _figure, _styled


def _colour(line: dict) -> str:
    return ACCENT if line["method"].startswith("persona") else OTHER


def _label(line: dict) -> str:
    whose = line["calibration"]
    return (
        line["method"]
        if whose in ("none", "shared") or line["method"].startswith("persona")
        else (f"{line['method']}, {whose}")
    )


@_styled
def bars(lines):
    """KL of every line, least first, with its standard deviation over personas. lines: those of one ratio."""
    lines = sorted(lines, key=lambda line: line["kl"])
    figure = _figure(0.6 + 0.26 * len(lines))
    axes = figure.add_subplot()
    places = np.arange(len(lines))
    axes.barh(places, [line["kl"] for line in lines], height=0.62, color=[_colour(line) for line in lines])
    spreads = [line["kl_sd"] or 0.0 for line in lines]
    if any(spreads):
        axes.errorbar([line["kl"] for line in lines], places, xerr=spreads, fmt="none", ecolor=TEXT, elinewidth=1)
    axes.set(yticks=places, yticklabels=[_label(line) for line in lines], xlabel="nats per answer token")
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xscale("log" if lines[-1]["kl"] > 12 * max(lines[0]["kl"], 1e-9) else "linear")
    axes.grid(axis="x", lw=0.6)
    said = "; ".join(f"{_label(line)} {line['kl']:.3f}" for line in lines)
    return figure, f"Bar chart of KL on held-out questions: {said}."


@_styled
def trade(lines):
    """KL on the persona's questions against the NLL drop on neutral text, the better half by KL named."""
    figure = _figure(3.6)
    axes = figure.add_subplot()
    best = sorted(lines, key=lambda line: line["kl"])[: max(10, len(lines) // 2)]
    for line in best:
        axes.plot(line["kl"], line["neutral_nll_drop"], "o", ms=6, color=_colour(line))
        at = (line["kl"], line["neutral_nll_drop"])
        axes.annotate(_label(line), at, (4, 3), textcoords="offset points", size=7)
    axes.set(xlabel="KL on the persona's questions", ylabel="NLL drop on neutral text")
    axes.grid(lw=0.6)
    said = "; ".join(f"{_label(x)} {x['kl']:.3f} and {x['neutral_nll_drop']:.3f}" for x in best)
    return figure, f"KL on persona questions and neutral NLL drop: {said}."


@_styled
def study(found):
    """One study: bars of a column by the first one, a line over a number, or a heat map of a square table."""
    plot, rows = found["plot"], found["rows"]
    if plot["kind"] == "heat":
        values = np.array([row[1:] for row in rows], float)
        figure = _figure(1.4 + 0.42 * len(rows))
        axes = figure.add_subplot()
        axes.imshow(values, "cividis_r", aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            axes.text(
                x,
                y,
                f"{value:.2f}",
                ha="center",
                va="center",
                size=8,
                color="white" if value > np.median(values) else "black",
            )
        axes.set(yticks=range(len(rows)), yticklabels=[row[0] for row in rows])
        axes.set_xticks(range(values.shape[1]), found["head"][1:], rotation=30, ha="right")
        axes.spines[:].set_visible(False)
    else:
        column = found["head"].index(plot["value"])
        names, values = [row[0] for row in rows], [row[column] for row in rows]
        if plot["kind"] == "line":
            figure = _figure(2.8)
            axes = figure.add_subplot()
            axes.plot(names, values, color=ACCENT, marker="o", lw=2)
            axes.set(xlabel=found["head"][0], ylabel=plot["value"])
            axes.set_ylim(0, None)
        else:
            figure = _figure(0.8 + 0.3 * len(rows))
            axes = figure.add_subplot()
            axes.barh(range(len(rows)), values, color=ACCENT, height=0.6)
            axes.set(yticks=range(len(rows)), yticklabels=names, xlabel=plot["value"])
            axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(lw=0.6)
    said = "; ".join(", ".join(str(value) for value in row) for row in rows)
    return figure, f"{found['title']}: {said}."
