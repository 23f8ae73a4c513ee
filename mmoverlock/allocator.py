"""Memory that is freed, and the C library."""

import ctypes
import os

# Of mallopt in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_MMAP_THRESHOLD = 32 * 2**20  # in bytes; glibc refuses more


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensor, in this process.

    By default, glibc returns the memory of large tensors on the CPU to the
    system and gets it anew, page by page, for the next one. That is a tenth
    of the time of a network that runs on the CPU (benchmarks/NOTES.md).

    Does nothing with other C libraries, or where the environment has
    settings of its own (``MALLOC_...``, ``GLIBC_TUNABLES``).
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    own = ('MALLOC_', 'GLIBC_TUNABLES')
    if mallopt is None or any(name.startswith(own) for name in os.environ):
        return
    mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
