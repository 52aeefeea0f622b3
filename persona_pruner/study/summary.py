"""From cells to the table and the headline. A drop is pruned minus dense; lower is better."""

import statistics
from collections.abc import Sequence

from persona_pruner.search.baselines import BASELINES
from persona_pruner.study.own import OWN, SHARED

KINDS = {
    "channels": {*OWN, SHARED} - {"persona-slim-2:4"},
    "2:4": {"persona-2:4", "persona-2:4-repair"},
    "2:4 of the FFN": {"persona-2:4-ffn"},
}
METRICS = ("kl", "nll_drop", "neutral_nll_drop", "rouge_l", "quiz", "judge_drop", "parameters", "seconds", "peak_bytes")


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def lines(cells: Sequence[dict]) -> list[dict]:
    """A line for each method, calibration and ratio: of every metric the mean over personas (of the mean over seeds),
    and for KL and NLL drop the sample standard deviation over personas, least and most ("spread")."""
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        groups.setdefault((cell["ratio"], cell["method"], cell["calibration"]), []).append(cell)
    out = []
    for (ratio, method, calibration), rows in groups.items():
        names = sorted({row["persona"] for row in rows})
        line = {"method": method, "calibration": calibration, "ratio": ratio, "personas": len(names)}
        line["seeds"] = len({row["seed"] for row in rows})
        for metric in METRICS:
            by_persona = [_mean([row.get(metric) for row in rows if row["persona"] == name]) for name in names]
            line[metric] = _mean(by_persona)
            if metric in ("kl", "nll_drop"):
                line[f"{metric}_sd"] = statistics.stdev(by_persona) if len(names) > 1 else None
                line[f"{metric}_range"] = [min(by_persona), max(by_persona)]
        line["tasks"] = _tasks([row["tasks"] for row in rows if row.get("tasks")])
        out.append(line)
    return sorted(out, key=lambda line: (line["ratio"], line["kl"]))


def _tasks(found: Sequence[dict]) -> dict:
    names = {(task, metric) for tasks in found for task, metrics in tasks.items() for metric in metrics}
    means = {name: _mean([tasks.get(name[0], {}).get(name[1]) for tasks in found]) for name in sorted(names)}
    return {f"{task} {metric}": mean for (task, metric), mean in means.items()}


def kind_of(method: str) -> str:
    """Which methods a method is compared with: a key of `KINDS`."""
    if "2:4" not in method:
        return "channels"
    return "2:4 of the FFN" if method.endswith("-ffn") else "2:4"


def headlines(table: Sequence[dict]) -> list[dict]:
    """For each ratio and each of `KINDS`: the strongest published method with generic calibration, by mean KL
    over personas, and for every own method the share of its drop that is removed, 1 - drop / drop of that method, in KL
    and in NLL, with the difference in neutral drop (negative: better than that method)."""
    out = []
    for ratio in sorted({line["ratio"] for line in table}):
        here = [line for line in table if line["ratio"] == ratio]
        for kind, ours in KINDS.items():
            rivals = [line for line in here if line["calibration"] != "persona" and kind_of(line["method"]) == kind]
            rivals = [line for line in rivals if line["method"] in BASELINES]
            if not rivals:
                continue
            best = min(rivals, key=lambda line: line["kl"])
            removed = {
                line["method"]: {
                    "kl_removed": 1 - line["kl"] / best["kl"],
                    "nll_removed": 1 - line["nll_drop"] / best["nll_drop"],
                    "neutral_difference": line["neutral_nll_drop"] - best["neutral_nll_drop"],
                }
                for line in here
                if line["method"] in ours
            }
            out.append({"ratio": ratio, "kind": kind, "baseline": best["method"], "kl": best["kl"], "own": removed})
    return out


def summarise(cells: Sequence[dict]) -> dict:
    """{"table", "headlines"} of cells."""
    table = lines(cells)
    return {"table": table, "headlines": headlines(table)}
