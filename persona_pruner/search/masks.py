"""Channel masks from channel scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from persona_pruner.errors import InputError

MULTIPLE = 64  # widths that 2:4 tiles, tensor parallelism and GGUF row blocks can all use


def check_ratio(ratio: float) -> float:
    """The share of channels to remove. Raises InputError outside (0, 1)."""
    if not 0 < ratio < 1:
        raise InputError(f"ratio {ratio} is not between 0 and 1; it is the share of FFN channels to remove")
    return ratio


def kept_width(width: int, ratio: float, multiple: int = MULTIPLE) -> int:
    """Channels to keep of `width`, rounded to the nearest multiple (any number for widths that are none themselves).

    Raises InputError for a ratio outside (0, 1), or so small that nothing would be removed.
    """
    step = multiple if width % multiple == 0 and width >= 4 * multiple else 1
    keep = max(step, round(width * (1 - check_ratio(ratio)) / step) * step)
    if keep >= width:
        raise InputError(
            f"ratio {ratio} removes none of {width} channels, whose number stays a multiple of {step}; "
            f"{step / width:.4g} removes the first {step}"
        )
    return keep


def check_widths(widths: Sequence[int], ratio: float) -> None:
    """Raises what `kept_width` raises for one of these; a ratio of 0 is for weights alone and fits all."""
    for width in widths if ratio else ():
        kept_width(width, ratio)


def top_k(scores: Tensor, keep: int) -> Tensor:
    """bool mask of the `keep` largest scores; among equals the first. NaN scores count as lowest."""
    order = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(descending=True, stable=True)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    mask[order[:keep]] = True
    return mask


def top_k_per_layer(scores: Sequence[Tensor], ratio: float, multiple: int = MULTIPLE) -> list[Tensor]:
    """The same share of channels kept in every layer: a checkpoint that every engine loads."""
    return [top_k(layer, kept_width(len(layer), ratio, multiple)) for layer in scores]


def top_k_global(scores: Sequence[Tensor], ratio: float, multiple: int = MULTIPLE) -> list[Tensor]:
    """The best channels of the whole model, as many in all as `top_k_per_layer` keeps; widths differ between layers.

    Scores must be comparable across layers (Fisher and Taylor are). Every layer keeps at least a sixteenth, or what
    `top_k_per_layer` would keep if that is less.
    """
    widths = [kept_width(len(layer), ratio, multiple) for layer in scores]
    floors = [min(width, max(1, len(layer) // 16)) for width, layer in zip(widths, scores, strict=True)]
    forced = [torch.where(top_k(s, floor), torch.inf, s) for s, floor in zip(scores, floors, strict=True)]
    return list(top_k(torch.cat(forced), sum(widths)).split([len(layer) for layer in scores]))


def drop_heads(
    channels: Sequence[Tensor], heads: Sequence[Tensor], ratio: float, cost: float
) -> tuple[list[Tensor], float]:
    """Which head groups stay, bool [G] a layer, where groups compete with the channels of all layers for what `ratio`
    leaves, by score a parameter; and the ratio of channels that is still to go. The weights are at most as many as
    without: `choose` with that ratio and multiple 1 drops so many channels more.

    channels: float32 [C] a layer; heads: float32 [G] a layer, of the same kind; cost: how many channels have as many
    weights as a group. The group with the lowest score goes as long as that is below cost times the score of the
    channel that would go next; every layer keeps one.
    """
    flat = torch.cat(list(channels)).nan_to_num(nan=-torch.inf).sort().values
    goal = sum(len(layer) - kept_width(len(layer), ratio) for layer in channels)
    kept = [torch.ones_like(layer, dtype=torch.bool) for layer in heads]
    dropped = 0
    known = [scores.nan_to_num(nan=torch.inf).tolist() for scores in heads]
    for score, layer, group in sorted((s, n, g) for n, scores in enumerate(known) for g, s in enumerate(scores)):
        left = goal - (dropped + 1) * cost
        if left < 1 or score >= cost * flat[int(left)]:
            break
        if kept[layer].sum() > 1:
            kept[layer][group], dropped = False, dropped + 1
    spare = len(channels) / 2 if dropped else 0  # half a channel a layer, so that rounding never keeps more
    return kept, (goal - dropped * cost + spare) / len(flat)


SCOPES = {"layer": top_k_per_layer, "global": top_k_global}


def choose(scores: Sequence[Tensor], ratio: float, scope: str = "layer", multiple: int = MULTIPLE) -> list[Tensor]:
    """Masks by scope "layer" or "global". Raises InputError for another scope or a ratio outside (0, 1)."""
    if scope not in SCOPES:
        raise InputError(f"scope {scope!r} is not one of {', '.join(SCOPES)}")
    return SCOPES[scope](scores, ratio, multiple)


def agreement(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Jaccard similarity of two masks: channels kept by both over channels kept by either."""
    both = sum(int((x & y).sum()) for x, y in zip(a, b, strict=True))
    either = sum(int((x | y).sum()) for x, y in zip(a, b, strict=True))
    return both / either if either else 1.0
