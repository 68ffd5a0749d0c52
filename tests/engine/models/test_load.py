"""What type a model runs in, where nobody says, and which code runs it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.models.load import choose_dtype


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_type_is_taken(name: str, device: str) -> None:
    assert choose_dtype(name, SimpleNamespace(dtype=None), device) == getattr(torch, name)


@pytest.mark.parametrize(
    ("amx", "avx512", "dtype"),
    [
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ],
)
def test_on_cpu_the_processor_decides(
    amx: bool, avx512: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert choose_dtype("auto", SimpleNamespace(dtype=torch.float16), "cpu") == dtype


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (SimpleNamespace(dtype=torch.float16), torch.float16),
        (SimpleNamespace(dtype=None), torch.bfloat16),
        (SimpleNamespace(), torch.bfloat16),
    ],
)
def test_on_cuda_the_checkpoint_decides(config: Any, dtype: torch.dtype) -> None:
    assert choose_dtype("auto", config, "cuda:0") == dtype
