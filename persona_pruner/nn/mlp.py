"""Gated MLPs under a channel mask, and gated MLPs with the dropped channels cut out."""

import copy
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.ops import masked_swiglu


class MaskedMLP(nn.Module):
    """A gated MLP whose channels are multiplied by a mask: down(act(gate(x)) * up(x) * mask).

    Shares the weights of `mlp`. `mask` is bool or float32 [C]; `taylor` and `fisher`, float32 [C], gather
    channel scores during the backward pass (see `ops.masked_swiglu`). With `means`, float32 [C], a dropped channel
    gives its mean instead of nothing: down(act(gate(x)) * up(x) * mask + means * (1 - mask)).
    """

    def __init__(
        self,
        mlp: nn.Module,
        mask: Tensor,
        act: str,
        taylor: Tensor | None = None,
        fisher: Tensor | None = None,
        means: Tensor | None = None,
    ):
        super().__init__()
        self.mlp, self.act, self.mask, self.taylor, self.fisher, self.means = mlp, act, mask, taylor, fisher, means

    def hidden(self, x: Tensor) -> Tensor:
        """[..., C]: what enters down_proj."""
        gate, up = self.mlp.gate_proj(x), self.mlp.up_proj(x)
        return masked_swiglu(gate, up, self.mask, self.act, self.taylor, self.fisher)

    def forward(self, x: Tensor) -> Tensor:
        out = self.mlp.down_proj(self.hidden(x))
        if self.means is None:
            return out
        stand_in = self.means * (1 - self.mask.float())
        return out + nn.functional.linear(stand_in.to(out.dtype), self.mlp.down_proj.weight)


@contextmanager
def masked(model: nn.Module, masks: Sequence[Tensor], taylor=None, fisher=None, means=None):
    """Within the context every MLP of the model runs under its mask (lists have one [C] tensor a layer).

    Yields the MaskedMLPs in layer order. Weights are shared and the model is as before afterwards.
    """
    act, mlps, layers = models.activation(model), models.gated_mlps(model), models.decoder_layers(model)
    none = [None] * len(mlps)
    lists = (mlps, masks, [act] * len(mlps), taylor or none, fisher or none, means or none)
    wrapped = [MaskedMLP(*parts) for parts in zip(*lists, strict=True)]
    for layer, mlp in zip(layers, wrapped, strict=True):
        layer.mlp = mlp
    try:
        yield wrapped
    finally:
        for layer, mlp in zip(layers, mlps, strict=True):
            layer.mlp = mlp


def sliced(linear: nn.Linear, kept: Tensor, dim: int) -> nn.Linear:
    """A linear with the rows (dim 0) or columns (dim 1) of these numbers alone."""
    weight = linear.weight.index_select(dim, kept)
    new = nn.Linear(weight.shape[1], weight.shape[0], linear.bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        bias = linear.bias.detach().clone() if dim else linear.bias.index_select(0, kept)
        new.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    return new


@torch.no_grad()
def mean_bias(linear: nn.Linear, dropped: Tensor, means: Tensor) -> nn.Parameter:
    """The linear's bias [out] and what its dropped inputs (bool [in]) give at their means, float32 [in]."""
    bias = linear.weight[:, dropped].float() @ means[dropped]
    bias = bias if linear.bias is None else bias + linear.bias.float()
    return nn.Parameter(bias.to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)


def slim_(model: nn.Module, masks: Sequence[Tensor], means: Sequence[Tensor] | None = None) -> nn.Module:
    """Cuts the channels outside the masks (bool [C] a layer) out of the model, in place.

    With `means`, float32 [C] a layer, a bias of W_down stands in for what was cut out: W_down[:, cut] means[cut].
    Equal widths also go into the config (`intermediate_size`), so that the saved checkpoint is a plain one.
    Raises InputError when a mask has the wrong length or keeps nothing.
    """
    mlps = models.gated_mlps(model)
    if not all(type(part) is nn.Linear for mlp in mlps for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        raise InputError("channels can be cut out of dense layers only; cut first, then pack")
    if [len(mask) for mask in masks] != models.widths(model):
        raise InputError(
            f"the masks fit widths {sorted({len(m) for m in masks})}, the model has {sorted(set(models.widths(model)))}"
        )
    if not all(bool(mask.any()) for mask in masks):
        raise InputError("a mask keeps no channel in some layer")
    for layer, (mlp, mask) in enumerate(zip(mlps, masks, strict=True)):
        mask = mask.to(mlp.gate_proj.weight.device)
        kept = mask.nonzero()[:, 0]
        mlp.gate_proj, mlp.up_proj = sliced(mlp.gate_proj, kept, 0), sliced(mlp.up_proj, kept, 0)
        down = sliced(mlp.down_proj, kept, 1)
        if means:
            down.bias = mean_bias(mlp.down_proj, ~mask, means[layer])
        mlp.down_proj = down
        if hasattr(mlp, "intermediate_size"):
            mlp.intermediate_size = len(kept)
    width = set(models.widths(model))
    if len(width) == 1:
        model.config.get_text_config().intermediate_size = width.pop()
    return model


def slim_copy(model: nn.Module, masks: Sequence[Tensor], means: Sequence[Tensor] | None = None) -> nn.Module:
    """`slim_` of a copy; the model stays as it is."""
    return slim_(copy.deepcopy(model), masks, means)


def ffn_bytes(model: nn.Module) -> int:
    """Bytes of all FFN weights, packed ones as they are stored."""
    tensors = (t for mlp in models.gated_mlps(model) for t in [*mlp.parameters(), *mlp.buffers()])
    return sum(t.numel() * t.element_size() for t in tensors)
