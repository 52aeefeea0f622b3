"""The yardstick against plain cross-entropy and KL."""

import pytest
import torch

from persona_pruner.errors import InputError
from persona_pruner.evaluation import metrics
from persona_pruner.evaluation.metrics import dense_reference, fidelity, text_nll
from persona_pruner.nn import masked, slim_copy
from persona_pruner.testing import FAMILIES, tiny_examples, tiny_model


def alone(model, example):
    ids = torch.tensor([example.prompt + example.answer])
    return model(ids).logits[0, len(example.prompt) - 1 : -1].float()


def plain(model, dense, examples):
    """(NLL a token, KL a token) from one forward for each example."""
    nll = kl = tokens = 0
    for example in examples:
        own, wanted = alone(model, example).log_softmax(-1), alone(dense, example).log_softmax(-1)
        nll += torch.nn.functional.nll_loss(own, torch.tensor(example.answer), reduction="sum").item()
        kl += torch.nn.functional.kl_div(own, wanted, reduction="sum", log_target=True).item()
        tokens += len(example.answer)
    return nll / tokens, kl / tokens


def masks_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(64, generator=generator) < 0.6 for _ in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_pruned(family, monkeypatch):
    monkeypatch.setattr(metrics, "BUDGET", 60)
    monkeypatch.setattr(metrics, "CHUNK", 4)
    dense, examples, told = tiny_model(family), tiny_examples(9), []
    reference = dense_reference(dense, examples)
    assert reference.nll == pytest.approx(plain(dense, dense, examples)[0], rel=1e-5)
    itself = fidelity(dense, reference, told.append)
    assert itself.nll == pytest.approx(reference.nll) and abs(itself.nll_drop) < 1e-6 and abs(itself.kl) < 1e-6
    assert sum(told) == len(reference.packs) > 1
    pruned = slim_copy(dense, masks_of())
    nll, kl = plain(pruned, dense, examples)
    got = fidelity(pruned, reference)
    assert got.nll == pytest.approx(nll, rel=1e-4) and got.kl == pytest.approx(kl, rel=1e-3) and kl > 0.05
    assert got.nll_drop == pytest.approx(nll - reference.nll, rel=1e-2, abs=1e-4)
    with masked(dense, masks_of()):
        assert fidelity(dense, reference).kl == pytest.approx(kl, rel=1e-3)


def test_divergence_is_from_the_dense_model():
    dense, pruned, examples = tiny_model(), slim_copy(tiny_model(), masks_of()), tiny_examples(9)
    there, back = plain(pruned, dense, examples)[1], plain(dense, pruned, examples)[1]
    assert abs(there - back) > 0.004 * there
    assert fidelity(pruned, dense_reference(dense, examples)).kl == pytest.approx(there, rel=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_nll_is_the_models_own_loss(family):
    model = tiny_model(family)
    texts = [example.prompt + example.answer for example in tiny_examples(3, prefix=15)]
    losses = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in texts]
    tokens = [len(ids) - 1 for ids in texts]
    want = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert text_nll(model, texts) == pytest.approx(want, rel=1e-5)
    assert text_nll(model, [*texts, [7]]) == pytest.approx(want, rel=1e-5)  # one token predicts nothing


def test_nothing_to_measure_on():
    model, empty = tiny_model(), [type(tiny_examples(1)[0])([5, 6], [])]
    for examples in ([], empty):
        with pytest.raises(InputError, match="no held-out answers"):
            dense_reference(model, examples)
    for texts in ([], [[7], []]):
        with pytest.raises(InputError, match="no text of at least two tokens"):
            text_nll(model, texts)
