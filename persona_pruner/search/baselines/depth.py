"""Depth pruning: whole blocks are removed."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.packing import Pack, answer_states
from persona_pruner.search.baselines.channels import SAMPLES, few
from persona_pruner.search.baselines.size import removed
from persona_pruner.search.losses import cross_entropy
from persona_pruner.search.scores import Context


def without(model: nn.Module, dropped: Sequence[int]) -> nn.Module:
    """A copy of the model without these blocks. Raises InputError when none would be left."""
    kept = [i for i in range(len(models.decoder_layers(model))) if i not in set(dropped)]
    if not kept:
        raise InputError("depth pruning would remove every block")
    return keep_(copy.deepcopy(model), kept)


def keep_(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Leaves these blocks only, in place; they are numbered anew for the key/value cache."""
    decoder, config = model.get_decoder(), model.config.get_text_config()
    decoder.layers = nn.ModuleList([decoder.layers[i] for i in kept])
    for place, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = place
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    return model


@torch.no_grad()
def block_losses(model: nn.Module, packs: Sequence[Pack], step=lambda done: None) -> list[float]:
    """Cross-entropy of the calibration data, in nats a token, with one block left out at a time."""
    device = model.get_input_embeddings().weight.device
    packs = [batch.to(device) for batch in packs]
    tokens = sum(len(batch.target) for batch in packs)
    losses = []
    for block in models.decoder_layers(model):
        hook = block.register_forward_hook(lambda _, args, kwargs, out: _input(args, kwargs), with_kwargs=True)
        try:
            total = sum(cross_entropy(model, answer_states(model, b), b.target).item() for b in packs)
        finally:
            hook.remove()
        losses.append(total / tokens)
        step(1)
    return losses


def _input(args: tuple, kwargs: dict):
    return args[0] if args else kwargs["hidden_states"]


def prune(context: Context, ratio: float) -> nn.Module:
    """Shortened LLaMA (Kim et al., 2024), by perplexity: the importance of a block is the calibration loss without it,
    measured once on ten sequences, and the least important blocks go. The number of blocks is the one whose parameters
    come nearest to the budget. Simplified: no retraining follows."""
    blocks = models.decoder_layers(context.model)
    size = sum(p.numel() for p in blocks[0].parameters())
    count = min(max(1, round(removed(context.model, ratio) / size)), len(blocks) - 1)
    packs = few(context.packs, context.seed, sequences=SAMPLES)
    losses = torch.tensor(block_losses(context.model, packs, context.step))
    return without(context.model, losses.argsort(stable=True)[:count].tolist())
