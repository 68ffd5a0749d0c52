"""Without the kernel, torch's operations take over and the text stays the same."""

from pathlib import Path

import pytest

from engine.attention import choose_attention
from engine.attention.torch_paged import TorchPagedAttention
from engine.kernels import native
from tests.support import tiny
from tests.support.engines import request, run, tiny_core

PROMPTS = [[5, 9, 33], [64, 7, 12, 99, 31, 8, 90, 14, 55, 72, 3], [100]]


def generated(folder: Path) -> tuple[type, list[list[int]]]:
    """The backend's type, and a few tokens for each prompt."""
    core, _ = tiny_core(folder, max_batch_tokens=8, max_num_seqs=4)
    requests = [
        request(core, ids, str(index), max_tokens=16, ignore_eos=True)
        for index, ids in enumerate(PROMPTS)
    ]
    results = run(core, *requests)
    return type(core.runners[0].attention), [
        results.ids(str(index)) for index in range(len(PROMPTS))
    ]


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3", "gpt2"])
def test_a_model_says_the_same_without_the_kernel(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save(tiny.hf_model(family), tmp_path)
    _, want = generated(folder)
    monkeypatch.setattr(native, "LIBRARY", None)
    assert type(choose_attention(16, "cpu")) is TorchPagedAttention
    backend, got = generated(folder)
    assert backend is TorchPagedAttention
    assert got == want
