"""Many characters on one base model: the weights once, kilobytes for each character, one batch for all of them."""

from persona_pruner.fleet.engine import DENSE, Event, Fleet, QueueFull
from persona_pruner.fleet.sampling import Sampling

__all__ = ["DENSE", "Event", "Fleet", "QueueFull", "Sampling"]
