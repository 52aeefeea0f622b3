"""A full disk, as far as one process can have one."""

import resource
from contextlib import contextmanager


@contextmanager
def files_up_to(size: int):
    """Within the context no file may grow past `size` bytes: a write fails as on a full disk.

    Only around the call under test: pytest's own output may be a file that is longer than that.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
