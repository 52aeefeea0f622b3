"""The metrics of `pipeline.sculpt` in words: what page, model card and terminal table have in common."""

import json
import shlex
from dataclasses import dataclass

from persona_pruner.config import SculptConfig

BASELINES = {
    "magnitude": "Euclidean norm of a channel's weights; no data",
    "wanda": "weight norm times input norm on generic text (structured Wanda)",
    "sparsegpt-2:4": "two of every four weights by SparseGPT on generic text",
    "taylor": "first-order Taylor importance on generic text, as in LLM-Pruner",
}
LOSSES = {"kl": "KL to the dense model", "ce": "cross-entropy"}
FAIRNESS = (
    "Every method keeps the same number of channels. Baselines are masks without repair: for the choice of channels "
    "alone, compare them with a line of persona-pruner that has no repair."
)
FAIRNESS_24 = "Every method keeps all channels, and of the blocks' linears two of every four weights."
DEFINITIONS = (
    ("Drop", "a metric of the pruned model minus the same metric of the dense model; 0 is no loss, lower is better."),
    (
        "NLL",
        "negative log-likelihood of the dense model's own sampled answers to held-out questions, under the persona "
        "prompt, mean per answer token in nats.",
    ),
    (
        "KL",
        "KL(dense ‖ pruned) of the next-token distributions at every answer token, mean in nats; 0 for the dense one.",
    ),
    ("Neutral NLL drop", "the drop in NLL on plain text without a persona: general ability."),
    ("KL removed", "1 − KL of the pruned model / KL of the best baseline, at the same size."),
    ("Held out", "no calibration question or answer shares eight words in a row with a held-out question or answer."),
    ("Tokens/s", "greedy decoding of one conversation by transformers, dense and pruned in turn, median of rounds."),
    ("Tokens/s in chat", "the same by the engine of `chat` and `serve`."),
)
_FLAGS = ("scope", "seed", "questions", "eval_questions", "answers")  # options of their own; the rest go by --set
_SWITCHES = ("repair", "compare")


@dataclass(frozen=True)
class Size:
    """One line dense against pruned; `ratio` is pruned / dense."""

    label: str
    dense: str
    pruned: str
    ratio: str


@dataclass(frozen=True)
class Method:
    """One line of the methods table, as text; `kept` counts channels a layer."""

    name: str
    how: str
    nll: str
    nll_drop: str
    kl: str
    neutral: str
    kept: str
    product: bool
    best: bool


def one_line(text: str) -> str:
    """Foreign text without line breaks, runs of blanks and control characters (a terminal obeys those)."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def big(number: float) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return str(number)


def size_in_bytes(number: float) -> str:
    """1234567 -> 1.235 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number} B"


def signed(number: float) -> str:
    return f"{number:+.3f}".replace("-", "−")


def widths(kept: list[int]) -> str:
    """Kept channels a layer: one number, or least to most."""
    low, high = min(kept), max(kept)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def sizes(metrics: dict) -> list[Size]:
    """Parameters, FFN bytes and, where measured, tokens per second, dense and pruned."""
    lines = [("Parameters", metrics["parameters"], big), ("FFN bytes", metrics["ffn_bytes"], size_in_bytes)]
    for label, name in (("Tokens/s", "tokens_per_second"), ("Tokens/s in chat", "fleet_tokens_per_second")):
        if name in metrics:
            lines.append((label, metrics[name], lambda speed: f"{speed:.1f}"))
    return [
        Size(label, show(pair["dense"]), show(pair["pruned"]), f"{pair['pruned'] / pair['dense']:.2f}x")
        for label, pair, show in lines
    ]


def best_baseline(metrics: dict) -> str | None:
    """Name of the baseline with the lowest KL, None when none was measured."""
    return metrics.get("headline", {}).get("baseline")


def methods(metrics: dict) -> list[Method]:
    """The methods in the order of `metrics`: the product first."""
    return [
        Method(
            row["name"],
            row["how"],
            f"{row['nll']:.3f}",
            signed(row["nll_drop"]),
            f"{row['kl']:.3f}",
            signed(row["neutral_nll_drop"]),
            widths(row["kept"]),
            index == 0,
            row["name"] == best_baseline(metrics),
        )
        for index, row in enumerate(metrics["methods"])
    ]


def removed(ratio: float, format: str) -> str:
    """What a sculpt of these settings takes away."""
    if not ratio:
        return "two of every four weights of the blocks"
    channels = f"{percent(ratio)} of the FFN channels"
    return f"{channels} and two of every four other weights of the blocks" if format == "packed" else channels


def fairness(metrics: dict) -> str:
    """What the methods have in common."""
    return FAIRNESS if metrics["run"]["settings"]["ratio"] else FAIRNESS_24


def headline(metrics: dict) -> str:
    """The result in one sentence."""
    product, settings = metrics["methods"][0], metrics["run"]["settings"]
    begun = f"With {removed(settings['ratio'], settings['format'])} removed"
    name = best_baseline(metrics)
    if name is None:
        return (
            f"{begun}, the KL to the dense model on held-out questions is {product['kl']:.3f} nats per token; "
            "no baseline was measured in this run."
        )
    gone = metrics["headline"]["kl_removed"]
    other = next(row["kl"] for row in metrics["methods"] if row["name"] == name)
    figures = f"({product['kl']:.3f} against {other:.3f} nats per token on held-out questions)"
    if abs(gone) < 0.005:
        return f"{begun}, the KL drop is the same as that of the best baseline, {name} {figures}."
    if gone < 0:
        return f"{begun}, the KL drop is {percent(-gone)} larger than that of the best baseline, {name} {figures}."
    return f"{begun}, {percent(gone)} of the KL drop of the best baseline, {name}, is gone {figures}."


def held_out(metrics: dict) -> str:
    """How much the numbers rest on."""
    test, neutral = metrics["held_out"], metrics["neutral"]
    return (
        f"{test['questions']} held-out questions with {test['tokens']:,} answer tokens (dense NLL "
        f"{test['dense_nll']:.3f}); {neutral['tokens']:,} tokens of neutral text (dense NLL {neutral['dense_nll']:.3f})"
    )


def _text(value) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool | list) else str(value)


def command(run: dict) -> str:
    """The command line for these settings. CARD and FOLDER stand for paths that are no part of the settings."""
    settings, usual = run["settings"], SculptConfig().dump()
    words = ["persona-pruner sculpt --persona CARD --out FOLDER"]
    words.append(f"--model {shlex.quote(run['model'])} --ratio {settings['ratio']}")
    for name, value in settings.items():
        if name == "ratio" or value == usual.get(name):
            continue
        option = name.replace("_", "-")
        if name in _SWITCHES:
            words.append(f"--{option}" if value else f"--no-{option}")
        elif name in _FLAGS:
            each = value if isinstance(value, list | tuple) else [value]
            words += [f"--{option} {shlex.quote(_text(item))}" for item in each]
        else:
            words.append(f"--set {shlex.quote(f'{name}={_text(value)}')}")
    words.append(f"--device {shlex.quote(run['device'])} --dtype {run['dtype']} --threads {run['threads']}")
    return " \\\n  ".join(words)
