"""Weights from the files of a Hugging Face folder, read into memory of our own.

A file that is mapped instead would go on living in the model: whoever overwrites it changes the
answers, and whoever cuts it short ends the process.
"""

import json
import math
import operator
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelUnavailable
from engine.kernels.quantized import GROUP, Groups
from engine.models.tensor_file import GROUPS_FILE, INDEX_FILE

_SINGLE = "model.safetensors"
_TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
}


class Unread:
    """A tensor of a safetensors file, read when it is indexed, as `transformers` does."""

    def __init__(self, file: "_File", name: str, entry: dict[str, Any]) -> None:
        """Raises ValueError, LookupError or TypeError if the header's entry is none."""
        self.name = name
        self.dtype = _TYPES[entry["dtype"]]
        self.shape = tuple(operator.index(size) for size in entry["shape"])
        self.start, self.end = (operator.index(offset) for offset in entry["data_offsets"])
        if min(self.shape, default=0) < 0 or self.end - self.start != self.nbytes:
            raise ValueError(f"its header contradicts itself about tensor {name!r}")
        self._file = file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]

    def shaped(self, shape: tuple[int, ...]) -> Tensor:
        """The tensor. Raises ModelUnavailable if it has another shape, or cannot be read."""
        if self.shape != shape:
            raise ModelUnavailable(
                f"tensor {self.name!r} is {list(self.shape)}; with this config.json it would be "
                f"{list(shape)}"
            )
        return self.read()

    def read(self) -> Tensor:
        """The tensor. Raises ModelUnavailable if it cannot be read."""
        values = torch.empty(self.nbytes, dtype=torch.uint8)
        try:
            self._file.fill(values.numpy().data, self.start)
        except (OSError, ValueError) as error:
            raise _unreadable(self._file.path, error) from error
        return values.view(self.dtype).view(self.shape)


class _File:
    """A safetensors file, open until the last of its tensors is gone, and never mapped.

    The library maps a file at first even where it is to read it: that takes as much address space
    as the file is long, and ends the process if somebody cuts it short just then.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._start = 0  # of the tensors

    def tensors(self) -> dict[str, Unread]:
        """What it holds. Raises OSError, or an error of any kind if it is no such file."""
        size = os.fstat(self._descriptor).st_size
        prefix = bytearray(8)
        self.fill(memoryview(prefix), 0)
        length = int.from_bytes(prefix, "little")
        if length > size - 8:
            raise ValueError(f"it has {size} bytes, and its header alone would have {length}")
        header = bytearray(length)
        self.fill(memoryview(header), 8)
        self._start = 8 + length
        entries = json.loads(header)
        if not isinstance(entries, dict):
            raise ValueError("its header is no object")
        entries.pop("__metadata__", None)
        tensors = {name: Unread(self, name, entry) for name, entry in entries.items()}
        end = 0
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
            if tensor.start != end:
                raise ValueError(f"its header leaves a gap before tensor {tensor.name!r}")
            end = tensor.end
        if self._start + end != size:
            raise ValueError(f"it has {size} bytes, and would have {self._start + end}")
        return tensors

    def fill(self, buffer: memoryview, start: int) -> None:
        """Read into all of a buffer. Raises OSError, ValueError if the file ends before."""
        filled = 0
        while filled < len(buffer):  # the system reads no more than 2 GiB at once
            at = self._start + start + filled
            count = os.preadv(self._descriptor, [buffer[filled:]], at)
            if count == 0:
                raise ValueError(f"it ends at byte {at}")
            filled += count


def _tensors_of(path: Path) -> dict[str, Unread]:
    """All tensors of a safetensors file. Raises ModelUnavailable if it is missing or broken."""
    try:
        return _File(path).tensors()
    except Exception as error:  # of any kind: the header may say anything
        raise _unreadable(path, error) from error


def unread_tensors(folder: Path) -> dict[str, Unread]:
    """All tensors of a checkpoint. Raises ModelUnavailable if a file is missing or broken."""
    index, single = folder / INDEX_FILE, folder / _SINGLE
    if not index.exists():
        if not single.exists():
            raise ModelUnavailable(f"{folder} holds neither {_SINGLE} nor {INDEX_FILE}")
        return _tensors_of(single)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        weight_map = {name: folder / file for name, file in content.items()}
    except Exception as error:  # of any kind: it may say anything
        raise _unreadable(index, error) from error
    files = {path: _tensors_of(path) for path in dict.fromkeys(weight_map.values())}
    for name, path in weight_map.items():
        if name not in files[path]:
            raise ModelUnavailable(f"{path} has no tensor {name!r}, which {index.name} names")
    return {name: files[path][name] for name, path in weight_map.items()}


def num_elements(folder: Path) -> dict[str, int]:
    """How many numbers each tensor of a checkpoint has. Raises ModelUnavailable."""
    if old := old_files(folder):  # which say so only once they are read
        return {file.name: file.stat().st_size // 4 for file in old}
    return {name: math.prod(tensor.shape) for name, tensor in unread_tensors(folder).items()}


def old_files(folder: Path) -> list[Path]:
    """Files of the form before safetensors, if the folder has no others."""
    if any(folder.glob("model*.safetensors*")):
        return []
    return sorted(folder.glob("pytorch_model*.bin"))


def four_bit_names(folder: Path) -> set[str]:
    """The weights whose codes the folder holds, of 4 bits. Raises ModelUnavailable."""
    groups = folder / GROUPS_FILE
    names = _tensors_of(groups) if groups.exists() else {}
    return {name.removesuffix(".m") for name in names if name.endswith(".m")}


class Weights:
    """A checkpoint's tensors, read one at a time when asked for, each exactly once.

    Asking twice or leaving one unread is an error: a weight nobody used means a model that is not
    the one the checkpoint was made for.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        """Raises ModelUnavailable if a file is missing or broken."""
        self.dtype = dtype
        self.device = device
        self._left = unread_tensors(folder)
        groups = folder / GROUPS_FILE
        self._groups = _tensors_of(groups) if groups.exists() else {}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    @property
    def has_groups(self) -> bool:
        """Are there weights whose codes the file itself holds?"""
        return bool(self._groups)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, converted.

        Raises ModelUnavailable if the checkpoint lacks it or has it in another shape.
        """
        unread = self._left.pop(name, None)
        if unread is None:
            raise ModelUnavailable(f"the checkpoint has no tensor {name!r}")
        return unread.shaped(shape).to(device=self.device, dtype=dtype or self.dtype)

    def maybe(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """One tensor, or None if the checkpoint lacks it."""
        return self.take(name, shape) if name in self else None

    def groups(self, name: str, shape: tuple[int, int]) -> Groups:
        """One weight in groups: the file's own codes where it has them, else rounded to 8 bits.

        Raises ModelUnavailable as `take` does.
        """
        if f"{name}.codes" not in self._groups or name not in self:
            return Groups.of(self.take(name, shape, torch.float32))
        del self._left[name]
        rows, columns = shape
        of_group = (rows, columns // GROUP)
        d = self._part(name, "d", of_group, torch.float16)
        if f"{name}.m" not in self._groups:
            codes = self._part(name, "codes", shape, torch.uint8)
            return Groups(8, codes, d.float(), -128.0 * d.float())
        halves = self._part(name, "codes", (rows, columns // 2), torch.uint8)
        halves = halves.unflatten(1, (-1, GROUP // 2))
        codes = torch.cat((halves & 15, halves >> 4), dim=2).flatten(1)
        return Groups(4, codes, d, self._part(name, "m", of_group, torch.float16))

    def _part(self, name: str, part: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A part of a weight in groups, which kernels read without looking at its type."""
        whole = f"{name}.{part}"
        if whole not in self._groups:
            raise ModelUnavailable(f"{GROUPS_FILE} has no tensor {whole!r}")
        tensor = self._groups[whole].shaped(shape)
        if tensor.dtype != dtype:
            raise ModelUnavailable(f"tensor {whole!r} is {tensor.dtype}; it would be {dtype}")
        return tensor

    def check_all_used(self) -> None:
        """Raise ModelUnavailable if tensors are left that should mean something."""
        left = [name for name in self._left if not name.endswith("rotary_emb.inv_freq")]
        if left:
            raise ModelUnavailable(f"the model has no place for {_listed(left)}")


def _unreadable(path: Path, error: Exception) -> ModelUnavailable:
    reason = str(getattr(error, "strerror", None) or error).partition("\n")[0]
    if not isinstance(error, OSError | ValueError):
        reason = f"{type(error).__name__}: {reason}"
    return ModelUnavailable(f"{path} cannot be read: {reason}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
