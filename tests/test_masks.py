"""Masks from scores, by hand."""

import pytest
import torch

from persona_pruner.errors import InputError
from persona_pruner.search.masks import (
    agreement,
    check_ratio,
    choose,
    drop_heads,
    kept_width,
    top_k,
    top_k_global,
)

NAN, INF = float("nan"), float("inf")


def kept(mask):
    return mask.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    "scores, keep, expected",
    [
        ([3.0, 1.0, 2.0], 2, [0, 2]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.0, -0.0, 1.0], 2, [0, 2]),
        ([-0.0, 0.0, -1.0], 1, [0]),
        ([NAN, -5.0, NAN, 4.0], 3, [0, 1, 3]),
        ([NAN, NAN, 1.0], 2, [0, 2]),
        ([3.4028234663852886e38, INF], 1, [1]),
        ([-3.4028234663852886e38, -INF, NAN], 1, [0]),
        ([1.0, 2.0], 0, []),
        ([1.0, 2.0], 2, [0, 1]),
    ],
)
def test_top_k(scores, keep, expected):
    mask = top_k(torch.tensor(scores), keep)
    assert mask.dtype == torch.bool and kept(mask) == expected


def test_ties_in_a_long_row_go_to_the_first():
    scores = torch.zeros(5000)
    scores[1234:] = 1
    assert kept(top_k(scores, 100)) == list(range(1234, 1334))


@pytest.mark.parametrize(
    "width, ratio, multiple, expected",
    [
        (1536, 0.25, 64, 1152),
        (1536, 0.5, 64, 768),
        (1536, 0.3, 64, 1088),  # 16.8 steps
        (1536, 0.999, 64, 64),
        (1536, 0.0417, 64, 1472),
        (1536, 0.25, 256, 1024),  # 4.5 steps: half-way goes to the even count
        (64, 0.25, 64, 48),  # too narrow for steps of 64
        (100, 0.25, 64, 75),
        (100, 0.999, 64, 1),
    ],
)
def test_kept_width(width, ratio, multiple, expected):
    assert kept_width(width, ratio, multiple) == expected


@pytest.mark.parametrize(
    "width, ratio, why",
    [
        (1536, 0.001, "removes none of 1536 .* a multiple of 64; 0.04167 removes the first 64"),
        (1536, 0.02, "multiple of 64"),
        (100, 0.004, "removes none of 100 .* a multiple of 1; 0.01 removes the first 1"),
        (1, 0.9, "removes none of 1 "),
    ],
)
def test_a_ratio_that_would_remove_nothing(width, ratio, why):
    with pytest.raises(InputError, match=why):
        kept_width(width, ratio)
    with pytest.raises(InputError, match=why):
        choose([torch.rand(width)], ratio)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, NAN, INF])
def test_ratio_outside(ratio):
    with pytest.raises(InputError, match=r"ratio .* is not between 0 and 1"):
        check_ratio(ratio)
    with pytest.raises(InputError, match="ratio"):
        choose([torch.rand(8)], ratio)


def test_per_layer_and_global():
    scores = [torch.arange(8.0), torch.arange(8.0) + 100]
    layer = choose(scores, 0.25, "layer", 1)
    assert [kept(mask) for mask in layer] == [[2, 3, 4, 5, 6, 7]] * 2
    whole = choose(scores, 0.25, "global", 1)
    assert kept(whole[1]) == list(range(8)) and kept(whole[0]) == [4, 5, 6, 7]
    with pytest.raises(InputError, match="scope 'column' is not one of layer, global"):
        choose(scores, 0.25, "column")


@pytest.mark.parametrize("ratio", [0.2, 0.25, 0.5, 0.9, 0.97, 0.999])
@pytest.mark.parametrize("width, multiple", [(256, 64), (300, 64), (64, 1)])
def test_global_keeps_as_many_and_a_floor(ratio, width, multiple):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(width, generator=generator) + 5 * index for index in range(4)]
    layer, whole = (choose(scores, ratio, scope, multiple) for scope in ("layer", "global"))
    assert sum(int(m.sum()) for m in whole) == sum(int(m.sum()) for m in layer)
    floor = min(width // 16, int(layer[0].sum()))
    assert all(int(m.sum()) >= floor > 0 for m in whole)
    assert int(whole[-1].sum()) >= int(whole[0].sum())


def test_global_floor_holds_the_best_of_the_layer():
    scores = [torch.arange(32.0), 1000 + torch.arange(32.0)]
    first, second = top_k_global(scores, 0.5, 1)
    assert kept(first) == [30, 31] and kept(second) == list(range(2, 32))


def test_agreement():
    a, b = [torch.tensor([True, True, False])], [torch.tensor([True, False, True])]
    assert agreement(a, b) == pytest.approx(1 / 3) and agreement(a, a) == 1
    assert agreement([~a[0] & a[0]], [~a[0] & a[0]]) == 1


def test_head_groups_compete_with_channels():
    """Of 2 x 40 channels 1, 2, ... half go, a group weighs five: beside two groups 30 channels, and at most one more a
    layer."""
    channels = [torch.arange(1.0, 80, 2), torch.arange(2.0, 81, 2)]
    cheap, dear = 5 * 31 - 1, 5 * 36 + 1
    kept, left = drop_heads(channels, [torch.tensor([cheap, dear]), torch.tensor([NAN, cheap])], 0.5, 5)
    assert [mask.tolist() for mask in kept] == [[False, True], [True, False]]
    assert sum(int((~mask).sum()) for mask in choose(channels, left, "global", 1)) in (30, 31, 32)
    kept, left = drop_heads(channels, [torch.tensor([dear, dear])] * 2, 0.5, 5)
    assert all(mask.all() for mask in kept) and left == 0.5
    kept, left = drop_heads(channels, [torch.zeros(2)] * 2, 0.5, 5)  # a layer keeps one
    assert [int(mask.sum()) for mask in kept] == [1, 1]
    kept, left = drop_heads(channels, [torch.zeros(3)] * 2, 0.5, 39.5)  # nothing would be left for channels
    assert all(mask.all() for mask in kept) and left == 0.5


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.77])
@pytest.mark.parametrize("cost", [3.3, 16, 171.0])
def test_with_head_groups_gone_at_most_as_many_weights_stay(ratio, cost):
    generator = torch.Generator().manual_seed(0)
    channels = [torch.rand(1536, generator=generator) for _ in range(5)]
    heads = [torch.rand(3, generator=generator) * cost for _ in range(5)]
    kept, left = drop_heads(channels, heads, ratio, cost)
    gone = sum(int((~mask).sum()) for mask in kept)
    channels_gone = sum(int((~mask).sum()) for mask in choose(channels, left, "global", 1 if gone else 64))
    goal = sum(1536 - kept_width(1536, ratio) for _ in channels)
    assert 0 <= channels_gone + gone * cost - goal <= 5
