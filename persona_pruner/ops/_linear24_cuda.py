"""The CUDA side of linear24: the order of W on the device, the choice of kernel, and the launch.

The kernels (csrc/cuda/linear24*.cuh) read W as one uint8 tensor of blocks, [row blocks][column blocks][block], each
64 rows x 128 bytes of a token: 64 columns of 16-bit values (4608 bytes a block) or 128 of int8 (5120). `to_blocks`
and `from_blocks` are permutations of the plain tensors, and the padding that they add and remove.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from persona_pruner.ops import _native

ROWS = 64
TAG = {torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "i8", torch.float32: "f32"}
KIND = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def to_blocks(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """Device order of values [N, K/2] (16-bit or int8) and meta [N, ceil(K/8)]: uint8 [row, column, byte of a block].

    Padding is values 0 with nibbles 4, the pattern (0, 1). The axes of the permutations are named as in the kernel:
    row n = 64 nb + 16 mt + 8 h + g; a block holds two k steps ks; lane = 4 g + t.
    """
    rows, half = values.shape
    e = 4 // values.element_size()
    nb, kb = math.ceil(rows / ROWS), math.ceil(half / (16 * e))
    values = F.pad(values, (0, kb * 16 * e - half, 0, nb * ROWS - rows))
    meta = F.pad(meta, (0, kb * 4 * e - meta.shape[1], 0, nb * ROWS - rows), value=0x44)
    # values: nb mt h g | kb ks j t e, of which a lane's piece is (j h e)
    v = values.contiguous().view(nb, 4, 2, 8, kb, 2, 2, 4, e).permute(0, 4, 1, 5, 3, 7, 6, 2, 8)
    meta = meta.contiguous()
    if e == 2:
        # a word of metadata: rows g and g + 8 of 16 columns t: nb mt h g | kb t (16 bits)
        m = meta.view(torch.int16).view(nb, 4, 2, 8, kb, 4).permute(0, 4, 3, 5, 1, 2)
    else:
        # 32 columns of row g + 8 h in lane t = 2 c + h, for each k step: nb mt h g | kb ks c (32 bits)
        m = meta.view(torch.int32).view(nb, 4, 2, 8, kb, 2, 2).permute(0, 4, 5, 3, 6, 2, 1)
    as_bytes = [t.contiguous().view(torch.uint8).view(nb, kb, -1) for t in (v, m)]
    return torch.cat(as_bytes, dim=2)


# values -> (a weak reference to the meta, the versions of both, their blocks): a compiled call has no object of its own
# to keep them in, and the layout must not outlive the weight.
_BLOCKS = WeakTensorKeyDictionary()


def blocks_of(values: torch.Tensor, meta: torch.Tensor, check: Callable[[], None]) -> torch.Tensor:
    """`to_blocks`, after `check`, once for these tensors until one of them is changed in place.

    Inference tensors have no version: what is written into them later goes unnoticed.
    """
    versions = [None if t.is_inference() else t._version for t in (values, meta)]
    of, made, blocks = _BLOCKS.get(values, (lambda: None, None, None))
    if of() is not meta or made != versions:
        check()
        blocks = to_blocks(values, meta)
        _BLOCKS[values] = weakref.ref(meta), versions, blocks
    return blocks


def from_blocks(blocks: torch.Tensor, rows: int, cols: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain values [rows, cols/2] and meta [rows, ceil(cols/8)] of `to_blocks`."""
    e = 4 // dtype.itemsize
    nb, kb = blocks.shape[:2]
    v = blocks[..., :4096].contiguous().view(dtype).view(nb, kb, 4, 2, 8, 4, 2, 2, e)
    m = blocks[..., 4096:].contiguous()
    values = v.permute(0, 2, 7, 4, 1, 3, 6, 5, 8).reshape(nb * ROWS, kb * 16 * e)
    if e == 2:
        m = m.view(torch.int16).view(nb, kb, 8, 4, 4, 2).permute(0, 4, 5, 2, 1, 3)
    else:
        m = m.view(torch.int32).view(nb, kb, 2, 8, 2, 2, 4).permute(0, 6, 5, 3, 1, 2, 4)
    meta = m.contiguous().view(nb * ROWS, -1).view(torch.uint8)
    return values[:rows, : cols // 2].contiguous(), meta[:rows, : (cols + 7) // 8].contiguous()


@dataclass(frozen=True)
class Plan:
    """One launch: kernel, grid, threads and shared bytes of a CTA, splits along K, and the workspace they need."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    splits: int
    partials: int  # 4-byte sums
    tiles: int  # counters


@lru_cache(maxsize=4096)
def plan(m: int, n: int, row_bytes: int, tag: str, sms: int, max_shared: int) -> Plan:
    """Kernel for x [m, row_bytes] and n rows of W on a device with `sms` processors, `max_shared` bytes for a CTA.

    The cross-over points are arithmetic, not measurements: no GPU was at hand.
    - m <= 32 is bound by reading W once: decode. It splits K until every SM has a CTA, while writing and reading the
      partial sums (8 bytes a split, token and row, against 9/8 bytes of W a column) stays under 5% of W's bytes.
    - m <= 64: small tiles, more of them; partial sums may reach 45%, for they live in L2 and the SMs would idle.
    - beyond: 128 x 256 tiles, the ones nearest to the tensor core's rate, once they fill the device and fit.
    """
    blocks, row_blocks = math.ceil(row_bytes / 128), math.ceil(n / ROWS)
    if m <= 32:
        tokens = 1 if m <= 8 else 2 if m <= 16 else 4
        warps = 8 if tokens < 4 else 4
        splits = max(1, min(round(sms / row_blocks), blocks // warps, int(0.05 * row_bytes / (14.2 * m))))
        # the x ring of every warp (2 x 1 KB for 8 tokens), overlaid by the sums (68 words a token)
        shared = warps * 8 * tokens * 68 * 4
        kernel, grid, threads = f"decode_{tag}_{tokens}", (row_blocks, splits, 1), warps * 32
    else:
        if m <= 64:
            bm, bn, splits = 64, 64, max(1, min(sms // row_blocks, blocks // 8, row_bytes // (32 * m)))
        else:
            bm, splits = 128, 1
            fills = math.ceil(n / 256) * math.ceil(m / 128) >= sms
            bn = 256 if fills and prefill_shared(128, 256, tag) <= max_shared else 128
        kernel, grid = f"prefill_{tag}_{bm}x{bn}", (math.ceil(n / bn), math.ceil(m / bm), splits)
        threads, shared = bn, prefill_shared(bm, bn, tag)
    partials = splits * m * row_blocks * ROWS if splits > 1 else 0
    return Plan(kernel, grid, threads, shared, splits, partials, math.prod(grid) // splits)


def prefill_shared(bm: int, bn: int, tag: str) -> int:
    """Three stages of bn / 64 blocks of W and bm tokens x 128 bytes."""
    return 3 * (bn // ROWS * (5120 if tag == "i8" else 4608) + bm * 128)


def run(x: torch.Tensor, blocks: torch.Tensor, weight, bias: torch.Tensor | None) -> torch.Tensor:
    """y [M, N] for x [M, K] and a Packed24 in the order `blocks`, on PyTorch's current stream of x's device."""
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        properties = torch.cuda.get_device_properties(x.device)
        limits = properties.multi_processor_count, properties.shared_memory_per_block_optin
        return launch(_native.cuda_module(), x, blocks, weight, bias, limits, x.device.index, stream)


def launch(module, x, blocks, weight, bias, limits, device, stream) -> torch.Tensor:
    """`run` with its surroundings given: the native module, (SMs, shared bytes), the device and stream as integers."""
    (m, cols), n, dtype = x.shape, weight.shape[0], weight.values.dtype
    kernels = module.linear24_kernels()
    y = x.new_empty(m, n)
    token_scale = None
    if dtype == torch.int8:
        row_bytes = -(-cols // 16) * 16
        q, token_scale = x.new_empty(m, row_bytes, dtype=torch.int8), x.new_empty(m, dtype=torch.float32)
        pointers = x.data_ptr(), q.data_ptr(), token_scale.data_ptr()
        module.linear24_quantize(kernels["quantize_" + TAG[x.dtype]], *pointers, m, cols, row_bytes, device, stream)
        x = q
    elif cols % 8 or x.data_ptr() % 16:
        # the kernels copy 16 bytes at a time; K % 8 == 4 and views at odd offsets are rare enough for a copy
        x = F.pad(x, (0, -cols % 8)) if cols % 8 else x.clone()
    row_bytes = x.shape[1] * x.element_size()
    p = plan(m, n, row_bytes, TAG[dtype], *limits)
    partial = count = None
    if p.splits > 1:
        partial, count = x.new_empty(p.partials, dtype=torch.float32), _counters(x, stream, p.tiles)
    tensors = (blocks, x, y, bias, weight.scales, token_scale, partial, count)
    pointers = (0 if t is None else t.data_ptr() for t in tensors)
    kind = KIND[y.dtype]
    module.linear24(kernels[p.kernel], p.grid, p.threads, p.shared, *pointers, m, n, row_bytes, kind, device, stream)
    return y


_COUNTERS: dict[tuple[torch.device, int], torch.Tensor] = {}


def _counters(x, stream, tiles):
    """Zeroed counters. The kernels leave them zero, so one tensor serves a stream; a CUDA graph gets its own."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return x.new_zeros(tiles, dtype=torch.int32)
    have = _COUNTERS.get((x.device, stream))
    if have is None or have.numel() < tiles:
        have = _COUNTERS[x.device, stream] = x.new_zeros(max(tiles, 4096), dtype=torch.int32)
    return have


def unavailable(device_type: str) -> str | None:
    if device_type != "cuda":
        return "it takes CUDA tensors"
    module = _native.cuda_module()
    if isinstance(module, str):
        return module
    if torch.version.hip:
        return "it is for NVIDIA GPUs"
    return None


def refuses(x: torch.Tensor, weight) -> str | None:
    dtype = weight.values.dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.int8):
        return f"the sparse tensor cores take float16, bfloat16 and int8 weights, not {dtype}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "2:4 sparse tensor cores need compute capability 8.0 or newer"
    return None
