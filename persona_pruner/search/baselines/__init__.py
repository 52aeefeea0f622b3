"""The published methods that a persona's mask is compared with, behind one interface.

A method takes a `Context` (frozen model, calibration packs, seed) and the share of FFN channels to remove, and gives a
pruned copy that runs, generates and is measured like any other model. Every copy has at most the parameters that the
channel masks of that ratio leave (`budget`); depth pruning, which removes whole blocks, has the nearest number.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from persona_pruner.errors import InputError
from persona_pruner.search.baselines import adapt_pruner, channels, depth, slicegpt, two_four
from persona_pruner.search.scores import Context

Prune = Callable[[Context, float], nn.Module]


@dataclass(frozen=True)
class Baseline:
    """`prune`; whether it looks at calibration data; whether equal data and another seed give another model;
    `two_four`: it keeps two of every four weights instead of a share of the channels, so that only ratio 0.5 fits."""

    prune: Prune
    data: bool = True
    seeded: bool = False
    two_four: bool = False


BASELINES: dict[str, Baseline] = {
    "random": Baseline(channels.random, data=False, seeded=True),
    "magnitude": Baseline(channels.magnitude, data=False),
    "wanda": Baseline(channels.wanda),
    "flap": Baseline(channels.flap),
    "llm-pruner": Baseline(channels.llm_pruner),
    "depth": Baseline(depth.prune),
    "slicegpt": Baseline(slicegpt.prune),
    "adapt-pruner": Baseline(adapt_pruner.prune),
    "magnitude-2:4": Baseline(two_four.magnitude, data=False, two_four=True),
    "wanda-2:4": Baseline(two_four.wanda, two_four=True),
    "sparsegpt-2:4": Baseline(two_four.sparsegpt, two_four=True),
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
