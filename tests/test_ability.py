"""General ability: the quiz, ROUGE-L, and lm-eval with a task file of its own."""

import json
import sys

import pytest
import torch

from persona_pruner.errors import InputError
from persona_pruner.evaluation.harness import harness
from persona_pruner.evaluation.quiz import log_likelihoods, quiz_accuracy
from persona_pruner.evaluation.rouge import rouge_l
from persona_pruner.packing import Example
from persona_pruner.synthesis import bank
from persona_pruner.testing import tiny_model, tiny_tokenizer

ITEMS = [
    {"question": "Iron is", "choices": ["a metal that smiths like", "wet", "blue"], "answer": 0},
    {"question": "Rain falls", "choices": ["up", "down from the clouds"], "answer": 1},
    {"question": "Two and two", "choices": ["are four", "are five or so", "sing"], "answer": 0},
]


def plain(model, tokenizer, question, choice):
    """log p of the choice a byte, from one forward pass of the whole text."""
    start, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
    assert whole[: len(start)] == start
    own = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    score = sum(own[i - 1, whole[i]].item() for i in range(len(start), len(whole)))
    return score / len(choice.encode())


def test_the_quiz_is_log_likelihood_by_bytes():
    tokenizer = tiny_tokenizer()
    for seed in range(4):
        model = tiny_model(seed=seed)
        right = 0
        for item in ITEMS:
            scores = [plain(model, tokenizer, item["question"], choice) for choice in item["choices"]]
            right += scores.index(max(scores)) == item["answer"]
        assert quiz_accuracy(model, tokenizer, ITEMS) == right / 3


def test_log_likelihoods_of_many_packs(monkeypatch):
    monkeypatch.setattr("persona_pruner.evaluation.quiz.BUDGET", 24)
    model = tiny_model()
    rows = [Example([5, 6, 7 + i], [9, 10 + i, 11]) for i in range(9)]
    for example, got in zip(rows, log_likelihoods(model, rows), strict=True):
        own = model(torch.tensor([example.prompt + example.answer])).logits[0, 2:-1].log_softmax(-1)
        assert got == pytest.approx(own.gather(1, torch.tensor(example.answer)[:, None]).sum().item(), rel=1e-4)


def test_the_quiz_that_comes_with_the_package():
    items = bank.quiz()
    assert len(items) == 60 == len({item["question"] for item in items})
    for item in items:
        assert len(set(item["choices"])) == len(item["choices"]) == 4 and 0 <= item["answer"] < 4
    counts = [sum(item["answer"] == place for item in items) for place in range(4)]
    assert max(counts) <= 20, counts  # no place is a good guess


def test_rouge_l():
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    # longest common subsequence "the forge hot": 3 of 4 and of 5 words
    assert rouge_l(["the forge is hot"], ["the old forge burns hot"]) == pytest.approx(2 * 3 / 9)
    assert rouge_l(["", "iron"], ["", "rain"]) == 0.5 and rouge_l([], []) == 0


def test_rouge_without_the_package(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("rouge_score")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(InputError, match="needs the extra `compare`"):
        rouge_l(["a"], ["b"])


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="need the extra `lm-eval`"):
        harness(tiny_model(), tiny_tokenizer(), ["piqa"])


TASK = """
task: smith_quiz
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def test_lm_eval_with_a_local_task(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tmp_path / "smith.yaml").write_text(TASK.format(data=data))
    model, tokenizer = tiny_model(), tiny_tokenizer()
    found = harness(model, tokenizer, ["smith_quiz"], include=tmp_path)
    assert found["smith_quiz"]["acc_norm"] == pytest.approx(quiz_accuracy(model, tokenizer, ITEMS))
    assert set(found["smith_quiz"]) >= {"acc", "acc_norm"}
    with pytest.raises(InputError, match="lm-eval knows no task 'smiths'"):
        harness(model, tokenizer, ["smiths"], include=tmp_path)
