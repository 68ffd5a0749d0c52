"""Weights from the files of a Hugging Face folder, read into memory of our own.

A file that is mapped instead would go on living in the model: whoever overwrites it changes the
answers, and whoever cuts it short ends the process.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import ModelUnavailable
from engine.kernels.quantized import GROUP, Groups
from engine.models.tensor_file import GROUPS_FILE, INDEX_FILE

_SINGLE = "model.safetensors"


class _File:
    """A safetensors file, open as long as this lives, whose tensors are read and not mapped."""

    def __init__(self, path: Path) -> None:
        """Raises ModelUnavailable if it is missing or broken."""
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt", device="cpu", backend="pread")
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error

    def names(self) -> list[str]:
        return list(self._file.keys())

    def unread(self, name: str) -> Any:
        """A tensor that is read when it is indexed, and says its shape before."""
        try:
            return self._file.get_slice(name)
        except SafetensorError as error:
            raise _unreadable(self.path, error) from error

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor. Raises ModelUnavailable if it has another shape, or cannot be read."""
        if (found := tuple(self.unread(name).get_shape())) != shape:
            raise ModelUnavailable(
                f"tensor {name!r} is {list(found)}; with this config.json it would be {list(shape)}"
            )
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.path, error) from error
        return tensor


def unread_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint by name, each of which is read when it is indexed.

    Raises ModelUnavailable if a file is missing or broken.
    """
    return {name: file.unread(name) for name, file in _files_by_tensor(folder).items()}


class Weights:
    """A checkpoint's tensors, read one at a time when asked for, each exactly once.

    Asking twice or leaving one unread is an error: a weight nobody used means a model that is not
    the one the checkpoint was made for.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        """Raises ModelUnavailable if a file is missing or broken."""
        self.dtype = dtype
        self.device = device
        self._files = _files_by_tensor(folder)  # of those that have not been taken
        groups = folder / GROUPS_FILE
        self._groups = _tensors_of(_File(groups)) if groups.exists() else {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def has_groups(self) -> bool:
        """Are there weights whose codes the file itself holds?"""
        return bool(self._groups)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, converted.

        Raises ModelUnavailable if the checkpoint lacks it or has it in another shape.
        """
        file = self._files.pop(name, None)
        if file is None:
            raise ModelUnavailable(f"the checkpoint has no tensor {name!r}")
        tensor = file.read(name, shape)
        return tensor.to(device=self.device, dtype=dtype or self.dtype)

    def maybe(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """One tensor, or None if the checkpoint lacks it."""
        return self.take(name, shape) if name in self else None

    def groups(self, name: str, shape: tuple[int, int]) -> Groups:
        """One weight in groups: the file's own codes where it has them, else rounded to 8 bits.

        Raises ModelUnavailable as `take` does.
        """
        if f"{name}.codes" not in self._groups or name not in self:
            return Groups.of(self.take(name, shape, torch.float32))
        del self._files[name]
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
        tensor = self._groups[whole].read(whole, shape)
        if tensor.dtype != dtype:
            raise ModelUnavailable(f"tensor {whole!r} is {tensor.dtype}; it would be {dtype}")
        return tensor

    def check_all_used(self) -> None:
        """Raise ModelUnavailable if tensors are left that should mean something."""
        left = [name for name in self._files if not name.endswith("rotary_emb.inv_freq")]
        if left:
            raise ModelUnavailable(f"the model has no place for {_listed(left)}")


def _files_by_tensor(folder: Path) -> dict[str, _File]:
    index, single = folder / INDEX_FILE, folder / _SINGLE
    if not index.exists():
        if not single.exists():
            raise ModelUnavailable(f"{folder} holds neither {_SINGLE} nor {INDEX_FILE}")
        return _tensors_of(_File(single))
    try:
        content = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        weight_map = {name: folder / file for name, file in content.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(index, error) from error
    files = {path: _File(path) for path in dict.fromkeys(weight_map.values())}
    return {name: files[path] for name, path in weight_map.items()}


def _tensors_of(file: _File) -> dict[str, _File]:
    return dict.fromkeys(file.names(), file)


def _unreadable(path: Path, error: Exception) -> ModelUnavailable:
    reason = str(error).split("\n")[0] or type(error).__name__
    return ModelUnavailable(f"{path} cannot be read: {reason}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
