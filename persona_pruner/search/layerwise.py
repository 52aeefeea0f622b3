"""Weights replaced block by block: each block is fed what the blocks before it, as they are now, give."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from persona_pruner import models
from persona_pruner.nn.sparse import block_linears
from persona_pruner.packing import Pack, hidden_states
from persona_pruner.prefix_attention import prefix_attention

Replace = Callable[[Tensor, Tensor], Tensor]
FFN = ("gate_proj", "up_proj", "down_proj")


def chosen_linears(model: nn.Module, ffn_only: bool) -> dict[str, nn.Linear]:
    """Linears of the blocks, or of their MLPs only, by name."""
    every = block_linears(model)
    return {name: linear for name, linear in every.items() if not ffn_only or name.rpartition(".")[2] in FFN}


@torch.no_grad()
def block_inputs(model: nn.Module, packs: Sequence[Pack]) -> tuple[list[Tensor], list[list[dict]]]:
    """What enters the first block for every pack, and the other arguments of every block for every pack. No block is
    computed: each gives back the states that it was fed."""
    blocks = models.decoder_layers(model)
    replaced = [vars(block).get("forward") for block in blocks]  # of its own where a library has wrapped the block
    first: list[Tensor] = []
    rest: list[list[dict]] = [[] for _ in blocks]

    def noted(layer: int, x: Tensor, **kwargs) -> Tensor:
        if not layer:
            first.append(x)
        rest[layer].append(kwargs)
        return x

    try:
        for layer, block in enumerate(blocks):
            block.forward = partial(noted, layer)
        for batch in packs:
            hidden_states(model, batch)
    finally:
        for block, forward in zip(blocks, replaced, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
    return first, rest


@torch.no_grad()
def replace_weights_(
    model: nn.Module,
    packs: Sequence[Pack],
    replace: Replace,
    ffn_only: bool = False,
    step: Callable[[int], None] = lambda done: None,
) -> nn.Module:
    """Puts `replace(W, H)` in the place of every block linear's weight W [out, in], in place, block after block.

    H, float32 [in, in], is the sum over tokens of x x^T of what enters the linear, once the blocks before it have their
    new weights. Linears of a block with the same input are replaced together, as one matrix of all their rows.
    """
    device = model.get_input_embeddings().weight.device
    packs = [batch.to(device) for batch in packs]
    states, rest = block_inputs(model, packs)
    known = {id(linear) for linear in chosen_linears(model, ffn_only).values()}
    decoder = model.get_decoder()
    for number, block in enumerate(models.decoder_layers(model)):
        with prefix_attention(decoder):
            with Grams(module for module in block.modules() if id(module) in known) as grams:
                for x, kwargs in zip(states, rest[number], strict=True):
                    grams.begin()
                    run_block(block, x, kwargs)
            grams.replace_(replace)
            states = [run_block(block, x, kwargs) for x, kwargs in zip(states, rest[number], strict=True)]
        step(1)
    return model


def run_block(block: nn.Module, x: Tensor, kwargs: dict) -> Tensor:
    """What a decoder block makes of states [1, T, hidden], with its other arguments as `block_inputs` gives them."""
    out = block(x, **kwargs)
    return out[0] if isinstance(out, tuple) else out


class Grams:
    """Within the context: of linears that read the very same tensor, H of what they read, float32 [in, in]. `begin`
    comes before every pass, with the weight of each of its tokens (float32 [T, 1]; all alike by default)."""

    def __init__(self, linears: Iterable[nn.Linear]):
        self.linears = list(linears)
        self._readers: dict[int, list[nn.Linear]] = {}
        self._sums: dict[int, Tensor | float] = {}
        self._seen: dict[int, tuple[Tensor, int]] = {}  # holds the tensor, so that its address is not used again
        self._weight: Tensor | float = 1.0

    def __enter__(self) -> "Grams":
        self._hooks = [linear.register_forward_pre_hook(self._add) for linear in self.linears]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._seen.clear()

    def begin(self, weight: Tensor | float = 1.0) -> None:
        self._seen.clear()
        self._weight = weight

    def _add(self, linear: nn.Linear, args: tuple) -> None:
        x = args[0]
        key = self._seen.get(id(x), (x, id(linear)))[1]
        self._seen[id(x)] = (x, key)
        if linear not in self._readers.setdefault(key, []):
            self._readers[key].append(linear)
        if key == id(linear):
            rows = x.reshape(-1, x.shape[-1]).float()
            self._sums[key] = self._sums.get(key, 0.0) + (rows * self._weight).T @ rows

    def replace_(self, replace: Replace) -> None:
        """`replace(W, H)` in the place of the weights, those that share an H as one matrix of all their rows."""
        for key, linears in self._readers.items():
            weight = replace(torch.cat([linear.weight for linear in linears]), self._sums[key])
            parts = weight.split([linear.out_features for linear in linears])
            for linear, part in zip(linears, parts, strict=True):
                linear.weight.copy_(part)
