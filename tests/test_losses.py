"""Losses over the vocabulary, against plain autograd in float64."""

import pytest
import torch

from persona_pruner.packing import logits
from persona_pruner.search import losses
from persona_pruner.testing import assert_close_to_oracle, tiny_model

SIZES = [1, 7, 8, 9, 20]  # around the chunk of 8 set below


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 8 * 4 * 512)  # of the tiny models' words


@pytest.fixture(params=["llama", "softcap"])
def model(request):
    return tiny_model("gemma3", final_logit_softcapping=3.0) if request.param == "softcap" else tiny_model()


def material(tokens, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    states, teacher = (2 * torch.randn(2, tokens, 32, generator=generator)).to(dtype)
    return states, teacher, torch.randint(512, (tokens,), generator=generator)


def plain(model, states, dtype, loss):
    """(loss, gradient) through a head in the given dtype."""
    states = states.detach().to(dtype).requires_grad_()
    cap = model.config.final_logit_softcapping if model.config.model_type.startswith("gemma") else None
    out = states @ model.lm_head.weight.to(dtype).T
    value = loss(out if cap is None else cap * torch.tanh(out / cap))
    value.backward()
    return value.detach(), states.grad


def kl(model, teacher):
    def loss(out):
        wanted = logits(model, teacher).to(out.dtype).log_softmax(-1)
        return torch.nn.functional.kl_div(out.log_softmax(-1), wanted, reduction="sum", log_target=True)

    return loss


def ce(target):
    return lambda out: torch.nn.functional.cross_entropy(out, target, reduction="sum")


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("name", ["kl", "ce"])
def test_against_float64(model, name, tokens):
    states, teacher, target = material(tokens)
    states.requires_grad_()
    if name == "kl":
        value, loss = losses.divergence(model, states, teacher), kl(model, teacher)
    else:
        value, loss = losses.cross_entropy(model, states, target), ce(target)
    (3 * value).backward()
    oracle, slope = plain(model, states, torch.float64, loss)
    peer, peer_slope = plain(model, states, torch.float32, loss)
    assert value.dtype == torch.float32 and value.shape == ()
    assert_close_to_oracle(value.detach(), oracle, peer, floor=3e-6)
    assert_close_to_oracle(states.grad / 3, slope, peer_slope, floor=3e-6)
    assert model.lm_head.weight.grad is None


@pytest.mark.parametrize("name", ["kl", "ce"])
def test_slope_is_that_of_the_value(model, name):
    states, teacher, target = material(10)
    states.requires_grad_()

    def value(x):
        return losses.divergence(model, x, teacher) if name == "kl" else losses.cross_entropy(model, x, target)

    value(states).backward()
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-2 * direction / direction.norm()
    difference = (value(states.detach() + step) - value(states.detach() - step)) / 2
    assert difference == pytest.approx(float((states.grad * step).sum()), rel=2e-2)


def test_divergence_of_a_model_from_itself():
    model = tiny_model()
    states = material(9)[0].requires_grad_()
    value = losses.divergence(model, states, states.detach())
    value.backward()
    assert abs(value.item()) < 1e-5 and states.grad.abs().max() < 1e-5


def test_states_of_lower_precision():
    model = tiny_model(dtype=torch.bfloat16)
    states, teacher, _ = material(20, torch.bfloat16)
    states.requires_grad_()
    value = losses.divergence(model, states, teacher)
    value.backward()
    oracle, slope = plain(model, states, torch.float64, kl(model, teacher))
    peer, peer_slope = plain(model, states, torch.bfloat16, kl(model, teacher))
    assert states.grad.dtype == torch.bfloat16
    assert_close_to_oracle(value.detach(), oracle, peer.float(), floor=1e-3)
    assert_close_to_oracle(states.grad, slope, peer_slope, floor=1e-3)


def test_sampled_labels_follow_the_model():
    model = tiny_model()
    states = material(1)[0].expand(6000, -1)
    out = logits(model, states)
    labels = losses.draw(out, torch.Generator().manual_seed(0))
    wanted = logits(model, states[:1])[0].softmax(-1)
    shares = torch.bincount(labels, minlength=512) / 6000
    assert labels.shape == (6000,) and (shares - wanted).abs().max() < 0.04
    again = losses.draw(out, torch.Generator().manual_seed(0))
    assert torch.equal(labels, again)


def test_sampled_cross_entropy_is_cross_entropy_of_the_labels_it_draws():
    model = tiny_model()
    states, generator = material(5)[0], torch.Generator()
    labels = losses.draw(logits(model, states), generator.manual_seed(3))
    results = []
    for loss in (
        lambda s: losses.sampled_cross_entropy(model, s, generator.manual_seed(3)),
        lambda s: losses.cross_entropy(model, s, labels),
    ):
        leaf = states.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        results.append((value.item(), leaf.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_labels_of_zero_probability_are_never_drawn():
    out = torch.full((4000, 9), -torch.inf)
    out[:, 4] = out[:, 6] = 0.0
    assert set(losses.draw(out, torch.Generator().manual_seed(0)).tolist()) == {4, 6}


def test_labels_of_a_certain_model():
    """All mass on the first or on the last word: the search over the summed mass must not run past an end."""
    model = tiny_model(tie_word_embeddings=False)
    for word in (0, 511):
        model.lm_head.weight.zero_()[word] = 100
        value = losses.sampled_cross_entropy(model, torch.ones(50, 32), torch.Generator().manual_seed(0))
        assert value.item() == 0
