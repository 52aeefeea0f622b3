"""What is measured of one pruned model, and what pruning it cost."""

import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from persona_pruner.evaluation import metrics
from persona_pruner.evaluation.quiz import quiz_accuracy
from persona_pruner.evaluation.rouge import rouge_l
from persona_pruner.material import Material
from persona_pruner.memory import trim
from persona_pruner.search.baselines.size import nonzero
from persona_pruner.synthesis import bank
from persona_pruner.synthesis.generate import generate
from persona_pruner.synthesis.prompts import encode, examples, prompt_ids, stop_ids

ANSWER_TOKENS = 56
PASSAGES = 16


@dataclass
class Cost:
    """Wall seconds, and the most memory in bytes that the process (on a GPU: its tensors) held meanwhile."""

    seconds: float = 0.0
    bytes: int = 0


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) << 10
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def cost(device: torch.device | str = "cpu") -> Iterator[Cost]:
    """Measures what runs within. Where the kernel cannot reset the mark, the peak is that of the whole process."""
    gpu = torch.device(device).type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        trim()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    found, begun = Cost(), time.perf_counter()
    yield found
    if gpu:
        torch.cuda.synchronize(device)
    found.seconds = time.perf_counter() - begun
    found.bytes = torch.cuda.max_memory_allocated(device) if gpu else _peak()


def answers(model: nn.Module, tokenizer, material: Material) -> list[str]:
    """Greedy answers to a persona's held-out questions."""
    prompts = [prompt_ids(tokenizer, material.system, question) for question in material.questions]
    ids = generate(model, prompts, stop_ids(model, tokenizer), ANSWER_TOKENS, temperature=0.0)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]


class Yardstick:
    """The dense model's side of every number, made once."""

    def __init__(self, model: nn.Module, tokenizer, materials: Sequence[Material], quiz: Sequence[dict] | None = None):
        self.tokenizer, self.materials, self.quiz = tokenizer, materials, quiz
        self.references = [
            metrics.dense_reference(model, examples(tokenizer, m.system, m.questions, m.answers)) for m in materials
        ]
        self.said = [answers(model, tokenizer, m) for m in materials]
        self.texts = [encode(tokenizer, text) for text in bank.passages("neutral")[:PASSAGES]]
        self.neutral = metrics.text_nll(model, self.texts)
        self.dense = {
            "parameters": nonzero(model),
            "nll": [reference.nll for reference in self.references],
            "neutral_nll": self.neutral,
            "quiz": quiz_accuracy(model, tokenizer, quiz),
        }

    def general(self, model: nn.Module) -> dict:
        """What does not depend on a persona."""
        return {
            "parameters": nonzero(model),
            "neutral_nll_drop": metrics.text_nll(model, self.texts) - self.neutral,
            "quiz": quiz_accuracy(model, self.tokenizer, self.quiz),
        }

    def persona(self, model: nn.Module, number: int) -> dict:
        """Fidelity on the held-out questions of persona `number`, and the model's own answers to them."""
        found = metrics.fidelity(model, self.references[number])
        said = answers(model, self.tokenizer, self.materials[number])
        rouge = rouge_l(said, self.said[number])
        return {"kl": found.kl, "nll_drop": found.nll_drop, "rouge_l": rouge, "answers": said}


def machine() -> str:
    """Processor and cores, for numbers that depend on them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
