"""What "equal parameter count" means: parameters outside the embedding table and the head."""

from torch import nn

from persona_pruner import models
from persona_pruner.search.masks import kept_width


def parameters(model: nn.Module) -> int:
    """Parameters of the model without the embedding table and the head, which no method here cuts."""
    table = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return sum(p.numel() for p in model.parameters() if id(p) not in table)


def nonzero(model: nn.Module) -> int:
    """The same without zeros, which 2:4 formats do not store."""
    table = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return sum(int(p.count_nonzero()) for p in model.parameters() if id(p) not in table)


def removed(model: nn.Module, ratio: float) -> int:
    """Parameters that channel masks of this ratio remove."""
    total = 0
    for mlp, width in zip(models.gated_mlps(model), models.widths(model), strict=True):
        parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        own = sum(p.weight.numel() for p in parts) + sum(p.bias.numel() for p in parts[:2] if p.bias is not None)
        total += own // width * (width - kept_width(width, ratio))
    return total


def budget(model: nn.Module, ratio: float) -> int:
    """Parameters that a method may leave at this ratio."""
    return parameters(model) - removed(model, ratio)
