"""The process's memory while long work runs."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
LARGEST = 32 << 20  # bytes: the largest MMAP_THRESHOLD that glibc takes
NEVER = (1 << 31) - 1


@cache
def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def trim() -> None:
    """Gives memory that nothing uses back to the system, where the C library is glibc."""
    if libc := _glibc():
        libc.malloc_trim(0)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within the context (or the function that it decorates) the process keeps what it frees, and gives it back at the
    end. Without effect where the C library is not glibc.

    By default a large tensor's pages go back to the system when it is freed, and the next one's are handed out anew and
    cleared, 4 KB at a time: 355,000 in a search step of SmolLM2-135M in bfloat16, a third of its time (2 cores of a
    Xeon with AMX, virtual machine, 2026-11-30).
    """
    libc = _glibc()
    if not libc:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, LARGEST)
    libc.mallopt(TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST)  # where glibc's own rule ends up with large tensors
        trim()
