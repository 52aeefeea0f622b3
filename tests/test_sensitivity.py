"""Sensitivity of a question to the persona, against the formula computed prompt by prompt."""

import pytest
import torch

from persona_pruner.synthesis.prompts import prompt_ids
from persona_pruner.synthesis.sensitivity import REFERENCES, middle_layers, sensitivity
from persona_pruner.testing import FAMILIES, tiny_model, tiny_tokenizer

SYSTEM = "You are Mira, a smith who hates mornings."
QUESTIONS = ["Who are you?", "What is seven times eight, and how do you know?", "Why?", "Do you like the sea?"]


def plain(model, tokenizer):
    """1 - mean over references and layers of the cosine of last-token states, one forward a prompt."""
    layers = middle_layers(len(model.model.layers))

    def states(system, question):
        ids = torch.tensor([prompt_ids(tokenizer, system, question)])
        out = model(ids, output_hidden_states=True).hidden_states
        return [out[layer][0, -1].double() for layer in layers]

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    scores = []
    for question in QUESTIONS:
        own, total, count = states(SYSTEM, question), 0.0, 0
        for reference in REFERENCES:
            other = states(f"You are roleplaying as {reference}. Stay in character.", question)
            total += sum(cosine(a, b) for a, b in zip(own, other, strict=True))
            count += len(own)
        scores.append(1 - total / count)
    return torch.tensor(scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_formula(family):
    model, tokenizer, told = tiny_model(family), tiny_tokenizer(), []
    got = sensitivity(model, tokenizer, SYSTEM, QUESTIONS, told.append)
    want = plain(model, tokenizer)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert want.max() > 0.01 and want.std() > 1e-3  # something to tell apart
    assert sum(told) == 10 * len(QUESTIONS)


def test_a_reference_is_less_far_from_itself():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    same = f"You are roleplaying as {REFERENCES[0]}. Stay in character."
    got = sensitivity(model, tokenizer, same, QUESTIONS)
    assert (got < sensitivity(model, tokenizer, SYSTEM, QUESTIONS)).any()
    assert sensitivity(model, tokenizer, SYSTEM, []).shape == (0,)


def test_middle_layers():
    assert middle_layers(28) == range(5, 26)  # the paper's
    assert [list(middle_layers(n)) for n in (1, 2, 3)] == [[1], [1, 2], [1, 2, 3]]
    assert middle_layers(30) == range(5, 28) and len(REFERENCES) == len(set(REFERENCES)) == 9
