"""What we ask of the system's memory; where it knows of no such thing, nothing is done."""

import ctypes
import gc
import mmap
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

from torch import Tensor

_C = ctypes.CDLL(None)
_PART_BYTES = 2 << 20
_LONG_S = 0.01  # of processor time: no stream notices what a collection takes that is shorter

_begun_s = 0.0  # when the collection began that is going on, on its thread's clock


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


def keep_collections_short() -> None:
    """Spare the garbage collector what is there by now, and later what it took long to look at.

    It would look through all modules, or all that a large request keeps, again and again: that
    takes a tenth of a second, in which nothing is answered. What is spared is freed all the same
    once nothing refers to it; only what refers to itself stays.
    """
    gc.freeze()
    if _on_collection not in gc.callbacks:
        gc.callbacks.append(_on_collection)


def _on_collection(phase: str, info: Mapping[str, int]) -> None:
    global _begun_s
    if phase == "start":
        _begun_s = time.thread_time()
    elif info["generation"] == 2 and time.thread_time() - _begun_s > _LONG_S:
        gc.freeze()


class Backing:
    """Has the pages of some tensors in memory before they are needed, the first of each first.

    Otherwise whoever writes to one first waits until the system has found and cleared it: 2 MiB at
    once, of all these tensors in the same step.
    """

    def __init__(self, tensors: Seq[Tensor]) -> None:
        """The tensors are used together, from their beginnings on."""
        self._tensors = tensors
        self._size = max((tensor.nbytes for tensor in tensors), default=0)  # of the largest
        self._parts = self._in_parts()
        self._start = 0  # of the part that comes next: what is before it is there in all tensors
        self._used = 0
        self.nbytes = 0  # of all

    def more(self) -> bool:
        """Back one part more of one tensor; False if nothing is left."""
        part = next(self._parts, None)
        if part is None:
            self._start = self._size
            return False
        tensor, self._start, size = part
        _populate(tensor, self._start, size)
        self.nbytes += size
        return True

    def keep_ahead(self, fraction: float) -> None:
        """So much of each tensor is in use by now: stay a part ahead, at the pace of that use."""
        used = int(fraction * self._size)
        gained = max(used - self._used, 0) * len(self._tensors)
        self._used = max(used, self._used)
        for _ in range(1 + gained // _PART_BYTES):
            if self._start >= min(used + _PART_BYTES, self._size) or not self.more():
                return

    def _in_parts(self) -> Iterator[tuple[Tensor, int, int]]:
        """Tensors, from where, and how many bytes."""
        for start in range(0, self._size, _PART_BYTES):
            for tensor in self._tensors:
                if start < tensor.nbytes:
                    yield tensor, start, min(_PART_BYTES, tensor.nbytes - start)


def _populate(tensor: Tensor, start: int, size: int) -> None:
    """Have the pages of these bytes in memory, their content unchanged."""
    populate_write = 23  # Linux 5.14
    if (madvise := getattr(_C, "madvise", None)) is not None:
        address = tensor.data_ptr() + start
        before = address % mmap.PAGESIZE
        madvise(
            ctypes.c_void_p(address - before),
            ctypes.c_size_t(size + before),
            ctypes.c_int(populate_write),
        )
