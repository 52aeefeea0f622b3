"""The straight-through search: one step by hand, resuming, and that it finds something."""

import copy

import pytest
import torch

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.nn import masked
from persona_pruner.packing import Example, answer_states, pack
from persona_pruner.search.masks import choose
from persona_pruner.search.scores import Context, channel_scores
from persona_pruner.search.ste import (
    Settings,
    State,
    Targets,
    _adam,
    batches,
    search,
    standardised,
    start,
    teacher_states,
    weighed,
)
from persona_pruner.testing import FAMILIES, tiny_examples, tiny_model


def begin(model, examples, scope="layer", budget=60):
    return start(channel_scores("fisher", Context(model, pack(examples, budget))), scope)


def same(a: State, b: State):
    tensors = (*zip(a.scores, b.scores, strict=True), *zip(a.first, b.first, strict=True))
    tensors += tuple(zip(a.second, b.second, strict=True))
    return all(torch.equal(x, y) for x, y in tensors) and (a.done, a.losses, a.flips) == (b.done, b.losses, b.flips)


def mask_gradients(model, masks, batch, teacher, loss):
    """Loss a token and its slope in float mask leaves, by transformers' own MLP and plain autograd."""
    leaves = [mask.float().requires_grad_() for mask in masks]
    handles = [
        mlp.down_proj.register_forward_pre_hook(lambda _, args, leaf=leaf: (args[0] * leaf,))
        for mlp, leaf in zip(models.gated_mlps(model), leaves, strict=True)
    ]
    out = model.lm_head(answer_states(model, batch))
    for handle in handles:
        handle.remove()
    if loss == "kl":
        wanted = model.lm_head(torch.cat([teacher[row] for row in batch.rows])).log_softmax(-1)
        value = torch.nn.functional.kl_div(out.log_softmax(-1), wanted, log_target=True, reduction="sum")
    else:
        value = torch.nn.functional.cross_entropy(out, batch.target, reduction="sum")
    (value / len(batch.target)).backward()
    return value.item() / len(batch.target), [leaf.grad for leaf in leaves]


def loss_under(model, masks, batch, teacher, loss):
    with masked(model, masks):
        out = model.lm_head(answer_states(model, batch))
    if loss == "ce":
        return torch.nn.functional.cross_entropy(out, batch.target).item()
    wanted = model.lm_head(torch.cat(list(teacher))).log_softmax(-1)
    return torch.nn.functional.kl_div(out.log_softmax(-1), wanted, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_by_hand(family, loss):
    model, examples = tiny_model(family), tiny_examples(8)
    settings = Settings(ratio=0.5, loss=loss, steps=3, lr=0.3, budget=60, seed=4)
    state, teacher = begin(model, examples), teacher_states(model, examples, 60)
    scores = [s.clone().requires_grad_() for s in state.scores]
    adam = torch.optim.Adam(scores, betas=(0.9, 0.99), eps=1e-12)
    losses, flips, stream = [], [], batches(examples, 60, 4)
    for lr in (0.3, 0.3 * 0.75, 0.3 * 0.25):  # a cosine from lr to 0 over three steps
        masks = choose([s.detach() for s in scores], 0.5)
        value, grads = mask_gradients(model, masks, next(stream)[1], teacher, loss)
        for score, grad in zip(scores, grads, strict=True):
            score.grad = grad
        adam.param_groups[0]["lr"] = lr
        adam.step()
        losses.append(value)
        after = choose([s.detach() for s in scores], 0.5)
        flips.append(sum(int((a & ~b).sum()) for a, b in zip(masks, after, strict=True)))
    masks = search(model, examples, state, settings, teacher)
    assert state.losses == pytest.approx(losses, rel=1e-4) and state.done == 3
    for got, want in zip(state.scores, scores, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-3, atol=2e-3)
    agreeing = sum(int((a == b).sum()) for a, b in zip(masks, after, strict=True))
    assert agreeing >= 3 * 64 - 2 and sum(flips) > 0 and abs(sum(state.flips) - sum(flips)) <= 2


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_resuming_equals_one_go(scope):
    model, examples = tiny_model(), tiny_examples(10)
    settings = Settings(ratio=0.5, scope=scope, steps=7, lr=0.2, budget=60, seed=1)
    teacher = teacher_states(model, examples, 60)
    whole, stored = begin(model, examples, scope), []
    masks = search(model, examples, whole, settings, teacher, lambda state: stored.append(copy.deepcopy(state)))
    assert [state.done for state in stored] == list(range(1, 8)) and len(whole.losses) == 7
    for middle in (stored[0], stored[3], stored[6]):
        again = search(model, examples, middle, settings, teacher)
        assert same(middle, whole) and all(torch.equal(a, b) for a, b in zip(again, masks, strict=True))
    kept = [int(mask.sum()) for mask in masks]
    assert sum(kept) == 96 and (len(set(kept)) > 1) == (scope == "global")


def test_weights_stay_and_seeds_decide():
    model, examples = tiny_model(), tiny_examples(10)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    mlps, random_state = models.gated_mlps(model), torch.get_rng_state()
    teacher = teacher_states(model, examples, 60)

    def run(seed):
        state = begin(model, examples)
        return search(model, examples, state, Settings(0.5, steps=5, lr=0.3, budget=60, seed=seed), teacher), state

    (one, a), (again, b), (_, c) = run(0), run(0), run(1)
    assert same(a, b) and all(torch.equal(x, y) for x, y in zip(one, again, strict=True))
    assert not same(a, c)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert models.gated_mlps(model) == mlps and torch.equal(torch.get_rng_state(), random_state)
    assert not any(mask.requires_grad for mask in one)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_the_loss_falls_on_what_it_is_fitted_to(scope, loss):
    model, examples = tiny_model(), tiny_examples(6)
    teacher = teacher_states(model, examples, 200)
    (batch,) = pack(examples, 200)
    state = start(channel_scores("random", Context(model)), scope)

    def value(masks):
        with torch.no_grad():
            return loss_under(model, masks, batch, teacher, loss)

    first = value(choose(state.scores, 0.5, scope))
    masks = search(model, examples, state, Settings(0.5, scope, loss, 60, 0.3, 200), teacher)
    falls_to = {"kl": 0.7, "ce": 0.85}[loss] * first  # random answers are hard to fit by a mask
    assert value(masks) < falls_to
    assert state.losses[0] == pytest.approx(first, rel=1e-3) and min(state.losses[-5:]) < falls_to


def test_batches_shuffle_every_epoch_by_the_seed_alone():
    examples = tiny_examples(9)
    stream, again = batches(examples, 60, 3), batches(examples, 60, 3)
    seen = [next(stream) for _ in range(12)]
    assert [(epoch, p.rows) for epoch, p in seen] == [(epoch, p.rows) for epoch, p in (next(again) for _ in range(12))]
    orders = [[row for epoch, p in seen if epoch == number for row in p.rows] for number in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(9)) and orders[0] != orders[1]
    other = batches(examples, 60, 4)
    assert [next(other)[1].rows for _ in range(12)] != [p.rows for _, p in seen]


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_states(family):
    model, examples, told = tiny_model(family), tiny_examples(7), []
    states = teacher_states(model, examples, 50, told.append)
    assert sum(told) == len(pack(examples, 50)) > 1
    for example, state in zip(examples, states, strict=True):
        ids = torch.tensor([example.prompt + example.answer])
        want = model.model(ids).last_hidden_state[0, len(example.prompt) - 1 : -1]
        torch.testing.assert_close(state, want, rtol=1e-5, atol=5e-5)


def test_only_missing_states_are_computed():
    model, examples, told = tiny_model(), tiny_examples(7), []
    want, targets = teacher_states(model, examples, 50), Targets(examples)
    (batch,) = pack(examples, 1000, [1, 4])
    targets.add(batch, torch.cat([want[1], want[4]]))
    assert targets.missing() == [0, 2, 3, 5, 6]
    states = teacher_states(model, examples, 50, told.append, targets)
    assert states is targets.states and not targets.missing() and sum(told) == len(pack(examples, 50, [0, 2, 3, 5, 6]))
    for state, other in zip(states, want, strict=True):
        torch.testing.assert_close(state, other, rtol=1e-5, atol=5e-5)


def test_neutral_prose_comes_as_often_as_its_weight_asks():
    examples = [Example([1], [2] * 30), Example([3], [4] * 20), Example([5], [6] * 6), Example([7], [8] * 4)]
    states = [torch.full((1, 1), float(row)) for row in range(4)]
    for weight, rows in ((0.0, [0, 1, 2, 3]), (0.4, [0, 1, 2, 3, 2, 3]), (0.6, [0, 1] + [2, 3] * 3)):
        found, teacher = weighed(examples, states, 2, weight)
        assert found == [examples[row] for row in rows] and [int(state) for state in teacher] == rows
    assert weighed(examples, states, 0, 0.4) == (examples, states)


def test_two_personas_searched_in_one_process_share_the_weights():
    """Step by step in turn on one model: each as if alone, and not a weight is copied."""
    model, settings = tiny_model(), Settings(0.5, steps=4, lr=0.3, budget=60)
    sets = tiny_examples(8, seed=1), tiny_examples(8, seed=2)
    teachers = [teacher_states(model, examples, 60) for examples in sets]
    alone = [begin(model, examples) for examples in sets]
    masks = [search(model, *given[:2], settings, given[2]) for given in zip(sets, alone, teachers, strict=True)]
    addresses = {p.data_ptr() for p in model.parameters()}
    with masked(model, masks[0]) as first:
        used = {p.data_ptr() for mlp in first for p in mlp.parameters()}
    assert used < addresses
    turns = [begin(model, examples) for examples in sets]
    for count in range(1, 5):
        for examples, state, teacher in zip(sets, turns, teachers, strict=True):
            stop_at(count, model, examples, state, settings, teacher)
    assert all(same(a, b) for a, b in zip(alone, turns, strict=True)) and not same(*alone)
    assert addresses == {p.data_ptr() for p in model.parameters()}


class Enough(Exception):
    pass


def stop_at(count, model, examples, state, settings, teacher):
    """Searches until `count` steps are done."""

    def stop(state):
        if state.done == count:
            raise Enough

    with pytest.raises(Enough):
        search(model, examples, state, settings, teacher, stop)


def test_standardised():
    scores = [torch.tensor([1.0, 10, 100]), torch.tensor([1e3, 1e4, 0.0])]
    layer, whole = standardised(scores, "layer"), standardised(scores, "global")
    for part in (*layer, torch.cat(whole)):
        assert part.mean().abs() < 1e-6 and part.std() == pytest.approx(1)
    assert layer[0].tolist() == pytest.approx([-1, 0, 1], abs=1e-6)
    assert whole[0].diff().tolist() == pytest.approx([whole[0].diff()[0].item()] * 2) and whole[1].argmin() == 2
    assert standardised([torch.ones(4)], "layer")[0].tolist() == [0] * 4


def test_no_steps_and_bad_requests():
    model, examples = tiny_model(), tiny_examples(3)
    state = begin(model, examples)
    masks = search(model, examples, state, Settings(steps=0, loss="ce"))
    assert all(torch.equal(a, b) for a, b in zip(masks, choose(state.scores, 0.25), strict=True)) and state.done == 0
    teacher = teacher_states(model, examples, 60)
    for settings, given, why in [
        (Settings(loss="mse"), examples, "loss 'mse' is not one of kl, ce"),
        (Settings(ratio=1.0), examples, "ratio"),
        (Settings(scope="row"), examples, "scope"),
        (Settings(), [], "needs examples"),
        (Settings(), [*examples[:2], type(examples[0])([1, 2], [])], "each with an answer"),
    ]:
        with pytest.raises(InputError, match=why):
            search(model, given, begin(model, examples), settings, teacher)
    with pytest.raises(InputError, match="teacher"):
        search(model, examples, state, Settings())


def test_an_interrupted_search_leaves_the_model():
    model, examples = tiny_model(), tiny_examples(3)
    mlps = models.gated_mlps(model)

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, examples, begin(model, examples), Settings(loss="ce"), after_step=stop)
    assert models.gated_mlps(model) == mlps


def test_thirty_steps_of_adam():
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(50, generator=generator)
    state, peer = State([score.clone()], [torch.zeros(50)], [torch.zeros(50)]), score.clone().requires_grad_()
    adam = torch.optim.Adam([peer], lr=0.1, betas=(0.9, 0.99), eps=1e-12)
    for step in range(30):
        peer.grad = torch.randn(50, generator=generator) * 10 ** (step % 4)
        _adam(state, [peer.grad], 0.1)
        state.done += 1
        adam.step()
    torch.testing.assert_close(state.scores[0], peer.detach(), rtol=1e-5, atol=1e-5)
