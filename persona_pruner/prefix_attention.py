"""Attention for many sequences that share a start: the shared part is held, read and multiplied once.

All questions to one character begin with its prompt. A batch is therefore a prefix of P tokens and S rows of their own
tokens; a row sees the prefix and itself. The scores against the prefix are one product for all rows, and its keys and
values are neither copied to the rows nor repeated for grouped heads. For 48 rows, one new token each, and a prefix of
300 tokens (SmolLM2's heads, bfloat16) that took 1.3 ms against 29 ms with copies; forward and backward of a pack of
48 x 25 tokens 25 ms against 82 (2 cores of an AMD EPYC with AVX-512, 2026-11-23).
"""

from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from persona_pruner.errors import InputError

NAME = "persona_pruner_prefix"

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(query: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], biases, scale: float) -> Tensor:
    """[S, H, L, d] for queries [S, H, L, d], keys and values of the prefix [Hkv, P, d] and of the rows [S, Hkv, K, d].

    biases: float32 added to the scores, broadcast over heads: None or [S, L, P] for the prefix, [S, L, K] for the rows.
    Products are in the dtype of the inputs, the softmax is in float32.
    """
    (prefix_key, prefix_value), (key, value) = prefix, own
    rows, heads, length, size = query.shape
    kv_heads, start, width = prefix_key.shape[0], prefix_key.shape[1], key.shape[2]
    grouped = (query * scale).reshape(rows, kv_heads, -1, size)

    def by_head(x: Tensor) -> Tensor:  # [S, Hkv, n, ...] -> [Hkv, S * n, ...]
        return x.transpose(0, 1).flatten(1, 2)

    def by_row(x: Tensor) -> Tensor:
        return x.unflatten(1, (rows, -1)).transpose(0, 1)

    shared = by_row(by_head(grouped) @ prefix_key.mT).float().unflatten(2, (-1, length))
    single = (grouped @ key.mT).float().unflatten(2, (-1, length)) + biases[1][:, None, None]
    if biases[0] is not None:
        shared = shared + biases[0][:, None, None]
    weights = torch.softmax(torch.cat([shared, single], -1), -1).flatten(2, 3).to(query.dtype)
    to_prefix, to_own = weights.split([start, width], -1)
    out = by_row(by_head(to_prefix) @ prefix_value) + to_own @ value
    return out.reshape(rows, heads, length, size)


class Biases:
    """Who sees whom, by position: queries [S, L], keys of the rows [S, K], prefix tokens at 0 .. P - 1.

    A key before P is padding and seen by nobody; what a padded query gets is never used.
    """

    def __init__(self, queries: Tensor, keys: Tensor, prefix: int):
        self.queries, self.keys, self.prefix = queries, keys, prefix
        self._made: dict[int | None, tuple[Tensor | None, Tensor]] = {}

    def __call__(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """The biases of `attend` for layers with a sliding window of so many tokens, or none."""
        if window not in self._made:
            distance = self.queries[:, :, None] - self.keys[:, None, :]
            own = (distance >= 0) & (self.keys >= self.prefix)[:, None, :]
            shared = None
            if window is not None:
                own &= distance < window
                start = torch.arange(self.prefix, device=self.keys.device)
                shared = _bias(self.queries[:, :, None] - start < window)
            self._made[window] = shared, _bias(own)
        return self._made[window]


def _bias(allowed: Tensor) -> Tensor:
    # finite, so that a padded query with nothing to see gives numbers and not NaN
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, -1e30)


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """[1, Hkv, G * N, ...] from [H, N, ...], so that all queries of a key's group are one head's."""
    return x.unflatten(0, (kv_heads, -1)).flatten(1, 2)[None]


class _FlashPack(torch.autograd.Function):
    """Attention of a pack on a CPU by PyTorch's flash kernel: [T, H, d] for query [H, T, d], key and value [Hkv, T, d].

    Three calls: the prefix to itself, the rows' tokens to the prefix, the rows to themselves. The last two see parts of
    one softmax and are merged by their log-sum-exp; given what is merged, the kernel's backward pass is exact for each
    part (Dao, FlashAttention-2, arXiv 2307.08691, section 3.1). No scores are kept, which would be most of a layer's
    activations. 16-bit inputs are computed in float32: without AMX the kernel's bfloat16 took 1.5 (forward) and 2.7
    times (backward) as long.
    """

    @staticmethod
    def forward(ctx, query, key, value, layout, scale):
        start, kv_heads, heads, dtype = layout.prefix, key.shape[0], query.shape[0], query.dtype
        given = query, key, value
        query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in given)
        wide = [x.repeat_interleave(heads // kv_heads, 0) for x in (key, value)]
        own, lse = _flash(*map(layout.by_row, (query, *wide)), is_causal=True, scale=scale)
        out, lse = (layout.tokens(x) for x in (own, lse))  # [N, H, d], [N, H]
        if start:
            grouped = _by_group(query[:, start:], kv_heads)
            seen, seen_lse = _flash(grouped, key[None, :, :start], value[None, :, :start], scale=scale)
            seen, seen_lse = (x.reshape(heads, len(out), *x.shape[3:]).transpose(0, 1) for x in (seen, seen_lse))
            merged = torch.logaddexp(lse, seen_lse)
            out = out * (lse - merged).exp()[..., None] + seen * (seen_lse - merged).exp()[..., None]
            first, first_lse = _flash(*(x[None, :, :start] for x in (query, *wide)), is_causal=True, scale=scale)
            out = torch.cat([first[0].transpose(0, 1), out])
            lse = torch.cat([first_lse[0].T, merged])
        out = out.to(dtype)
        ctx.save_for_backward(*given, out, lse)
        ctx.rest = layout, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        (layout, scale), dtype = ctx.rest, d_out.dtype
        saved = (x.to(torch.promote_types(dtype, torch.float32)) for x in (*ctx.saved_tensors, d_out))
        query, key, value, *rest = saved
        out, lse, d_out = (x.transpose(0, 1) for x in rest)  # [H, T, ...]
        start, kv_heads, heads = layout.prefix, key.shape[0], query.shape[0]
        wide = [x.repeat_interleave(heads // kv_heads, 0) for x in (key, value)]

        def back(parts, causal):
            slope, *inputs, out, lse = parts
            return _flash_backward(slope, *inputs, out, lse, 0.0, causal, scale=scale)

        def narrow(x: Tensor) -> Tensor:  # [H, n, d] -> [Hkv, n, d]
            return x.unflatten(0, (kv_heads, -1)).sum(1)

        slope = layout.by_row(d_out).masked_fill(~layout.valid[:, None, :, None], 0)  # no slope from the padding
        own = back((slope, *map(layout.by_row, (query, *wide, out, lse))), True)
        d_query, d_key, d_value = (layout.tokens(x).transpose(0, 1) for x in own)
        d_key, d_value = narrow(d_key), narrow(d_value)
        if start:
            d_rows, *sides = (_by_group(x[:, start:], kv_heads) for x in (d_out, query, out, lse))
            grouped, seen, seen_lse = sides
            parts = (d_rows, grouped, key[None, :, :start], value[None, :, :start], seen, seen_lse)
            shared = back(parts, False)
            first = back([x[None, :, :start] for x in (d_out, query, *wide, out, lse)], True)
            d_query = torch.cat([first[0][0], d_query + shared[0].reshape(d_query.shape)], 1)
            d_key, d_value = (
                torch.cat([narrow(mine[0]) + theirs[0], rows], 1)
                for mine, theirs, rows in zip(first[1:], shared[1:], (d_key, d_value), strict=True)
            )
        return *(x.to(dtype) for x in (d_query, d_key, d_value)), None, None


class PackLayout:
    """A pack [prefix | row 1 | row 2 | ...] as one sequence: segment (0 is the prefix) and position, int64 [T]."""

    def __init__(self, segment: Tensor, position: Tensor):
        self.prefix = int((segment == 0).sum())
        lengths = torch.bincount(segment)[1:].tolist()
        rows = torch.arange(self.prefix, len(segment), device=segment.device).split(lengths)
        self.index = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=0)
        places = nn.utils.rnn.pad_sequence([position[row] for row in rows], batch_first=True, padding_value=-1)
        self.valid = places >= 0
        self.biases = Biases(places, places, self.prefix)

    def by_row(self, x: Tensor) -> Tensor:
        """[S, H, L, ...] from [H, T, ...]; what stands in the padding is not to be used."""
        return x.index_select(1, self.index.flatten()).unflatten(1, self.index.shape).transpose(0, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """[N, H, ...] of the rows' tokens from [S, H, L, ...]."""
        return x.transpose(1, 2)[self.valid]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """[1, T, H, d] for query [1, H, T, d], key and value [1, Hkv, T, d]."""
        if window is None and query.device.type == "cpu":
            return _FlashPack.apply(query[0], key[0], value[0], self, scale)[None]
        start = [x[:, :, : self.prefix] for x in (query, key, value)]
        own = [self.by_row(x[0]) for x in (query, key, value)]
        rows = attend(own[0], (start[1][0], start[2][0]), tuple(own[1:]), self.biases(window), scale)
        out = self.tokens(rows)
        if self.prefix:
            inner = None
            if window is not None and self.prefix > window:
                place = torch.arange(self.prefix, device=query.device)
                gap = place[:, None] - place
                inner = (gap >= 0) & (gap < window)
            groups = query.shape[1] // key.shape[1]
            start[1:] = (x.repeat_interleave(groups, 1) for x in start[1:])
            first = scaled_dot_product_attention(*start, attn_mask=inner, is_causal=inner is None, scale=scale)
            out = torch.cat([first[0].transpose(0, 1), out])
        return out[None]


class BatchLayout:
    """Rows of a batch, padded at their starts, whose own keys and values are what the cache holds.

    shared: keys and values of the prefix [Hkv, P, d], by layer, or nothing; queries: int64 [S, L], positions of the
    new tokens; keys: int64 [S, K], positions of all tokens in the cache, the new ones included.
    """

    def __init__(self, shared: list[tuple[Tensor, Tensor]], queries: Tensor, keys: Tensor):
        self.shared = shared
        self.biases = Biases(queries, keys, shared[0][0].shape[1] if shared else 0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """[S, L, H, d] for query [S, H, L, d], key and value [S, Hkv, K, d]."""
        shared = self.shared[layer] if self.shared else (key[0, :, :0], value[0, :, :0])
        return attend(query, shared, (key, value), self.biases(window), scale).transpose(1, 2)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, layout, scaling: float,
    sliding_window: int | None = None, softcap: float | None = None, **_,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface; `layout` is a PackLayout or a BatchLayout."""
    if softcap is not None:
        raise InputError(f"{type(module).__name__} caps its attention scores, which is not supported")
    return layout.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


@cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)


@contextmanager
def prefix_attention(decoder: nn.Module):
    """Within the context the decoder's attention is laid out by the forward argument `layout`.

    The decoder wants an attention mask all the same: `unused_mask`.
    """
    _register()
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = NAME
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


def unused_mask(decoder: nn.Module) -> Tensor | dict[str, Tensor]:
    """A mask of four dimensions, which transformers hands through as it is; by layer type where types differ."""
    nothing = torch.empty(1, 1, 0, 0)
    kinds = set(getattr(decoder.config, "layer_types", None) or ())
    return {kind: nothing for kind in kinds} if kinds else nothing
