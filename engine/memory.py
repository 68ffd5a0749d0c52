"""What we ask of the system's memory; where it knows of no such thing, nothing is done."""

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

_C = ctypes.CDLL(None)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, here for the same megabytes of logits each step.

    By default it gives large blocks back at once, and every page of the next one faults.
    """
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    if (mallopt := getattr(_C, "mallopt", None)) is not None:
        mallopt(ctypes.c_int(mmap_threshold), ctypes.c_int(1 << 30))
        mallopt(ctypes.c_int(trim_threshold), ctypes.c_int(1 << 30))


def resident_bytes() -> int:
    """How much memory the process has of the system by now; 0 if that is not known."""
    try:
        with Path("/proc/self/statm").open() as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def give_back() -> None:
    """Return what is free of the memory that `keep_freed_memory` kept."""
    if (malloc_trim := getattr(_C, "malloc_trim", None)) is not None:
        malloc_trim(ctypes.c_size_t(0))


def back(tensor: Tensor, start: int, size: int) -> None:
    """Have the pages of these bytes of a tensor in memory, their content unchanged.

    Otherwise whoever writes to one first waits until the system has found and cleared it: up to
    some milliseconds for a large one.
    """
    populate_write = 23  # Linux 5.14
    if size > 0 and (madvise := getattr(_C, "madvise", None)) is not None:
        address = tensor.data_ptr() + start
        before = address % mmap.PAGESIZE
        madvise(
            ctypes.c_void_p(address - before),
            ctypes.c_size_t(size + before),
            ctypes.c_int(populate_write),
        )
