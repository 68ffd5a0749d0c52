"""Our own C++ kernels for the CPU, compiled when the package is installed, if a compiler is there.

They run in the OpenMP threads that torch has already started: the library is linked against none,
and finds torch's when it is loaded after it.
"""

import ctypes
import logging
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch  # noqa: F401 - loads the OpenMP runtime

log = logging.getLogger(__name__)


class AttentionArgs(ctypes.Structure):
    """`Args` of attention.cpp: pointers, then sizes in elements."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "keys", "values", "out")),
        *((name, ctypes.c_void_p) for name in ("spans", "blocks")),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_spans",
                "heads",
                "kv_heads",
                "dim",
                "value_dim",
                "block_size",
                "window",
            )
        ),
        ("scale", ctypes.c_float),
    )


def _load() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu{suffix}")
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
            except OSError as error:
                log.warning("the CPU kernels cannot be loaded: %s", error)
                return None
            library.logitmill_attend.argtypes = [ctypes.c_void_p, ctypes.c_int64]
            library.logitmill_attend.restype = ctypes.c_bool
            return library
    return None


LIBRARY = _load()


def attend(args: AttentionArgs, element_size: int) -> bool:
    """Run paged attention; False if the shapes are not supported, and nothing was done."""
    assert LIBRARY is not None
    return bool(LIBRARY.logitmill_attend(ctypes.addressof(args), element_size))
