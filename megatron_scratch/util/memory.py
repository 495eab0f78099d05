"""glibc's allocator, told to keep what it has: activations are freed and asked for again every step."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP = 2**31 - 1  # mallopt takes an int: just under 2 GiB


def keep_freed_memory() -> bool:
    """Serve large blocks from the heap and never give the top of it back to the kernel.

    By default each block over 32 MiB is mapped anew and its pages are zeroed by the kernel at first touch, every step. Returns
    whether glibc took both settings (False elsewhere: nothing changes).
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEEP)) and bool(mallopt(M_TRIM_THRESHOLD, KEEP))
