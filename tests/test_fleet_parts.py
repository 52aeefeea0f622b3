"""The parts of the fleet by themselves: sampling against transformers, text, the book of blocks."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_pruner.fleet.blocks import Blocks
from persona_pruner.fleet.characters import popular_first
from persona_pruner.fleet.sampling import Sampling, choose
from persona_pruner.fleet.text import TextStream
from persona_pruner.testing import tiny_tokenizer


def by_transformers(scores, sampling, seen):
    """Probabilities after transformers' own processors."""
    from transformers import generation as g

    ids, scores = torch.tensor([seen]), scores[None].clone()
    steps = [
        g.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        g.TemperatureLogitsWarper(sampling.temperature),
        g.TopPLogitsWarper(sampling.top_p),
        g.MinPLogitsWarper(max(sampling.min_p, 1e-9)),
    ]
    for step in steps:
        scores = step(ids, scores)
    return scores[0].softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, top_p=0.8),
        Sampling(temperature=3.0, top_p=0.99),  # more than the candidates
        Sampling(temperature=1.2, min_p=0.1, repetition_penalty=1.3),
        Sampling(temperature=0.9, top_p=0.9, min_p=0.05, repetition_penalty=0.8),
    ],
)
def test_tokens_come_as_often_as_transformers_says(sampling):
    generator = torch.Generator().manual_seed(5)
    scores, seen = 2 * torch.randn(600, generator=generator), [3, 3, 17, 200]
    want = by_transformers(scores, sampling, seen).numpy()
    random, count = np.random.default_rng(0), 4000
    found = Counter(choose(scores, sampling, seen, random) for _ in range(count))
    assert all(want[token] > 0 for token in found)
    for token in np.argsort(want)[-5:]:
        expected = count * want[token]
        assert abs(found[token] - expected) <= 4.5 * np.sqrt(expected) + 1


def test_greedy_takes_the_lowest_of_equals_and_obeys_the_penalty():
    scores, random = torch.tensor([1.0, 3.0, 3.0, -1.0]), np.random.default_rng(0)
    assert choose(scores, Sampling(temperature=0), [], random) == 1
    assert choose(scores, Sampling(temperature=0, repetition_penalty=1.5), [1], random) == 2
    with pytest.raises(ValueError, match="not numbers"):
        choose(torch.full((4,), torch.nan), Sampling(), [], random)


def spoken(text, stop=()):
    tokenizer = tiny_tokenizer()
    stream, pieces = TextStream(tokenizer, stop), []
    for token in tokenizer(text)["input_ids"]:
        piece, stopped = stream.add(token)
        pieces.append(piece)
        if stopped:
            return pieces
    return [*pieces, stream.rest()]


def test_the_popular_come_first_in_every_range():
    kept = np.arange(64) // 8 % 8  # every number eight times
    order = popular_first(kept)
    assert sorted(order) == list(range(64))
    assert (kept[order].reshape(8, 8) == np.arange(8)[::-1]).all()
    assert sorted(popular_first(kept[:13])) == list(range(13))


def test_arranged_channels_lie_in_fewer_pieces():
    random = np.random.default_rng(0)
    scores = random.normal(size=1536) + 0.43 * random.normal(size=(16, 1536))  # as in bench fleet
    kept = scores > np.median(scores, axis=1, keepdims=True)
    pieces = lambda mask: int((np.diff(mask.astype(int)) == 1).sum())  # noqa: E731
    arranged = kept[:, popular_first(kept.sum(0))]
    assert all(pieces(after) < pieces(before) / 2 for before, after in zip(kept, arranged, strict=True))


def test_characters_come_whole():
    text = "Grüße, 你好, 🔨 and 👩‍🏭!"
    pieces = spoken(text)
    assert "".join(pieces) == text and all("\ufffd" not in piece for piece in pieces) and len(pieces) > 20


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(max_examples=150, deadline=None)
def test_nothing_of_a_stop_string_is_shown(text, stop):
    """Where stop strings overlap, the one that is complete first ends the text, so more than the least may be shown."""
    ends, shown = [at for at in map(text.find, stop) if at >= 0], "".join(spoken(text, stop))
    assert text.startswith(shown) and not any(one in shown for one in stop)
    assert len(shown) >= min(ends) if ends else shown == text


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=60))
@settings(max_examples=150, deadline=None)
def test_blocks_are_never_lost_or_given_twice(moves):
    """Random users take chains of known and new blocks and leave; every block is somewhere, once."""
    blocks, users = Blocks(6), {}
    for kind, number in moves:
        if kind < 3 and number not in users:
            table, parent = [], -kind
            for index in range(3):
                block = blocks.find(parent, (kind, index))
                if block is not None:
                    blocks.hold(block)
                elif not blocks.available:
                    break
                else:
                    block = blocks.take()
                    assert not any(block in other for other in users.values())
                    blocks.name(block, parent, (kind, index), number if index == 2 else None)
                parent = blocks.serial[block]
                table.append(block)
            users[number] = table
        elif kind == 3 and number in users:
            blocks.release(users.pop(number), number)
        used = {block for table in users.values() for block in table}
        assert blocks.available == 6 - len(used)
    for number in list(users):
        blocks.release(users.pop(number), number)
    blocks.forget(0)
    assert blocks.available == 6 and len({blocks.take() for _ in range(6)}) == 6
