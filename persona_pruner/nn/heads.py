"""Head groups: a key/value head with the query heads that read it, the smallest part of attention that can be cut out
of a layer so that transformers runs what is left as it is. Every layer may keep another number of them.

With a the part of o_proj's input [T, q] that a group gives, and m a mask on the group, dLoss/dm of a token is the sum
of a * dLoss/da over the group's dimensions: the same quantity as for an FFN channel (see `ops.masked_swiglu`), so that
the Fisher scores of groups and of channels can be compared.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.nn.mlp import mean_bias, sliced

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention of every layer; none at all where one is not made of dense q_proj, k_proj, v_proj and o_proj, or
    has parameters that are not the same for all heads (norms over all of them, sinks)."""
    found = [getattr(layer, "self_attn", None) for layer in models.decoder_layers(model)]
    return found if all(_plain(attention) for attention in found) else []


def _plain(attention: nn.Module | None) -> bool:
    if not all(type(getattr(attention, part, None)) is nn.Linear for part in PARTS):
        return False
    others = [p for name, p in attention.named_parameters() if name.partition(".")[0] not in PARTS]
    size = getattr(attention, "head_dim", None)
    return size is not None and all(p.shape == (size,) for p in others)


def head_groups(model: nn.Module) -> list[int]:
    """Head groups of every layer; empty where `attentions` is."""
    return [attention.k_proj.out_features // attention.head_dim for attention in attentions(model)]


def group_cost(model: nn.Module) -> float:
    """Weights of a head group of the first layer, over those of an FFN channel."""
    attention, mlp = attentions(model)[0], models.gated_mlps(model)[0]
    group = sum(getattr(attention, part).weight.numel() for part in PARTS) / head_groups(model)[0]
    channel = sum(p.weight.numel() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)) / mlp.gate_proj.out_features
    return group / channel


@contextmanager
def heads_watched(model: nn.Module, fisher: Sequence[Tensor]) -> Iterator[None]:
    """Within the context every backward pass adds to `fisher`, float32 [G] a layer: sum over tokens of (dLoss/dm)^2."""

    def watch(total: Tensor, args: tuple) -> tuple:
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        value = x.detach()  # a hook that holds x itself would keep the graph alive

        def add(grad: Tensor) -> None:
            slope = (value.float() * grad.float()).unflatten(-1, (len(total), -1)).sum(-1)
            total.add_(slope.flatten(0, -2).square().sum(0))

        x.register_hook(add)
        return (x,)

    with ExitStack() as stack:
        for attention, total in zip(attentions(model), fisher, strict=True):
            hook = attention.o_proj.register_forward_pre_hook(lambda _, args, total=total: watch(total, args))
            stack.callback(hook.remove)
        yield


@torch.no_grad()
def cut_heads_(model: nn.Module, kept: Sequence[Tensor], means: Sequence[Tensor] | None = None) -> nn.Module:
    """Cuts the head groups outside `kept` (bool [G] a layer) out of the model, in place.

    With `means`, float32 [q] a layer, of what enters o_proj, a bias of o_proj stands in for what was cut out.
    Raises InputError for a model without head groups, masks of a wrong length, and a layer that would keep none.
    """
    if not (groups := head_groups(model)) or [len(mask) for mask in kept] != groups:
        raise InputError(f"masks for {[len(m) for m in kept]} head groups a layer; the model has {groups or 'none'}")
    if not all(bool(mask.any()) for mask in kept):
        raise InputError("a mask keeps no head group in some layer")
    for layer, (attention, mask) in enumerate(zip(attentions(model), kept, strict=True)):
        if mask.all():
            continue
        mask = mask.to(attention.q_proj.weight.device)
        query, key = (mask.repeat_interleave(p.out_features // len(mask)) for p in (attention.q_proj, attention.k_proj))
        output = sliced(attention.o_proj, query.nonzero()[:, 0], 1)
        if means:
            output.bias = mean_bias(attention.o_proj, ~query, means[layer])
        attention.o_proj = output
        for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            setattr(attention, name, sliced(getattr(attention, name), rows.nonzero()[:, 0], 0))
    return model
