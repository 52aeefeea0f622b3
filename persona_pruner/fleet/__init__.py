"""Many characters on one base model: the weights once, kilobytes for each character, one batch for all of them."""

from persona_pruner.fleet.characters import DENSE
from persona_pruner.fleet.engine import Fleet
from persona_pruner.fleet.requests import Event, QueueFull
from persona_pruner.fleet.sampling import Sampling

__all__ = ["DENSE", "Event", "Fleet", "QueueFull", "Sampling"]
