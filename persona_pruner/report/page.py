"""report.html: one self-contained file."""

from persona_pruner.formats.persona_file import PersonaFile
from persona_pruner.report import facts
from persona_pruner.report.pages import template


def html(metrics: dict, persona_file: PersonaFile) -> str:
    """The report of one sculpt as an HTML page: pictures are inline SVG and nothing is loaded from elsewhere.

    metrics: what `pipeline.sculpt` returns. Texts of the persona and of the models are escaped.
    """
    from markupsafe import Markup

    from persona_pruner.report import plots

    rows, searched = metrics["methods"], metrics["search"]
    masks = [mask.numpy() for mask in persona_file.masks]
    spread = next((row for row in rows if row["name"].endswith(" widths")), None)
    loss = facts.LOSSES[metrics["run"]["settings"]["loss"]]
    pictures = {
        "drops": plots.drops(
            [(row["name"], row["kl"], row["nll_drop"]) for row in rows],
            sum(row["name"] not in facts.BASELINES for row in rows),
        ),
        "channels": plots.channels(masks),
        "widths": plots.layer_widths(
            [len(mask) for mask in masks],
            persona_file.widths,
            spread and spread["name"].rpartition(", ")[2],
            spread and spread["kept"],
        ),
    }
    if searched["losses"]:
        pictures["curve"] = plots.curve(searched["losses"], searched["flips"], loss)
    return template("report.html").render(
        metrics=metrics,
        run=metrics["run"],
        persona=persona_file,
        headline=facts.headline(metrics),
        sizes=facts.sizes(metrics),
        methods=facts.methods(metrics),
        held_out=facts.held_out(metrics),
        baselines={name: how for name, how in facts.BASELINES.items() if any(row["name"] == name for row in rows)},
        fairness=facts.fairness(metrics),
        definitions=facts.DEFINITIONS,
        command=facts.command(metrics["run"]),
        removed=facts.removed(metrics["run"]["settings"]["ratio"], metrics["run"]["settings"]["format"]),
        loss=loss,
        spread=spread is not None,
        total_seconds=sum(metrics["seconds"].values()),
        pictures={name: Markup(svg) for name, svg in pictures.items()},
    )
