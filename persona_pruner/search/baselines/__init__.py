"""The published methods that a persona's mask is compared with, behind one interface.

A method takes a `Context` (frozen model, calibration packs, seed) and the share of FFN channels to remove, and gives a
pruned copy that runs, generates and is measured like any other model. Every copy has at most the parameters that the
channel masks of that ratio leave (`budget`); depth pruning, which removes whole blocks, has the nearest number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from persona_pruner.errors import InputError
from persona_pruner.search.baselines import adapt_pruner, channels, depth, slicegpt, two_four
from persona_pruner.search.scores import Context

Prune = Callable[[Context, float], nn.Module]


@dataclass(frozen=True)
class Baseline:
    """How it prunes; what is said of it in tables; whether it looks at calibration data; whether equal data and another
    seed give another model; `two_four`: it keeps two of every four weights instead of a share of the channels, so that
    only ratio 0.5 fits."""

    prune: Prune
    how: str
    data: bool = True
    seeded: bool = False
    two_four: bool = False


_FFN = partial(two_four.sparsegpt, ffn_only=True)
BASELINES: dict[str, Baseline] = {
    "random": Baseline(channels.random, "channels drawn at random", data=False, seeded=True),
    "magnitude": Baseline(channels.magnitude, "L2 norm of a channel's weights", data=False),
    "wanda": Baseline(channels.wanda, "norm of the channel's input times its weights (Sun et al. 2024, structured)"),
    "flap": Baseline(channels.flap, "fluctuation of the channel, bias compensation (An et al. 2024)"),
    "llm-pruner": Baseline(channels.llm_pruner, "first-order Taylor of a channel's weights (Ma et al. 2023)"),
    "depth": Baseline(depth.prune, "whole blocks by perplexity (Shortened LLaMA, Kim et al. 2024)"),
    "slicegpt": Baseline(slicegpt.prune, "principal components of the residual stream (Ashkboos et al. 2024)"),
    "adapt-pruner": Baseline(adapt_pruner.prune, "layers by how much they change their input (Pan et al. 2025)"),
    "magnitude-2:4": Baseline(two_four.magnitude, "largest weights, 2:4", data=False, two_four=True),
    "wanda-2:4": Baseline(two_four.wanda, "weight times input norm, 2:4 (Sun et al. 2024)", two_four=True),
    "sparsegpt-2:4": Baseline(
        two_four.sparsegpt, "optimal brain surgeon, 2:4 (Frantar and Alistarh 2023)", two_four=True
    ),
    "sparsegpt-2:4-ffn": Baseline(_FFN, "the same on the FFN's linears only", two_four=True),
}


def prune(name: str, context: Context, ratio: float) -> nn.Module:
    """A pruned copy by one method. Raises InputError for an unknown method, a ratio outside (0, 1), missing
    calibration data, and architectures that the method does not fit."""
    if name not in BASELINES:
        raise InputError(f"method {name!r} is not one of {', '.join(BASELINES)}")
    method = BASELINES[name]
    if method.data and not context.packs:
        raise InputError(f"method {name} needs calibration data")
    if method.two_four and ratio != 0.5:
        raise InputError(f"method {name} removes half of the weights; ratio {ratio} is not possible")
    return method.prune(context, ratio)
