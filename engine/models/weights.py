"""Weights from the safetensors files of a Hugging Face folder."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import ModelUnavailable
from engine.kernels.quantized import GROUP, Groups

GROUPS_FILE = "groups.safetensors"  # codes of quantised weights, beside their floats
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
        self._folder = folder
        self._files = _files_by_tensor(folder)
        self._grouped: set[str] = set()
        if (folder / GROUPS_FILE).exists():
            with safe_open(folder / GROUPS_FILE, framework="pt", device="cpu") as file:
                self._grouped = set(file.keys())

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def has_groups(self) -> bool:
        """Are there weights whose codes the file itself holds?"""
        return bool(self._grouped)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, converted.

        Raises ModelUnavailable if the checkpoint lacks it or has it in another shape.
        """
        path = self._files.pop(name, None)
        if path is None:
            raise ModelUnavailable(f"the checkpoint has no tensor {name!r}")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error
        if tensor.shape != shape:
            raise ModelUnavailable(
                f"tensor {name!r} is {list(tensor.shape)}; with this config.json it would be "
                f"{list(shape)}"
            )
        return tensor.to(device=self.device, dtype=dtype or self.dtype)

    def maybe(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """One tensor, or None if the checkpoint lacks it."""
        return self.take(name, shape) if name in self else None

    def groups(self, name: str, shape: tuple[int, int]) -> Groups:
        """One weight in groups: the file's own codes where it has them, else rounded to 8 bits."""
        if f"{name}.codes" not in self._grouped:
            return Groups.of(self.take(name, shape, torch.float32))
        del self._files[name]
        with safe_open(self._folder / GROUPS_FILE, framework="pt", device="cpu") as file:
            codes, d = (file.get_tensor(f"{name}.{part}") for part in ("codes", "d"))
            if codes.shape[1] == shape[1]:
                return Groups(8, codes, d.float(), -128.0 * d.float())
            halves = codes.unflatten(1, (-1, GROUP // 2))
            codes = torch.cat((halves & 15, halves >> 4), dim=2).flatten(1)
            return Groups(4, codes, d, file.get_tensor(f"{name}.m"))

    def check_all_used(self) -> None:
        """Raise ModelUnavailable if tensors are left that should mean something."""
        left = [name for name in self._files if not name.endswith("rotary_emb.inv_freq")]
        if left:
            raise ModelUnavailable(f"the model has no place for {_listed(left)}")


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index, single = folder / _INDEX, folder / _SINGLE
    if index.exists():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(index, error) from error
        return {name: folder / file for name, file in weight_map.items()}
    if not single.exists():
        raise ModelUnavailable(f"{folder} holds neither {_SINGLE} nor {_INDEX}")
    try:
        with safe_open(single, framework="pt", device="cpu") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, SafetensorError) as error:
        raise _unreadable(single, error) from error


def _unreadable(path: Path, error: Exception) -> ModelUnavailable:
    return ModelUnavailable(f"{path} cannot be read: {error}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
