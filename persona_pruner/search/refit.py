"""Block-by-block repair: W_o and W_down of a pruned model refitted so that its stream comes back to the dense one's.

`repair` fits each FFN as if the layers before it were dense. Here every block is fed what the pruned blocks before it
give, so that it can also take back a part of their error. With x the pruned stream before attention or FFN, g what the
dense weights make of it, and s the dense stream behind it, the target of the linear that writes into the stream is

    y = g + share * (s - (x + g)),    W' = (Y^T A + r W) (A^T A + r I)^-1

with A what enters that linear, and r = ridge * mean(diag A^T A), which pulls towards the weights as they are. share 0
mends this block only, share 1 everything that went wrong so far. The idea of feeding the pruned stream and aiming at
the dense one is that of GPTAQ (Li et al., 2025, asymmetric calibration), here for whole channels and in closed form.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.packing import Pack
from persona_pruner.prefix_attention import prefix_attention
from persona_pruner.search.layerwise import block_inputs, run_block
from persona_pruner.search.repair import prompt_weights, ridge_solve

SHARE = 0.5  # blacksmith, 25%, 190 answers: held-out KL 0.221; one-shot repair 0.255; 1 gave 0.231 in a prototype


class _Tap:
    """What enters a module and what it gives, of its last call."""

    def __init__(self, module: nn.Module):
        self.entered = self.gave = torch.empty(0)
        self.hook = module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        self.entered, self.gave = args[0], out


class _Fit:
    """Least squares of one linear, gathered pack by pack in float32."""

    def __init__(self, linear: nn.Linear):
        self.linear = linear
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0

    def add(self, entered: Tensor, target: Tensor, weight: Tensor) -> None:
        """entered [1, T, in], target [1, T, out] (with the linear's bias in it), weight float32 [T, 1]."""
        bias = self.linear.bias
        rows, aim = entered[0].float(), (target if bias is None else target - bias)[0].float()
        weighted = rows * weight
        self.gram = self.gram + weighted.T @ rows
        self.cross = self.cross + aim.T @ weighted

    def solve_(self, ridge: float) -> None:
        wide = self.linear.weight.float()
        r = ridge * self.gram.diagonal().mean().clamp_min(1e-12)
        self.linear.weight.copy_(ridge_solve(self.cross, self.gram, wide, r))


@torch.no_grad()
def refit_(
    slim: nn.Module,
    dense: nn.Module,
    packs: Sequence[Pack],
    ridge: float = 0.1,
    share: float = SHARE,
    step: Callable[[int], None] = lambda done: None,
) -> nn.Module:
    """Refits W_o and W_down of `slim`, in place: `dense` without some of its FFN channels, weights untouched.

    Two passes of the slim model and one of the dense one, block by block; states of all tokens of `packs` are held
    (five times [tokens, hidden]). `step` is told of every block. Raises InputError for models that norm or scale what a
    block writes into the stream (Gemma 2 and 3, Granite): the targets would be wrong.
    """
    blocks, own_blocks = models.decoder_layers(dense), models.decoder_layers(slim)
    device = dense.get_input_embeddings().weight.device
    packs = [batch.to(device) for batch in packs]
    weights = [prompt_weights(batch) for batch in packs]
    states, rest = block_inputs(dense, packs)
    own = list(states)
    with prefix_attention(dense.get_decoder()), prefix_attention(slim.get_decoder()):
        if packs and not _adds(blocks[0], states[0], rest[0][0]):
            raise InputError("block-by-block repair needs blocks that add to the stream what W_o and W_down give")
        for number, (block, slim_block) in enumerate(zip(blocks, own_blocks, strict=True)):
            states, own = _refit_block_(block, slim_block, states, own, rest[number], weights, ridge, share)
            step(1)
    return slim


def _adds(block: nn.Module, x: Tensor, kwargs: dict) -> bool:
    """Whether the block gives x plus what o_proj and the MLP give, to the rounding of x's dtype."""
    if not hasattr(block.self_attn, "o_proj"):
        return False
    taps = _Tap(block.self_attn.o_proj), _Tap(block.mlp)
    out = run_block(block, x, kwargs)
    for tap in taps:
        tap.hook.remove()
    off = (x + taps[0].gave + taps[1].gave - out).float().abs().max()
    return bool(off <= 8 * torch.finfo(x.dtype).eps * out.float().abs().max())


def _refit_block_(
    block: nn.Module,
    slim_block: nn.Module,
    states: Sequence[Tensor],
    own: Sequence[Tensor],
    rest: Sequence[dict],
    weights: Sequence[Tensor],
    ridge: float,
    share: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Refits one block; gives the dense stream and the pruned one behind it, a list of [1, T, hidden] each."""
    taps = [_Tap(m) for m in (block.mlp, slim_block.mlp, slim_block.self_attn.o_proj, slim_block.mlp.down_proj)]
    ffn, slim_ffn, attention, down = taps
    try:
        middle, behind = [], []
        fit = _Fit(slim_block.self_attn.o_proj)
        for x, mine, kwargs, weight in zip(states, own, rest, weights, strict=True):
            behind.append(run_block(block, x, kwargs))
            aim = behind[-1] - ffn.gave
            now = run_block(slim_block, mine, kwargs) - slim_ffn.gave
            fit.add(attention.entered, attention.gave + share * (aim - now), weight)
        fit.solve_(ridge)
        normed = []
        fit = _Fit(slim_block.mlp.down_proj)
        for aim, mine, kwargs, weight in zip(behind, own, rest, weights, strict=True):
            middle.append(run_block(slim_block, mine, kwargs) - slim_ffn.gave)
            normed.append(slim_ffn.entered)
            entered = down.entered
            whole = block.mlp(normed[-1])
            fit.add(entered, whole + share * (aim - middle[-1] - whole), weight)
        fit.solve_(ridge)
    finally:
        for tap in taps:
            tap.hook.remove()
    return behind, [x + slim_block.mlp(n) for x, n in zip(middle, normed, strict=True)]
