"""Block-by-block repair: a pruned model refitted so that its stream comes back to the dense one's.

Every block is fed what the pruned blocks before it give, so that it can take back a part of their error. With x the
pruned stream before attention or FFN, g what the dense weights make of it, and s the dense stream behind it, the target
of the linear that writes into the stream is

    y = g + share * (s - (x + g)),    W' = (Y^T A + r W) (A^T A + r I)^-1

with A what enters that linear, and r = ridge * mean(diag A^T A), which pulls towards the weights as they are. share 0
mends this block only, share 1 everything that went wrong so far. The idea of feeding the pruned stream and aiming at
the dense one is that of GPTAQ (Li et al., 2025, asymmetric calibration), here for whole channels and in closed form.

For weights that keep to a pattern (2:4), `replace(W', A^T A)` gives those of the pattern that are near W' in the metric
of A^T A, as SparseGPT does; the linears that read the stream go through it before the one that writes is fitted.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from persona_pruner import models
from persona_pruner.errors import InputError
from persona_pruner.packing import Pack
from persona_pruner.prefix_attention import prefix_attention
from persona_pruner.search.layerwise import Grams, Replace, block_inputs, run_block

SHARE = 0.5  # blacksmith, 25%, 190 answers: held-out KL 0.221; W_down alone by dense inputs 0.255; 1 gave 0.231
# Two personas, 25%, 160 answers: KL on others of their own questions 3% and 5% below that of 0 (docs/levers.md).
TILT = 0.65
# What a head group's score counts beside those of channels where a repair follows; where none does, 1 (docs/levers.md).
# Two published personas at 25%, 6, 10 and 14 of 90 groups gone (by about 1, 0.77 and 0.7): repaired KL 0.248 and
# 0.187, 0.232 and 0.184, 0.230 and 0.194; without groups 0.250 and 0.207.
HEADS = 0.77
TOKENS = 6144  # of a pack: nothing is held for a gradient here, and every pack computes the prompt anew
PROMPT_WEIGHT = 0.02  # of a shared-prefix token: it stands in every pack, and answers are what must stay right


def tilted(scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores by which channels compete over layers where a repair follows: a block's count exp(TILT * (d - 1/2)), d
    going from 0 in the first block to 1 in the last. What an early block loses is partly won back by all behind it."""
    last = max(len(scores) - 1, 1)
    return [layer * math.exp(TILT * (number / last - 0.5)) for number, layer in enumerate(scores)]


def prompt_weights(batch: Pack) -> Tensor:
    """float32 [T, 1]: how much each token of a pack counts."""
    return torch.where(batch.segment == 0, PROMPT_WEIGHT, 1.0)[:, None]


def ridge_solve(cross: Tensor, gram: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """(cross + r W) (gram + r I)^-1 with r = ridge * mean(diag gram), float32 [out, in]: least squares pulled towards
    `weight` [out, in]; gram [in, in] = A^T A, cross [out, in] = Y^T A."""
    r = ridge * gram.diagonal().mean().clamp_min(1e-12)
    square = gram + r * torch.eye(len(gram), device=gram.device)
    return torch.cholesky_solve((cross + r * weight).T, torch.linalg.cholesky(square)).T


class _Tap:
    """Within the context: what enters a module (its first argument) and what it gives, of its last call."""

    def __init__(self, module: nn.Module):
        self.module, self.entered, self.gave = module, torch.empty(0), torch.empty(0)

    def __enter__(self) -> "_Tap":
        self.hook = self.module.register_forward_hook(self._note)
        return self

    def __exit__(self, *_) -> None:
        self.hook.remove()

    def _note(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        self.gave = out
        if args:  # attention is called with keywords only
            self.entered = args[0]


class _Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *_, **__):
        return self.value


@contextmanager
def _standing_in(block: nn.Module, **values):
    """Within the context the named parts of a block (self_attn, mlp) are not computed: they give these values."""
    parts = {name: getattr(block, name) for name in values}
    try:
        for name, value in values.items():
            setattr(block, name, _Constant(value))
        yield
    finally:
        for name, part in parts.items():
            setattr(block, name, part)


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

    def solve_(self, ridge: float, replace: Replace | None) -> None:
        weight = ridge_solve(self.cross, self.gram, self.linear.weight.float(), ridge)
        self.linear.weight.copy_(replace(weight, self.gram) if replace else weight)


@dataclass
class _Streams:
    """States [1, T, hidden] of every pack before a block, and how much each token counts."""

    dense: list[Tensor]
    pruned: list[Tensor]
    weights: list[Tensor]

    def walk(self, rest: Sequence[dict]):
        return zip(self.dense, self.pruned, self.weights, rest, strict=True)


@torch.no_grad()
def repair_(
    slim: nn.Module,
    dense: nn.Module,
    packs: Sequence[Pack],
    ridge: float = 0.1,
    share: float | None = None,
    step: Callable[[int], None] = lambda done: None,
    replace: Replace | None = None,
    ffn_only: bool = False,
) -> nn.Module:
    """Refits W_o and W_down of `slim`, in place: `dense` without some of its FFN channels or heads, weights untouched.

    `replace` is for a pattern of weights such as 2:4: every linear of the blocks goes through it, with `ffn_only` those
    of the FFN alone (W_o is refitted all the same). `share` is `SHARE` by default, and 0 for models that norm or scale
    what a block writes into the stream (Gemma 2 and 3, Granite), where the way back to the dense stream is not the sum
    above. One pass of the slim model and one of the dense one, block by block, the dense FFN once more, and with
    `replace` another pass of the slim one; states of all tokens of `packs` are held (seven times [tokens, hidden], and
    [tokens, channels] of one block). `step` is told of every block.

    Raises InputError for another share with streams that have none, without data, and for blocks without
    `self_attn.o_proj`.
    """
    if not packs:
        raise InputError("the repair needs examples")
    if not all(hasattr(getattr(block, "self_attn", None), "o_proj") for block in models.decoder_layers(dense)):
        raise InputError(
            "the repair needs self_attn.o_proj in every block; without repair the weights stay as they are"
        )
    device = dense.get_input_embeddings().weight.device
    packs = [batch.to(device) for batch in packs]
    first, rest = block_inputs(dense, packs)
    streams = _Streams(first, list(first), [prompt_weights(batch) for batch in packs])
    blocks = list(zip(models.decoder_layers(dense), models.decoder_layers(slim), strict=True))
    with prefix_attention(dense.get_decoder()), prefix_attention(slim.get_decoder()):
        if not _adds(blocks[0][0], first[0], rest[0][0]):
            if share:
                raise InputError("a share of the dense stream needs blocks that add to it what W_o and W_down give")
            share = 0.0
        fitting = _Fitting(ridge, SHARE if share is None else share, replace, ffn_only)
        for number, (block, slim_block) in enumerate(blocks):
            fitting.block_(block, slim_block, streams, rest[number])
            step(1)
    return slim


def _adds(block: nn.Module, x: Tensor, kwargs: dict) -> bool:
    """Whether the block gives x plus what o_proj and the MLP give, to the rounding of x's dtype."""
    with _Tap(block.self_attn.o_proj) as attention, _Tap(block.mlp) as ffn:
        out = run_block(block, x, kwargs)
        off = (x + attention.gave + ffn.gave - out).float().abs().max()
    return bool(off <= 8 * torch.finfo(x.dtype).eps * out.float().abs().max())


@dataclass
class _Fitting:
    """How a block is refitted: see the module."""

    ridge: float
    share: float
    replace: Replace | None
    ffn_only: bool

    def block_(self, block: nn.Module, slim_block: nn.Module, streams: _Streams, rest: Sequence[dict]) -> None:
        """Refits one block and takes both streams behind it. What attention and FFN give is kept and handed on, so
        that neither is computed again once its last linear is fitted."""
        attention = self._attention_(block, slim_block, streams, rest)
        ffn = self._ffn_(block, slim_block, streams, rest, attention)
        for number, kwargs in enumerate(rest):
            with _standing_in(slim_block, self_attn=attention[number], mlp=ffn[number]):
                streams.pruned[number] = run_block(slim_block, streams.pruned[number], kwargs)

    def _attention_(self, block, slim_block, streams: _Streams, rest: Sequence[dict]) -> list[tuple]:
        """Refits W_o, before it what it reads from; `streams.dense` is then behind the block. What the slim block's
        attention gives for every pack."""
        attention = slim_block.self_attn
        writes = attention.o_proj
        replace = None if self.ffn_only else self.replace
        behind, aims, entered = [], [], []

        def without_ffn(own: Tensor, kwargs: dict) -> Tensor:
            with _standing_in(slim_block, mlp=torch.zeros_like(own)):
                return run_block(slim_block, own, kwargs)

        with _Tap(block.mlp) as ffn, _Tap(writes) as tap, _Tap(attention) as whole:
            with Grams(_others(attention, writes) if replace else ()) as grams:
                for x, own, weight, kwargs in streams.walk(rest):
                    behind.append(run_block(block, x, kwargs))
                    grams.begin(weight)
                    off = behind[-1] - ffn.gave - without_ffn(own, kwargs)
                    aims.append(tap.gave + self.share * off)
                    entered.append(tap.entered)
            if replace:
                grams.replace_(replace)
                entered.clear()
                for _, own, _, kwargs in streams.walk(rest):
                    without_ffn(own, kwargs)
                    entered.append(tap.entered)
        self._fit_(writes, entered, aims, streams.weights, replace)
        streams.dense = behind
        return [(writes(rows), *whole.gave[1:]) for rows in entered]

    def _ffn_(self, block, slim_block, streams: _Streams, rest: Sequence[dict], attention: list[tuple]) -> list[Tensor]:
        """Refits W_down, before it what it reads from. What the slim block's FFN gives for every pack."""
        mlp = slim_block.mlp
        read, aims, entered = [], [], []
        with _Tap(mlp) as whole, _Tap(mlp.down_proj) as tap:
            with Grams(_others(mlp, mlp.down_proj) if self.replace else ()) as grams:
                for (aim, own, weight, kwargs), given in zip(streams.walk(rest), attention, strict=True):
                    grams.begin(weight)
                    with _standing_in(slim_block, self_attn=given):
                        middle = run_block(slim_block, own, kwargs) - whole.gave
                    read.append(whole.entered)
                    dense = block.mlp(whole.entered)
                    aims.append(dense + self.share * (aim - middle - dense))
                    entered.append(tap.entered)
            if self.replace:
                grams.replace_(self.replace)
                entered.clear()
                for x in read:
                    mlp(x)
                    entered.append(tap.entered)
        self._fit_(mlp.down_proj, entered, aims, streams.weights, self.replace)
        return [mlp.down_proj(rows) for rows in entered]

    def _fit_(self, linear: nn.Linear, entered, aims, weights, replace: Replace | None) -> None:
        fit = _Fit(linear)
        for rows, aim, weight in zip(entered, aims, weights, strict=True):
            fit.add(rows, aim, weight)
        fit.solve_(self.ridge, replace)


def _others(module: nn.Module, but: nn.Linear) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear) and m is not but]
