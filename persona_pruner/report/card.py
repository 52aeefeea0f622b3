"""README.md of an output folder (a Hugging Face model card), and run.yaml."""

import re

import yaml

from persona_pruner.config import SculptConfig
from persona_pruner.models import SMOLLM2, SMOLLM2_HUB
from persona_pruner.report import facts

CITATION = """@inproceedings{kim2026personapruner,
  title     = {Persona-Pruner: Sculpting Lightweight Models for Role-Playing},
  author    = {Kim, Jinsu and Tack, Jihoon and Lee, Noah and Jeong, Jongheon},
  booktitle = {International Conference on Machine Learning},
  year      = {2026},
  note      = {arXiv:2606.14695}
}"""


def _dump(value: dict, width: float = 110) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=width)


def run_yaml(run: dict) -> str:
    """run.yaml: what was run, with every setting, in the order given."""
    return "# Every setting of this persona-pruner sculpt.\n" + _dump(run)


def _plain(text: str) -> str:
    """Foreign text as one line of Markdown that means nothing but itself."""
    text = facts.one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#|!~$])", r"\\\1", text)


def _code(text: str) -> str:
    """Foreign text as inline code."""
    return "`" + facts.one_line(text).replace("`", "'").replace("|", "/") + "`"


def _grid(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _hub_name(model: str) -> str | None:
    """The hub's name of the base model, None for a local path or anything else that is none."""
    if model == SMOLLM2:
        return SMOLLM2_HUB
    return model if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) else None


def _usage(run: dict) -> str:
    prompt = """with safe_open("persona.persona.safetensors", "pt") as file:
    system = file.metadata()["system"]"""
    ask = """messages = [{"role": "system", "content": system}, {"role": "user", "content": "Who are you?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.7)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
    if run["settings"]["scope"] == "layer":
        return f"""The folder `slim/` is an ordinary transformers checkpoint; persona-pruner is not needed to run it.
The persona's prompt is in the header of `persona.persona.safetensors`, beside `slim/`.

```python
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("slim")
model = AutoModelForCausalLM.from_pretrained("slim")
{prompt}
{ask}
```"""
    return f"""The layers differ in width, which a plain checkpoint cannot say: the persona file is put on the base
model instead. It holds the mask alone, without repaired weights.

```python
import persona_pruner as pp

model, tokenizer = pp.load_model({run["model"]!r})
persona = pp.PersonaFile.load("persona.persona.safetensors")
persona.apply(model)
system = persona.system
{ask}
```"""


def _made(metrics: dict) -> str:
    settings, found = SculptConfig.of(**metrics["run"]["settings"]), metrics["search"]
    own = settings.answers == "self"
    source = "self-distilled: sampled from the base model itself" if own else f"written by {_code(settings.answers)}"
    under = "under the persona prompt" if settings.in_character else "without the persona prompt"
    search = (
        f"{settings.steps} straight-through steps on {facts.LOSSES[settings.loss]}" if settings.steps else "no search"
    )
    chosen = f"Channel scores: {settings.start}; {search}" if settings.ratio else "No channel was removed"
    fitted = f"W_o and W_down refitted by least squares, block by block (ridge {settings.ridge})"
    repair = fitted if settings.repair else "no repair of the weights"
    rest = "All other weights are those of the base model, with channels cut out."
    if settings.format == "packed":
        how = "SparseGPT, in the repair" if settings.repair else "Wanda, the others as in the base model"
        rest = f"Of what is left in the blocks' linears, two of every four weights stay ({how})."
    return f"""{found["examples"]} questions with {found["tokens"]:,} answer tokens ({source}, {under}).
{chosen}; {repair}.
{rest}"""


def model_card(metrics: dict) -> str:
    """README.md with the YAML block of the Hugging Face hub. metrics: what `pipeline.sculpt` returns."""
    run = metrics["run"]
    name, removed = _plain(run["persona"]), facts.removed(run["settings"]["ratio"], run["settings"]["format"])
    head = {"base_model": _hub_name(run["model"])} if _hub_name(run["model"]) else {}
    head |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["persona-pruner", "pruning", "role-play", "text-generation"],
    }
    sizes = _grid(
        ["", "dense", "pruned", "pruned / dense"],
        [[line.label, line.dense, line.pruned, line.ratio] for line in facts.sizes(metrics)],
    )
    methods = _grid(
        ["method", "NLL drop", "KL", "neutral NLL drop", "kept a layer"],
        [
            [
                _plain(row.name) + (" (best baseline)" if row.best else ""),
                row.nll_drop,
                row.kl,
                row.neutral,
                row.kept,
            ]
            for row in facts.methods(metrics)
        ],
    )
    fairness = f"{facts.fairness(metrics)} " if facts.best_baseline(metrics) else ""
    # Each value on one line of its own: no text can start a line with the fence that ends the block.
    settings = _dump(run | {"persona": facts.one_line(run["persona"])}, float("inf"))
    return f"""---
{_dump(head)}---

# {name} on {_plain(run["model"])}, {removed} removed

A language model cut down to play one character, made with persona-pruner {run["version"]} on {run["date"]}
(method: Persona-Pruner, arXiv 2606.14695). {facts.headline(metrics)}

## Numbers
{sizes}

{methods}

Nats per token, lower is better; measured on {facts.held_out(metrics)}. Drop = pruned − dense, on the dense model's own
sampled answers; KL is KL(dense ‖ pruned). {fairness}`report.html` has the pictures and side-by-side answers.

## How to use
{_usage(run)}

## How it was made
{_made(metrics)}

```yaml
{settings}```

```sh
{facts.command(run)}
```

## Limits
- The weights are cut for this one persona under its own prompt. With another prompt, other characters and other tasks
  the model is worse than its base: see the neutral NLL drop above.
- It inherits the knowledge, the errors and the biases of its base model, and its licence; a small model makes up facts.
- The data is sampled from models, not written by people, and the figures compare with the dense model, not with a
  human's idea of the character.

## Citation
```bibtex
{CITATION}
```
"""
