"""The report: numbers shown are those given, foreign text stays text, and nothing is loaded from elsewhere."""

import copy
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from persona_pruner import report
from persona_pruner.config import SculptConfig
from persona_pruner.formats.persona_file import PersonaFile
from persona_pruner.report import facts, plots

LAYERS, CHANNELS, KEPT = 30, 1536, 1152
EVIL = '<script>alert("1")</script> & `code` | **Ann**'
VOID = {"meta", "br", "hr", "img", "link", "input", "path", "use", "image", "rect"}
LOADING = {"script", "link", "iframe", "object", "embed", "base", "source", "video", "audio", "form"}


def persona(name="Bram the blacksmith", widths=None, channels=CHANNELS) -> PersonaFile:
    generator = torch.Generator().manual_seed(3)
    masks = []
    for width in widths or [KEPT] * LAYERS:
        masks.append(torch.zeros(channels, dtype=torch.bool))
        masks[-1][torch.randperm(channels, generator=generator)[:width]] = True
    return PersonaFile(name, f"You are {name}.", "smollm2-135m", "f" * 64, masks, ratio=0.25)


def spread_widths() -> list[int]:
    steps = np.linspace(300, -300, LAYERS).round().astype(int)
    return [KEPT + int(step) for step in steps]


def numbers(name="Bram the blacksmith", compare=True, **settings) -> dict:
    """Metrics in the form that `pipeline.sculpt` gives them."""
    config = SculptConfig(compare=compare, **settings)
    even, uneven = [KEPT] * LAYERS, spread_widths()
    mine, other = (even, uneven) if config.scope == "layer" else (uneven, even)
    found = "scores, search" if config.steps else "scores"
    rows = [("persona-pruner", f"{found}, repair" if config.repair else found, 0.3127, 0.3391, 0.7712, mine)]
    if config.repair:
        rows.append(("persona-pruner, mask only", found, 0.5513, 0.5926, 0.9034, mine))
    if compare:
        widths = "global" if config.scope == "layer" else "layer"
        rows.append((f"persona-pruner, {widths} widths", "scores", 0.2718, 0.2909, 0.6441, other))
        rows.append(("magnitude", "weights alone", 3.8184, 4.1017, 3.9923, even))
        rows.append(("wanda", "generic calibration", 1.1541, 1.2988, 0.9127, even))
        rows.append(("taylor", "generic calibration", 1.3076, 1.5153, 1.1245, even))
    made = {
        "parameters": {"dense": 134515008, "pruned": 114607872},
        "ffn_bytes": {"dense": 318504960, "pruned": 238878720},
        "held_out": {"questions": 24, "tokens": 1287, "dense_nll": 1.6824},
        "neutral": {"dense_nll": 2.9361, "tokens": 4096},
        "methods": [
            {"name": n, "how": how, "nll": 1.6824 + d, "nll_drop": d, "kl": kl, "neutral_nll_drop": e, "kept": kept}
            for n, how, kl, d, e, kept in rows
        ],
        "dialogue": [
            {
                "question": "What do you make of the new mayor?",
                "dense": "Hah! The mayor. He pays late, and he wants his gates for nothing. But he kept the mill open "
                "through the winter, so I mend his hinges and hold my tongue.\n\nMostly.",
                "pruned": "The mayor? A soft-handed man. He has never held a hammer, but he pays for his nails.",
            },
            {"question": "How do you begin a day?", "dense": "With the fire.", "pruned": "I light the forge."},
            {"question": "Could you teach me?", "dense": "Sweep first.", "pruned": "Aye, sweep first <b>then</b>."},
        ],
        "search": {
            "losses": [0.71 * 0.97**i + 0.02 * (i % 3) for i in range(config.steps)],
            "flips": [1210 - 47 * i for i in range(config.steps)],
            "examples": 277,
            "tokens": 17311,
        },
        "seconds": {"held-out answers": 21.4, "answers in character": 118.9, "straight-through search": 131.2},
        "run": {
            "persona": name,
            "model": "smollm2-135m",
            "dtype": "bfloat16",
            "device": "cpu",
            "threads": 2,
            "version": "0.1.0",
            "date": "2026-11-23",
            "settings": config.dump(),
        },
    }
    if compare:
        made["headline"] = {"baseline": "wanda", "kl_removed": 1 - 0.3127 / 1.1541}
        made["tokens_per_second"] = {"dense": 31.42, "pruned": 38.17, "threads": 2}
    return made


class Page(HTMLParser):
    """Tags with their attributes, text, and what was left open."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def shown(metrics: dict, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(report.table(metrics))
    return out.getvalue()


VARIANTS = {
    "default": {},
    "no baselines": {"compare": False},
    "no search": {"steps": 0},
    "global": {"scope": "global"},
    "bare": {"compare": False, "steps": 0, "repair": False, "loss": "ce"},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_has_a_whole_page_card_and_table(settings):
    metrics = numbers(**settings)
    before = copy.deepcopy(metrics)
    page = Page(report.html(metrics, persona(widths=metrics["methods"][0]["kept"])))
    assert page.open == []
    assert sum(tag == "svg" for tag, _ in page.tags) == (3 if settings.get("steps") == 0 else 4)
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg")
    assert ("No search steps" in page.text) == (settings.get("steps") == 0)
    card, table = report.model_card(metrics), shown(metrics)
    for text in (page.text, card, table):
        assert ("best baseline" in text.replace("the best baseline", "")) == metrics["run"]["settings"]["compare"]
        assert "nan" not in re.findall(r"\w+", text.lower()) and "None" not in text
    assert ('from_pretrained("slim")' in card) == (settings.get("scope") != "global")
    assert metrics == before


def test_numbers_shown_are_those_given():
    metrics = numbers()
    page, card, table = Page(report.html(metrics, persona())).text, report.model_card(metrics), shown(metrics, 100)
    for text in (page, card, table):
        for size in ("134.5M", "114.6M", "318.5 MB", "238.9 MB", "31.4", "38.2", "0.85x", "0.75x", "1.21x"):
            assert size in text
        for row in metrics["methods"]:
            for value in ("kl", "nll_drop", "neutral_nll_drop"):
                assert f"{row[value]:.3f}" in text
        assert "1,152" in text and "852–1,452" in text
        assert "72.9% of the KL drop of the best baseline, wanda" in " ".join(text.split())
    assert "24 held-out questions with 1,287 answer tokens (dense NLL 1.682)" in page
    assert "277 calibration questions with 17,311 answer tokens" in page
    assert "272 s in all" in page and "118.9" in page
    for turn in metrics["dialogue"]:
        assert all(turn[side] in page for side in turn)
    assert [row.name for row in facts.methods(metrics) if row.best] == ["wanda"]
    assert [row.name for row in facts.methods(metrics) if row.product] == ["persona-pruner"]


def test_negative_drop_keeps_its_sign():
    metrics = numbers()
    metrics["methods"][0]["neutral_nll_drop"] = -0.0421
    assert "−0.042" in shown(metrics) and "−0.042" in report.html(metrics, persona())


def headline(kl: float, **settings) -> str:
    metrics = numbers(**settings)
    metrics["methods"][0]["kl"] = kl
    if "headline" in metrics:
        metrics["headline"]["kl_removed"] = 1 - kl / 1.1541
    return facts.headline(metrics)


def test_headline_is_honest():
    assert "72.9% of the KL drop of the best baseline, wanda, is gone (0.313 against 1.154" in headline(0.3127)
    assert "25.6% larger than that of the best baseline, wanda (1.450 against 1.154" in headline(1.45)
    assert "the same as" in headline(1.154)
    packed = headline(0.3127, format="packed")
    assert "channels and two of every four other weights of the blocks removed, 72.9%" in packed
    alone = headline(0.3127, compare=False)
    assert "0.313" in alone and "no baseline was measured" in alone and "gone" not in alone


def test_page_loads_nothing():
    source = report.html(numbers(EVIL), persona(EVIL))
    page = Page(source)
    for tag, attributes in page.tags:
        assert tag not in LOADING
        for name in ("src", "srcset", "href", "xlink:href", "data", "poster", "action"):
            value = attributes.get(name) or ""
            assert tag == "a" or value == "" or value.startswith(("#", "data:image/png;base64,"))
    assert re.findall(r"https?://[^\s\"<]+", source) == ["https://arxiv.org/abs/2606.14695"]
    assert "@import" not in source and not re.search(r"url\((?!#)", source)


def test_ids_are_unique_and_references_resolve():
    source = report.html(numbers(), persona())
    ids = [attributes["id"] for _, attributes in Page(source).tags if "id" in attributes]
    assert set(re.findall(r"url\(#([^)]+)\)", source)) <= set(ids)
    own = [name for name in ids if not re.fullmatch(r"[mph][0-9a-f]{10}|image[0-9a-f]{10}", name)]
    assert len(own) == len(set(own))


def test_foreign_text_is_escaped():
    metrics = numbers(EVIL)
    metrics["dialogue"][0]["pruned"] = EVIL
    source = report.html(metrics, persona(EVIL))
    assert "<script" not in source and "<b>then" not in source
    assert Page(source).text.count(EVIL) >= 4  # title, heading, prompt, answer
    body = report.model_card(metrics).split("---\n", 2)[2].split("```")[0]
    assert "<script" not in body and r"\*\*Ann\*\*" in body and r"\|" in body
    assert "[red]x[/red]" in shown(numbers("[red]x[/red]"))
    assert "\x1b" not in shown(numbers("\x1b]0;owned\x07Ann"))


def test_no_name_ends_the_settings_block_of_the_card():
    card = report.model_card(numbers("Ann\n```\n# Owned"))
    assert not re.search(r"^\s*# Owned", card, re.M) and len(re.findall(r"^\s*```", card, re.M)) == 8


@pytest.mark.parametrize("name", ["A" * 5000, "line\nbreak", "日本の鍛冶屋", "---\nlicense: evil", "$a_1$ {{ 1 }}"])
def test_odd_names(name):
    metrics = numbers(name)
    assert name in Page(report.html(metrics, persona(name))).text
    assert yaml.safe_load(report.run_yaml(metrics["run"])) == metrics["run"]
    head = yaml.safe_load(report.model_card(metrics).split("---\n")[1])
    assert "license" not in head
    assert max(map(len, shown(metrics).splitlines())) <= 80


def test_card_says_what_became_of_the_weights():
    cards = {
        (fmt, repair): report.model_card(numbers(format=fmt, repair=repair))
        for fmt in ("slim", "packed")
        for repair in (True, False)
    }
    assert "two of every four weights stay (SparseGPT, in the repair)" in cards["packed", True]
    assert "two of every four weights stay (Wanda, the others as in the base model)" in cards["packed", False]
    alone = report.model_card(numbers(format="packed", ratio=0))
    assert "No channel was removed; W_o" in alone and facts.FAIRNESS_24 in alone and facts.FAIRNESS not in alone
    for repair in (True, False):
        assert "All other weights are those of the base model" in cards["slim", repair]
        assert "All other weights" not in cards["packed", repair]


def test_card_head():
    metrics = numbers()
    card = report.model_card(metrics)
    assert card.startswith("---\n")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head["library_name"] == "transformers" and "persona-pruner" in head["tags"]
    assert "2606.14695" in card and "## Limits" in card
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.S)[1])
    assert settings == metrics["run"]
    for code in re.findall(r"```python\n(.*?)```", card, re.S):
        compile(code, "card", "exec")
    metrics["run"]["model"] = "/models/mine"
    assert "base_model" not in yaml.safe_load(report.model_card(metrics).split("---\n")[1])


def test_run_yaml_keeps_order_and_values():
    run = numbers()["run"]
    text = report.run_yaml(run)
    assert text.startswith("# ") and yaml.safe_load(text) == run
    assert list(yaml.safe_load(text)) == list(run)
    assert list(yaml.safe_load(text)["settings"]) == list(SculptConfig().dump())


def test_command_names_what_differs():
    usual = facts.command(numbers()["run"])
    assert "--ratio 0.25" in usual and "--model smollm2-135m" in usual and "--set" not in usual
    run = numbers(seed=2, repair=False, compare=False, filter=False, steps=5, questions=("a b.json", "c.json"))["run"]
    command = " ".join(facts.command(run).replace("\\\n", " ").split())
    for part in ("--seed 2", "--no-repair", "--no-compare", "--set filter=false", "--set steps=5"):
        assert part in command
    assert "--questions 'a b.json' --questions c.json" in command


def test_density_counts_channels():
    rng = np.random.default_rng(0)
    masks = [rng.random(width) < 0.7 for width in (37, 1000, 96)]
    shares = plots.density(masks, bins=24)
    assert shares.shape == (3, 24)
    for mask, row in zip(masks, shares, strict=True):
        edges = np.linspace(0, len(mask), 25).round().astype(int)
        np.testing.assert_allclose(row, [mask[a:b].mean() for a, b in pairwise(edges)])
    few = [rng.random(11) < 0.5]
    assert (plots.density(few) == few[0]).all()


def test_tiny_model():
    metrics = numbers(compare=False)
    for row in metrics["methods"]:
        row["kept"] = [9]
    assert Page(report.html(metrics, persona(widths=[9], channels=12))).open == []


def test_output_depends_on_the_input_alone(monkeypatch):
    metrics, file = numbers(), persona()
    first = report.html(metrics, file)
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "path")
    assert report.html(metrics, file) == first
    assert matplotlib.rcParams["font.size"] == 30
    other = persona()
    other.masks[0] = ~other.masks[0]
    assert report.html(metrics, other) != first


def test_import_is_light():
    code = "import sys, persona_pruner.report; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"matplotlib", "torch", "jinja2", "rich"} & set(out.split())
    with pytest.raises(AttributeError):
        _ = report.nothing
