"""Batched generation: every row as if it were alone."""

import pytest
import torch

from persona_pruner.synthesis.cache import ROOM, growing_cache
from persona_pruner.synthesis.generate import generate, generate_batch
from persona_pruner.testing import FAMILIES, tiny_examples, tiny_model


def prompts_of(count, prefix=20, seed=0):
    return [example.prompt for example in tiny_examples(count, seed, prefix)]


def greedy_alone(model, prompt, count):
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prefix", [0, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family, prefix):
    model = tiny_model(family)
    prompts = prompts_of(5, prefix)
    assert len({len(p) for p in prompts}) > 2  # rows of different length: padding is in play
    got = generate_batch(model, prompts, {2}, 24, temperature=0)
    assert got == [greedy_alone(model, p, 24) for p in prompts]
    assert len({tuple(text) for text in got}) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_end_leave_and_the_others_go_on(family):
    model = tiny_model(family)
    prompts = prompts_of(6)
    free = generate_batch(model, prompts, set(), 20, temperature=0)
    assert all(len(text) == 20 for text in free)
    stop = {free[0][3], free[1][8], free[2][0]}

    def cut(text):
        ends = [i for i, token in enumerate(text) if token in stop]
        return text[: ends[0] + 1] if ends else text

    stopped = generate_batch(model, prompts, stop, 20, temperature=0)
    assert stopped == [cut(text) for text in free]  # the stop token is part of the text
    assert len({len(text) for text in stopped}) > 2


def test_one_prompt_equal_prompts_and_one_token():
    model = tiny_model()
    prompt = prompts_of(1)[0]
    (alone,) = generate_batch(model, [prompt], {2}, 10, temperature=0)
    assert alone == greedy_alone(model, prompt, 10)
    assert generate_batch(model, [prompt] * 3, {2}, 10, temperature=0) == [alone] * 3
    assert generate_batch(model, [[5]], {2}, 4, temperature=0) == [greedy_alone(model, [5], 4)]
    assert generate_batch(model, [prompt], {2}, 1, temperature=0) == [alone[:1]]


def test_seeds():
    model, prompts = tiny_model(), prompts_of(4)
    one, again, other = (generate_batch(model, prompts, {2}, 16, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    state = torch.get_rng_state()
    generate_batch(model, prompts, {2}, 2, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_samples_follow_the_distribution():
    model = tiny_model()
    prompt = prompts_of(1)[0]
    tokens = [text[0] for text in generate_batch(model, [prompt] * 4000, set(), 1, temperature=0.7, top_k=5)]
    best, ids = model(torch.tensor([prompt])).logits[0, -1].topk(5)
    assert set(tokens) <= set(ids.tolist())
    shares = torch.tensor([tokens.count(i) for i in ids.tolist()]) / 4000
    assert (shares - torch.softmax(best / 0.7, -1)).abs().max() < 0.04  # five deviations


def test_batches_store_and_resume():
    model, prompts = tiny_model(), prompts_of(7)
    stored = []
    texts = generate(model, prompts, {2}, 8, batch=3, seed=5, done=stored.append)
    assert [len(batch) for batch in stored] == [3, 3, 1] and [*stored[0], *stored[1], *stored[2]] == texts
    assert generate(model, prompts, {2}, 8, batch=3, seed=5, start=3) == texts[3:]
    assert generate(model, prompts, {2}, 8, batch=3, seed=6) != texts
    assert generate(model, prompts, {2}, 8, start=7) == [] == generate(model, [], {2}, 8)


def test_growing_cache_equals_dynamic_cache():
    from transformers import DynamicCache

    def layers(cache):
        return [(layer.keys, layer.values) for layer in cache.layers]

    model = tiny_model()
    ours, theirs = growing_cache(model), DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(0)

    def feed(rows, tokens):
        for index in range(3):
            new = torch.randn(2, rows, 2, tokens, 8, generator=generator)
            pairs = zip(ours.update(*new, index), theirs.update(*new, index), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)

    feed(1, 5)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(4)
    for _ in range(ROOM + 3):  # past the spare room
        feed(4, 1)
    keep = torch.tensor([0, 2])
    for cache in (ours, theirs):
        cache.batch_select_indices(keep)
    feed(2, 1)
    feed(2, ROOM + 5)
    for cache in (ours, theirs):
        cache.crop(-3)
    feed(2, 1)
    assert ours.get_seq_length() == theirs.get_seq_length() == 5 + ROOM + 3 + 1 + ROOM + 5 - 3 + 1
    for mine, other in zip(layers(ours), layers(theirs), strict=True):
        assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])
    for cache in (ours, theirs):
        cache.reset()
    feed(3, 2)


def test_a_step_does_not_copy_the_cache():
    cache = growing_cache(tiny_model())
    new = torch.randn(1, 2, 1, 8)
    cache.update(new, new, 0)
    where = cache.layers[0].keys.data_ptr()
    for _ in range(ROOM):
        cache.update(new, new, 0)
    assert cache.layers[0].keys.data_ptr() == where
