"""The pictures of the report, as inline SVG that takes its colours from the page (dark mode included)."""

import io
import re
from collections.abc import Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# Stand-ins that are replaced by the page's colours.
TEXT, GRID, ACCENT, SOFT, OTHER, OTHER_SOFT = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
COLOURS = {
    TEXT: "currentColor",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
    SOFT: "var(--accent-soft)",
    OTHER: "var(--other)",
    OTHER_SOFT: "var(--other-soft)",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "persona-pruner",
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "grid.color": GRID,
    "text.color": TEXT,
    "text.parse_math": False,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "legend.frameon": False,
    "legend.labelcolor": TEXT,
}
WIDTH = 5.2  # inches: text keeps a readable size when a phone shows the picture at 0.9 of that
BINS = 96
SHADES = LinearSegmentedColormap.from_list("kept", ["#132238", "#1f5f8b", "#54b0a5", "#f2e9a8"])


def _styled(draw):
    """Runs a drawing function under STYLE on top of matplotlib's defaults, whatever the user's own are."""

    def run(*args) -> str:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return _svg(*draw(*args))

    run.__doc__ = draw.__doc__
    return run


def _svg(figure: Figure, alt: str) -> str:
    """The figure as an <svg> element with `alt` as its text; no ids but those it refers to itself, no external names."""
    FigureCanvasSVG(figure)
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r'font: ([\d.]+px)[^";]*', r"font-size: \1", text)
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    head = re.search(r'viewBox="[^"]*"', text)[0]
    label = escape(alt, quote=True)
    return f'<svg role="img" aria-label="{label}" {head}>' + text[text.index(">") + 1 :].strip()


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def density(masks: Sequence[np.ndarray], bins: int = BINS) -> np.ndarray:
    """[layers, columns] share of channels kept, in at most `bins` equal columns; single channels where they fit."""
    columns = min(bins, *map(len, masks))
    rows = []
    for mask in masks:
        edges = np.linspace(0, len(mask), columns + 1).round().astype(int)
        rows.append(np.add.reduceat(np.asarray(mask, float), edges[:-1]) / np.diff(edges))
    return np.stack(rows)


@_styled
def channels(masks):
    """Heat map, layers downward and channels to the right, of what the mask keeps. masks: bool [C] a layer."""
    shares = density(masks)
    layers, columns = shares.shape
    width = max(map(len, masks))
    figure = _figure(min(6.0, 1.6 + 0.1 * layers))
    axes = figure.add_subplot()
    # Cells as vectors would be thousands of shapes; the image is drawn larger than shown so that edges stay sharp.
    fine = shares.repeat(max(1, 960 // columns), 1).repeat(max(1, 480 // layers), 0)
    image = axes.imshow(
        fine, SHADES, aspect="auto", interpolation="none", vmin=0, vmax=1, extent=(0, width, layers - 0.5, -0.5)
    )
    axes.spines[:].set_visible(False)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="channel", ylabel="layer")
    bar = figure.colorbar(image, ax=axes, location="top", aspect=40, shrink=0.7, pad=0.02)
    bar.outline.set_visible(False)
    many = columns < width
    bar.set_label(f"share kept of {width / columns:.3g} neighbouring channels" if many else "kept (1) or removed (0)")
    kept = sum(int(np.sum(mask)) for mask in masks)
    total = sum(map(len, masks))
    alt = f"Heat map of kept channels: {layers} layers by {width} channels, {kept:,} of {total:,} channels kept"
    return figure, f"{alt} ({100 * kept / total:.1f}%)."


@_styled
def layer_widths(total, kept, other_name, other):
    """Kept channels of every layer, with those of the other way to spread them (None without one). Counts a layer."""
    layers = len(kept)
    figure = _figure(2.5)
    axes = figure.add_subplot()
    places = np.arange(layers)
    axes.bar(places, kept, width=0.8, color=ACCENT, label="this persona")
    if other:
        axes.step(
            [*(places - 0.5), layers - 0.5], [*other, other[-1]], where="post", color=OTHER, lw=2, label=other_name
        )
    axes.plot([-0.5, layers - 0.5], [max(total)] * 2, color=TEXT, ls=":", lw=1, label="dense")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="layer", ylabel="kept channels", xlim=(-0.7, layers - 0.3), ylim=(0, max(total) * 1.04))
    axes.grid(axis="y", lw=0.6)
    figure.legend(loc="outside upper left", ncols=3, handlelength=1.4)
    alt = f"Kept channels per layer: {', '.join(map(str, kept))}."
    return figure, f"{alt} {other_name}: {', '.join(map(str, other))}." if other else alt


@_styled
def curve(losses, flips, loss_name):
    """Loss of every search step, and the channels it exchanged."""
    figure = _figure(3.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = np.arange(1, len(losses) + 1)
    upper.plot(steps, losses, color=ACCENT, lw=2, marker="o", ms=3 if len(losses) < 60 else 0)
    upper.set_ylabel("loss")
    lower.bar(steps, flips, color=OTHER)
    lower.set(xlabel="step", ylabel="flips")
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes in (upper, lower):
        axes.grid(axis="y", lw=0.6)
    figure.align_ylabels()
    alt = f"Search curve over {len(losses)} steps: {loss_name} from {losses[0]:.3f} to {losses[-1]:.3f} nats per token"
    return figure, f"{alt}; channels exchanged per step from {flips[0]:,} to {flips[-1]:,}."


@_styled
def drops(rows, ours):
    """KL and NLL drop of every method. rows: (name, KL, NLL drop); the first `ours` of them are this package's."""
    figure = _figure(0.7 + 0.58 * len(rows))
    axes = figure.add_subplot()
    values = [value for _, *pair in rows for value in pair]
    low, high = min(0.0, *values), max(0.0, *values)
    span = (high - low) or 1.0
    for place, (name, *pair) in enumerate(rows):
        colours = (ACCENT, SOFT) if place < ours else (OTHER, OTHER_SOFT)
        axes.text(low, place - 0.36, name, va="center", weight="bold" if place == 0 else "normal")
        for offset, value, colour in zip((-0.07, 0.2), pair, colours, strict=True):
            axes.barh(place + offset, value, height=0.25, color=colour)
            axes.text(max(value, 0) + 0.01 * span, place + offset, f"{value:.3f}", va="center", size=9)
    axes.axvline(0, color=TEXT, lw=0.8)
    axes.set(ylim=(len(rows) - 0.5, -0.6), xlim=(low, high + 0.12 * span), yticks=[], xlabel="nats per answer token")
    axes.spines["left"].set_visible(False)
    said = "; ".join(f"{name} {kl:.3f} and {nll:.3f}" for name, kl, nll in rows)
    return figure, f"Bar chart of KL and NLL drop on held-out questions: {said}."
