"""What makes a config Llama-shaped, and what the fast path does with its weights."""

from pathlib import Path

import pytest
import torch
import transformers

from engine.models import llama
from engine.models.decoder import Decoder, paired
from tests.support import tiny
from tests.support.engines import tiny_core
from tests.support.packed import packed_logits

PROMPTS = [[5, 9, 33, 12, 77, 8, 61, 90, 14], [64, 7]]


def decoder(family: str, folder: Path, dtype: str = "float32") -> Decoder:
    core, _ = tiny_core(tiny.save(tiny.hf_model(family), folder), dtype=dtype)
    assert isinstance(core.model, Decoder)
    return core.model


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"hidden_act": "gelu"}, False),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, True),
        # Its angles change with the length of the sequence.
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 64,
                }
            },
            False,
        ),
    ],
)
def test_only_what_the_decoder_computes_fits(changes: dict[str, object], fits: bool) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64, **changes)
    config.num_attention_heads = 4
    assert llama.fits(config) is fits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_a_tied_head_is_the_embedding_itself(dtype: str, tmp_path: Path) -> None:
    model = decoder("llama-tied", tmp_path, dtype)
    assert model.logits(torch.ones(2, 64)).any()
    model.embedding.zero_()
    assert not model.logits(torch.ones(2, 64)).any()


@torch.inference_mode()
def test_an_untied_head_is_not(tmp_path: Path) -> None:
    model = decoder("llama", tmp_path)
    model.embedding.zero_()
    assert model.logits(torch.ones(2, 64)).any()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "mistral-sliding"])
def test_in_bfloat16_the_logits_are_still_float32(family: str, tmp_path: Path) -> None:
    wide = packed_logits(decoder(family, tmp_path / "wide"), PROMPTS)
    narrow = packed_logits(decoder(family, tmp_path / "narrow", "bfloat16"), PROMPTS)
    for want, got in zip(wide, narrow, strict=True):
        assert got.dtype == torch.float32
        assert (got != got.bfloat16().float()).float().mean() > 0.9  # not merely widened
        error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < 0.1  # 8 bits of mantissa, through two layers of large random weights


def test_pairs_that_turn_together_become_neighbours() -> None:
    rows = torch.arange(2 * 8).view(16, 1)  # two heads of eight
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert paired(rows, 8).flatten().tolist() == order + [8 + row for row in order]
