"""How near what is on by default comes to the same checkpoint in float32."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.models.load import choose_dtype, load_config, load_model
from engine.tokenizer import Tokenizer
from tests.support.packed import packed_logits

ROOT = Path(__file__).parents[3]
LENGTH = 512  # tokens that are scored together


def surprises(folder: Path, config: EngineConfig, ids: list[int]) -> Tensor:
    """-ln p of each token but the first of every part of a text."""
    hf_config = load_config(folder)
    dtype = choose_dtype(config.dtype, hf_config, "cpu")
    model = load_model(folder, hf_config, dtype, "cpu", quantize=config.quantize)
    found = []
    for part in torch.tensor(ids).split(LENGTH):
        (logits,) = packed_logits(model, [part.tolist()], config.block_size)
        found.append(-logits.double().log_softmax(1)[:-1].gather(1, part[1:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.slow
def test_the_perplexity_of_a_long_text_is_within_a_hundredth_of_float32s(real_folder: Path) -> None:
    pages = [ROOT / "README.md", ROOT / "docs/methods.md", ROOT / "LICENSE"]
    ids = Tokenizer(real_folder).encode("\n".join(page.read_text() for page in pages))
    ids = [*ids[: 8 * LENGTH], *ids[-2 * LENGTH :]]
    default = surprises(real_folder, EngineConfig(), ids)
    exact = surprises(real_folder, EngineConfig(dtype="float32", quantization="none"), ids)
    assert len(exact) == 10 * (LENGTH - 1)
    assert (default.mean() - exact.mean()).abs().expm1() < 0.01
