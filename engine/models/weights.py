"""Weights from the safetensors files of a Hugging Face folder."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import ModelUnavailable

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Weights:
    """A checkpoint's tensors, read one at a time when asked for, each exactly once.

    Asking twice or leaving one unread is an error: a weight nobody used means a model that is not
    the one the checkpoint was made for.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        self.dtype = dtype
        self.device = device
        self._files = _files_by_tensor(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def take(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, converted. Raises ModelUnavailable if the checkpoint lacks it."""
        path = self._files.pop(name, None)
        if path is None:
            raise ModelUnavailable(f"the checkpoint has no tensor {name!r}")
        with safe_open(path, framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.to(device=self.device, dtype=dtype or self.dtype)

    def maybe(self, name: str) -> Tensor | None:
        """One tensor, or None if the checkpoint lacks it."""
        return self.take(name) if name in self else None

    def check_all_used(self) -> None:
        """Raise ModelUnavailable if tensors are left that should mean something."""
        left = [name for name in self._files if not name.endswith("rotary_emb.inv_freq")]
        if left:
            raise ModelUnavailable(f"the model has no place for {_listed(left)}")


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / _INDEX
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / _SINGLE
    if not single.exists():
        raise ModelUnavailable(f"{folder} holds neither {_SINGLE} nor {_INDEX}")
    with safe_open(single, framework="pt", device="cpu") as file:
        return dict.fromkeys(file.keys(), single)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def iterate(folder: Path) -> Iterator[str]:
    """The names of all tensors of a folder."""
    yield from _files_by_tensor(folder)
