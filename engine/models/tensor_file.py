"""Writes safetensors files a piece at a time: the library wants all tensors of a file in memory."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INDEX_FILE = "model.safetensors.index.json"  # which file of several holds a tensor
GROUPS_FILE = "groups.safetensors"  # codes of quantised weights, beside their floats

_NAMES = {"float32": "F32", "float16": "F16", "uint8": "U8"}
_ALIGNMENT = 8  # of where the first tensor begins


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that is to be written, and what makes its pieces when it is its turn."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[NDArray[Any]]]  # whole rows, in order

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write(path: Path, tensors: Iterable[Planned], go_on: Callable[[int], object]) -> None:
    """Write a file of tensors and tell `go_on` how many bytes each piece had. Raises OSError."""
    # The widest first, so that each begins where its numbers may.
    ordered = sorted(tensors, key=lambda tensor: -np.dtype(tensor.dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            left = tensor.nbytes
            for piece in tensor.pieces():
                assert piece.dtype == tensor.dtype
                left -= file.write(np.ascontiguousarray(piece).data)
                go_on(piece.nbytes)
            assert left == 0, tensor.name
