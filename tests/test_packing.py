"""Packed batches: one forward over a pack is the same as one forward for each example."""

import itertools
from dataclasses import replace

import pytest
import torch

from persona_pruner.packing import (
    Example,
    answer_states,
    common_prefix,
    evenly,
    hidden_states,
    logits,
    pack,
    text_packs,
)
from persona_pruner.prefix_attention import PackLayout
from persona_pruner.testing import FAMILIES, assert_close_to_oracle, tiny_examples, tiny_model

WINDOWED = {"mistral", "gemma3"}


def alone(model, example):
    """Logits at the answer's places from transformers' own forward on one example."""
    ids = torch.tensor([example.prompt + example.answer])
    return model(ids).logits[0, len(example.prompt) - 1 : -1].float()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate(family, attention):
    model = tiny_model(family, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    examples = tiny_examples(9, prefix=20)  # longer than the windows of 12
    packs = pack(examples, budget=60)
    assert len(packs) > 2 and max(len(p.rows) for p in packs) > 2
    for batch in packs:
        got = logits(model, answer_states(model, batch))
        want = torch.cat([alone(model, examples[row]) for row in batch.rows])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_matter_in_these_models(family):
    model = tiny_model(family)
    if family in WINDOWED:
        ids = torch.tensor([tiny_examples(1, prefix=30)[0].prompt])
        short = model(ids).logits[0, -1]
        wide = tiny_model(family, sliding_window=1000)(ids).logits[0, -1]
        assert (short - wide).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_texts(family):
    model = tiny_model(family)
    texts = [example.prompt + example.answer for example in tiny_examples(3, prefix=15)]
    packs = text_packs([*texts, [5], []])  # nothing to predict in the last two
    assert [p.rows for p in packs] == [(0,), (1,), (2,)]
    for batch, ids in zip(packs, texts, strict=True):
        assert batch.target.tolist() == ids[1:]
        want = model(torch.tensor([ids])).logits[0, :-1]
        torch.testing.assert_close(logits(model, answer_states(model, batch)), want, rtol=1e-5, atol=5e-5)


def test_a_capped_head():
    model = tiny_model("gemma3", final_logit_softcapping=2.0)
    example = tiny_examples(1)[0]
    got = logits(model, answer_states(model, pack([example])[0]))
    torch.testing.assert_close(got, alone(model, example), rtol=1e-5, atol=1e-5)
    assert got.abs().max() <= 2 < tiny_model("gemma3")(torch.tensor([example.prompt])).logits.abs().max()


@pytest.mark.parametrize("second", [5, 2])
def test_groups_are_packed_apart_and_spread_evenly(second):
    alone = [tiny_examples(size, prefix=20, seed=seed) for seed, size in ((1, 5), (2, second))]
    mixed = [replace(example, group=g) for g, group in enumerate(alone) for example in group]
    order = [row for row in (7, 0, 8, 3, 1, 5, 2, 9, 4, 6) if row < len(mixed)]
    packs = pack(mixed, 40, order)
    theirs = [batch.rows[0] >= 5 for batch in packs]
    for seen in range(len(packs) + 1):
        assert abs(sum(theirs[:seen]) - seen * sum(theirs) / len(packs)) <= 1
    for number, group in enumerate(alone):
        own = [row - 5 * number for row in order if row // 5 == number]
        for got, want in zip([p for p in packs if p.rows[0] // 5 == number], pack(group, 40, own), strict=True):
            assert got.rows == tuple(row + 5 * number for row in want.rows)
            assert got.input_ids.tolist() == want.input_ids.tolist() and got.segment.tolist() == want.segment.tolist()


def test_layout_by_hand():
    a, b, c = Example([1, 2, 3], [4, 5]), Example([1, 2, 6, 7], [8]), Example([1, 2, 3, 9], [])
    (batch,) = pack([a, b, c])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 6, 7, 3, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 2, 3]
    assert batch.segment.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.predict.tolist() == [2, 3, 5] and batch.target.tolist() == [4, 5, 8]
    assert batch.rows == (0, 1, 2)
    assert all(x.dtype == torch.long for x in (batch.input_ids, batch.position_ids, batch.segment, batch.predict))


def test_one_example_with_one_answer_token():
    model = tiny_model()
    example = Example([5, 6, 7], [8])
    (batch,) = pack([example])
    assert batch.segment.tolist() == [0, 0, 1] and batch.predict.tolist() == [2]
    torch.testing.assert_close(logits(model, answer_states(model, batch)), alone(model, example))
    (shortest,) = pack([Example([5], [8])])
    assert shortest.input_ids.tolist() == [5] and shortest.predict.tolist() == [0]


@pytest.mark.parametrize(
    "sequences, length",
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2], [1, 2, 3]], 1),  # at least one token of the shortest stays its own
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[7, 8]], 1),
        ([[1], [2, 3]], 0),
        ([[1, 5, 2], [1, 9], [1, 5, 3]], 1),
        ([(1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 5)], 2),
    ],
)
def test_common_prefix(sequences, length):
    assert common_prefix(sequences) == length


def test_budget_and_order():
    examples = tiny_examples(20, prefix=10)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)).tolist()
    packs = pack(examples, budget=50, order=order)
    assert [row for p in packs for row in p.rows] == order
    assert all(len(p.input_ids) <= 50 for p in packs)
    sizes = [len(e.prompt) - 10 + len(e.answer) - 1 for e in examples]
    for this, following in itertools.pairwise(packs):  # no pack had room for the next example
        assert len(this.input_ids) + sizes[following.rows[0]] > 50
    tiny = pack(examples, budget=1)
    assert [p.rows for p in tiny] == [(row,) for row in range(20)]
    assert all(p.target.tolist() == examples[p.rows[0]].answer for p in tiny)
    assert [row for p in pack(examples, order=[4, 2]) for row in p.rows] == [4, 2]


def test_evenly():
    assert evenly(5, 9) == evenly(5, 5) == [0, 1, 2, 3, 4] and evenly(0, 3) == []
    assert evenly(10, 4) == [0, 2, 5, 7] and evenly(7, 1) == [0]


def test_nothing_and_an_empty_prompt():
    assert pack(tiny_examples(3), 60, []) == []
    assert pack([]) == [] and text_packs([]) == []
    with pytest.raises(ValueError, match="empty prompt"):
        pack([Example([1, 2], [3]), Example([], [3])])


def test_examples_do_not_see_each_other():
    model, examples = tiny_model(), tiny_examples(3)
    changed = [examples[0], Example([*examples[1].prompt[:-1], 300], [9] * len(examples[1].answer)), examples[2]]
    (one,), (two,) = pack(examples), pack(changed)
    first, second = (hidden_states(model, p).last_hidden_state[0] for p in (one, two))
    assert torch.equal(one.segment, two.segment)
    others = one.segment != 2
    torch.testing.assert_close(first[others], second[others], rtol=0, atol=0)
    assert not torch.equal(first[~others], second[~others])


@pytest.mark.parametrize("prefix, lengths", [(7, [3, 1, 5]), (0, [9]), (1, [2, 2]), (40, [1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_attention_of_a_pack(dtype, prefix, lengths):
    """Output and slopes as those of the plain form (a window that hides nothing), against float64."""
    torch.manual_seed(0)
    segment = torch.repeat_interleave(torch.arange(1 + len(lengths)), torch.tensor([prefix, *lengths]))
    position = torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in lengths)])
    layout, total = PackLayout(segment, position), len(segment)
    inputs = [torch.randn(1, total, heads, 8).to(dtype).transpose(1, 2) for heads in (6, 2, 2)]
    slope = torch.randn(1, total, 6, 8).to(dtype)

    def run(inputs, window):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = layout.attend(0, *leaves, 0.3, window)
        return [out.detach(), *torch.autograd.grad(out, leaves, slope.to(out.dtype))]

    exact = run([x.double() for x in inputs], 10**6)  # its softmax is in float32
    for got, plain, oracle in zip(run(inputs, None), run(inputs, 10**6), exact, strict=True):
        assert_close_to_oracle(got, oracle, plain, 1e-2 if dtype == torch.bfloat16 else 2e-6)
