"""Files written a piece at a time, as the format's own library reads them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from engine.models.tensor_file import Planned, write
from engine.models.weights import Weights

RANDOM = np.random.default_rng(0)
TENSORS: dict[str, NDArray[Any]] = {
    "codes": RANDOM.integers(0, 256, (3, 5), dtype=np.uint8),  # an odd number of bytes
    "d": RANDOM.normal(size=(3, 7)).astype(np.float16),
    "model.norm.weight": RANDOM.normal(size=9).astype(np.float32),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "w": RANDOM.normal(size=(6, 4)).astype(np.float32),
}


def planned(name: str, step: int) -> Planned:
    values = TENSORS[name]

    def pieces() -> Iterator[NDArray[Any]]:
        for start in range(0, len(values), step):
            yield np.asfortranarray(values[start : start + step])

    return Planned(name, str(values.dtype), values.shape, pieces)


@pytest.mark.parametrize("step", [1, 2, 100])
def test_the_library_reads_what_was_written(tmp_path: Path, step: int) -> None:
    sizes: list[int] = []
    write(tmp_path / "model.safetensors", [planned(name, step) for name in TENSORS], sizes.append)
    got = load_file(tmp_path / "model.safetensors")
    assert got.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        assert got[name].dtype == values.dtype
        assert np.array_equal(got[name], values)
    assert sum(sizes) == sum(values.nbytes for values in TENSORS.values())
    weights = Weights(tmp_path, torch.float32, "cpu")
    assert torch.equal(weights.take("w", (6, 4)), torch.from_numpy(TENSORS["w"]))
