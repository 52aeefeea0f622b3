"""paged_attention_: causal attention of new tokens over a key/value cache in blocks, which it writes first.

A row is a conversation; its tokens 0, 1, 2, ... lie in the blocks that its line of `tables` names, B tokens a block.
Each new token t stands at positions[t] of row rows[t]. First all their keys and values go into the cache, then

    out[t, h] = sum over s <= positions[t] of softmax_s(scale * q[t, h] . key[s, h / g]) * value[s, h / g]

with q and key after RMSNorm of each head (where q_norm and k_norm are given) and the rotary embedding, which turns
(a, b), the i-th entries of the two halves of a head, into (a cos - b sin, b cos + a sin) with cos[position, i]. A
window of w tokens leaves s > positions[t] - w. g = H / Hkv heads share a key. Blocks may be shared by rows. Scores,
softmax and sums are float32. Keys lie as [d, B] within a block, so that the scores of B tokens are B lanes of a vector.
"""

import torch
from torch import Tensor

from persona_pruner.errors import InputError
from persona_pruner.ops._dispatch import Backend, Op
from persona_pruner.ops.norm_linear import address, bits, cpu_kernel, cpu_unavailable, rms_norm
from persona_pruner.ops.plan import Call

BLOCK = 16  # tokens a block
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def paged_attention_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    rows: Tensor,
    tables: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """out float32 [T, H * d] for qkv float32 [T, (H + 2 Hkv) * d], d even; writes the new keys and values.

    cos, sin: float32 [P, d/2]; positions, rows: int32 [T]; tables: int32 [R, W]; keys [N, Hkv, d, 16] and values
    [N, Hkv, 16, d] in one of float32, bfloat16, float16; q_norm, k_norm: float32 [d]. `backend`: 'cpu', 'reference', or
    None for the best one. Raises InputError when shapes or dtypes do not fit; positions and blocks are not checked.
    """
    kv_heads, size = keys.shape[1:3]
    if keys.shape[3:] != (BLOCK,) or values.shape != (len(keys), kv_heads, BLOCK, size) or values.dtype != keys.dtype:
        raise InputError(f"paged_attention_: keys must be [N, Hkv, d, {BLOCK}] and values [N, Hkv, {BLOCK}, d], alike")
    if size % 2:
        raise InputError(f"paged_attention_: the size of a head must be even, got {size}")
    heads = qkv.shape[-1] // size - 2 * kv_heads
    if qkv.dim() != 2 or qkv.shape[1] != (heads + 2 * kv_heads) * size or heads < 1 or heads % kv_heads:
        raise InputError(f"paged_attention_: qkv {list(qkv.shape)} does not fit {kv_heads} key heads of {size}")
    whole = all(t.dtype == torch.int32 for t in (positions, rows, tables))
    if qkv.dtype not in (torch.float32, torch.float64) or not whole:
        raise InputError("paged_attention_: qkv must be float32, and positions, rows and tables int32")
    if positions.shape != qkv.shape[:1] or rows.shape != qkv.shape[:1] or tables.dim() != 2:
        raise InputError("paged_attention_: positions and rows must be [T] and tables [R, W]")
    if cos.shape[1:] != (size // 2,) or sin.shape != cos.shape:
        raise InputError("paged_attention_: cos and sin must be [P, d/2]")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and (norm.shape != (size,) or norm.dtype != qkv.dtype):
            raise InputError(f"paged_attention_: {name} must be {qkv.dtype} [{size}]")
    args = qkv, cos, sin, positions, rows, tables, keys, values, scale, window, q_norm, k_norm, eps
    if torch.compiler.is_compiling():
        return _op(*args, backend)
    return OP.pick(qkv.device, backend, *args).run(*args)


# What torch.compile sees; eager calls go past it, see norm_linear.
@torch.library.custom_op("persona_pruner::paged_attention_", mutates_args=("keys", "values"))
def _op(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, rows: Tensor, tables: Tensor, keys: Tensor,
    values: Tensor, scale: float, window: int | None, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    backend: str | None,
) -> Tensor:  # fmt: skip
    args = qkv, cos, sin, positions, rows, tables, keys, values, scale, window, q_norm, k_norm, eps
    return OP.pick(qkv.device, backend, *args).run(*args)


@_op.register_fake
def _(qkv, cos, sin, positions, rows, tables, keys, values, *rest):
    kv_heads, size = keys.shape[1:3]
    return qkv.new_empty(len(qkv), qkv.shape[1] - 2 * kv_heads * size)


def _rotated(x, cos, sin):
    """x [T, n, d] after the rotary embedding; cos and sin [T, d/2]."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def reference(qkv, cos, sin, positions, rows, tables, keys, values, scale, window, q_norm, k_norm, eps):
    kv_heads, size = keys.shape[1:3]
    place = positions.long()
    heads = qkv.shape[1] // size - 2 * kv_heads
    q, k, v = qkv.view(len(qkv), heads + 2 * kv_heads, size).split([heads, kv_heads, kv_heads], 1)
    q, k = (x if norm is None else rms_norm(x, norm, eps) for x, norm in ((q, q_norm), (k, k_norm)))
    q, k = (_rotated(x, cos[place].to(x.dtype), sin[place].to(x.dtype)) for x in (q, k))
    block = tables[rows.long(), place // BLOCK].long()
    keys[block, :, :, place % BLOCK] = k.to(keys.dtype)
    values[block, :, place % BLOCK] = v.to(values.dtype)
    out = torch.empty_like(q)
    for row in rows.unique().tolist():
        mine = (rows == row).nonzero()[:, 0]
        length = int(place[mine].max()) + 1
        blocks = tables[row, : -(-length // BLOCK)].long()
        k = keys[blocks].to(q.dtype).permute(1, 0, 3, 2).flatten(1, 2)[:, :length]
        v = values[blocks].to(q.dtype).transpose(0, 1).flatten(1, 2)[:, :length]
        grouped = q[mine].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, g, t, d]
        distance = place[mine][:, None] - torch.arange(length, device=q.device)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        scores = (grouped @ k[:, None].mT * scale).masked_fill(~seen, -torch.inf)
        out[mine] = (scores.softmax(-1) @ v[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
    return out.flatten(1)


def _cpu_call(qkv, cos, sin, positions, rows, tables, keys, values, scale, window, q_norm, k_norm, eps):
    kv_heads, size = keys.shape[1:3]
    qkv, cos, sin, positions, rows, tables = (t.contiguous() for t in (qkv, cos, sin, positions, rows, tables))
    q_norm, k_norm = (None if t is None else t.contiguous() for t in (q_norm, k_norm))
    tokens, heads = len(qkv), qkv.shape[1] // size - 2 * kv_heads
    out = qkv.new_empty(tokens, heads * size)
    numbers = (
        qkv.data_ptr(), tokens, cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), rows.data_ptr(),
        tables.data_ptr(), tables.shape[1], keys.data_ptr(), values.data_ptr(), kv_heads, heads, size, bits(scale),
        window or 0, address(q_norm), address(k_norm), bits(eps), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    reads = (qkv, cos, sin, positions, rows, tables, keys, values, q_norm, k_norm)
    return Call(cpu_kernel("paged_attention", keys.dtype), numbers, out, reads)


def _cpu_run(*args):
    return _cpu_call(*args).run()


def _refuses(qkv, cos, sin, positions, rows, tables, keys, values, *rest):
    if not (keys.is_contiguous() and values.is_contiguous()):
        return "the cache is not contiguous"
    kinds = {t.dtype for t in (qkv, cos, sin)}
    return None if kinds == {torch.float32} and keys.dtype in FLOATS else f"it has no kernel for {qkv.dtype}"


OP = Op(
    "paged_attention", [Backend("cpu", _cpu_run, cpu_unavailable, _refuses, _cpu_call), Backend("reference", reference)]
)
