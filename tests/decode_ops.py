"""What the tests of subset_ffn, norm_linear and paged_attention_ share: random cases, and ways to run them."""

import ctypes
import mmap
import os
import subprocess
import sys

import torch

from persona_pruner import ops
from persona_pruner.ops import _native

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
OTHER_ISAS = [
    isa for isa, needs in _native.ISAS.items() if needs <= _native.cpu_flags() and isa != _native.cpu_isa()
]  # of this machine


def weight(rows, cols, kind, seed):
    """(weight, scales, the same as float64)."""
    full = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * max(cols, 1) ** -0.5
    if kind == torch.int8:
        values, scales = ops.quantize24(full)
        return values, scales, values.double() * scales.double()[:, None]
    full = full.to(kind)
    return full, None, full.double()


def draw(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(width, share, seed):
    mask = torch.rand(width, generator=torch.Generator().manual_seed(seed)) < share
    return mask.nonzero()[:, 0].to(torch.int32)


def ffn_case(width, hidden, rows, kind, dressed, seed=1):
    """Weights, scales, weights as float64, channels and segments of these rows, and keywords if `dressed`."""
    weights, scales, exact = zip(*(weight(width, hidden, kind, seed + i) for i in range(3)), strict=True)
    lists = [kept(width, (0.5, 1.0, 0.0, 0.25)[i % 4], seed + i) for i in range(len(rows))]
    starts = torch.tensor([0, *map(len, lists)]).cumsum(0)
    segments = torch.tensor([[r, starts[i], len(lists[i])] for i, r in enumerate(rows)])
    extra = {}
    if dressed:
        extra = {
            "biases": (draw(width, seed=11), draw(width, seed=12), draw(hidden, seed=13)),
            "norm": draw(hidden, seed=14), "eps": 1e-5, "residual": draw(sum(rows), hidden, seed=15),
        }  # fmt: skip
    return weights, scales, exact, torch.cat(lists), segments, extra


def attention_case(kind, heads, kv_heads, size, lengths, fresh):
    """Rows of these lengths, whose last `fresh` tokens are new; blocks lie in disorder, unused memory is poisoned."""
    generator = torch.Generator().manual_seed(2)
    width = max(-(-n // 16) for n in lengths)
    blocks = torch.randperm(len(lengths) * width + 3, generator=generator).to(torch.int32)
    tables = blocks[: len(lengths) * width].view(len(lengths), width)
    keys = torch.full((len(blocks), kv_heads, size, 16), torch.nan)
    values = torch.full((len(blocks), kv_heads, 16, size), torch.nan)
    for row, length in enumerate(lengths):
        for place in range(length - fresh[row]):
            block = tables[row, place // 16]
            keys[block, :, :, place % 16] = torch.randn(kv_heads, size, generator=generator)
            values[block, :, place % 16] = torch.randn(kv_heads, size, generator=generator)
    positions = torch.cat([torch.arange(n - f, n) for n, f in zip(lengths, fresh, strict=True)]).to(torch.int32)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(fresh)).to(torch.int32)
    qkv = torch.randn(len(rows), (heads + 2 * kv_heads) * size, generator=generator)
    angle = torch.arange(max(lengths))[:, None] / 100 ** (torch.arange(size // 2) / (size // 2))
    return qkv, angle.cos(), angle.sin(), positions, rows, tables, keys.to(kind), values.to(kind)


def each(value, change):
    """`change` of every tensor in a tensor, a number, None, or tuples and dictionaries of them."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: each(v, change) for name, v in value.items()}
    return type(value)(each(v, change) for v in value) if isinstance(value, tuple | list) else value


def widened(value):
    return each(value, torch.Tensor.double)


def guarded(tensor):
    """The same numbers so that they end where the readable memory of the process ends: one byte further is a fault."""
    if tensor.numel() == 0:
        return tensor
    size = tensor.nbytes
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
    held = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size).view(tensor.shape)
    return held.copy_(tensor)


def run_tests(path, words, **environment):
    """pytest in a process of its own on the tests of `path` whose names hold one of `words`."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", path, "-k", " or ".join(words)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
