"""The generic path: how logits are scaled, what it learns of a model, and when it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.errors import ModelUnavailable
from engine.models.transformers import TransformersModel
from tests.support import tiny
from tests.support.engines import tiny_core
from tests.support.packed import packed_logits

PROMPTS = [[5, 9, 33, 12, 77, 8, 61, 90, 14], [64, 7]]


def loaded(hf: Any, folder: Path, dtype: str = "float32") -> TransformersModel:
    core, _ = tiny_core(tiny.save(hf, folder), dtype=dtype)
    assert isinstance(core.model, TransformersModel)
    return core.model


@pytest.mark.parametrize(
    ("family", "scaled"),
    [
        ("gemma2", lambda logits: torch.tanh(logits / 30.0) * 30.0),
        ("cohere", lambda logits: logits * 0.5),
        ("granite", lambda logits: logits / 4.0),
        ("phi", lambda logits: logits),  # its head has a bias
    ],
)
@torch.inference_mode()
def test_logits_get_the_scaling_of_their_family(family: str, scaled: Any, tmp_path: Path) -> None:
    hf = tiny.hf_model(family)
    model = loaded(hf, tmp_path)
    hidden = 5 * torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.logits(hidden), scaled(hf.lm_head(hidden)))


@pytest.mark.parametrize("family", ["gemma3", "phi", "gpt2", "olmo2"])
def test_in_bfloat16_the_logits_are_still_float32(family: str, tmp_path: Path) -> None:
    hf = tiny.hf_model(family)
    narrow = packed_logits(loaded(hf, tmp_path, "bfloat16"), PROMPTS)
    for ids, got in zip(PROMPTS, narrow, strict=True):
        with torch.inference_mode():
            want = hf(torch.tensor([ids])).logits[0]
        assert got.dtype == torch.float32
        assert (got != got.bfloat16().float()).float().mean() > 0.9  # not merely widened
        error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < 0.1  # 8 bits of mantissa, through two layers of large random weights


def test_a_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    model = loaded(tiny.hf_model("gpt2"), tmp_path)
    model._model.get_input_embeddings().weight.data.zero_()
    assert not model.logits(torch.ones(2, 64)).any()


def test_each_layers_keys_and_values_have_their_own_shape(tmp_path: Path) -> None:
    shapes = loaded(tiny.hf_model("deepseek-v3"), tmp_path).kv_shapes
    assert [(shape.heads, shape.key_dim, shape.value_dim) for shape in shapes] == [(4, 24, 16)] * 2


def test_angles_that_change_with_the_length_bound_the_context(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    }
    more = {"rope_scaling": rope, "original_max_position_embeddings": 64}
    values = tiny.GENERIC["phi3"][1] | more
    torch.manual_seed(0)
    hf = transformers.Phi3ForCausalLM(transformers.Phi3Config(**values)).eval()
    model = loaded(hf, tmp_path)
    assert model.context_len == 64  # the config says 256
    prompt = [(7 * index) % 120 + 3 for index in range(64)]
    with torch.inference_mode():
        want = hf(torch.tensor([prompt])).logits[0]
    (got,) = packed_logits(model, [prompt])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_a_window_that_attention_is_not_told_of_is_refused(tmp_path: Path) -> None:
    hf = tiny.hf_model("stablelm")
    hf.config.sliding_window = 7  # which its code knows nothing about
    with pytest.raises(ModelUnavailable, match="stablelm does not tell the attention function"):
        loaded(hf, tmp_path)


def test_two_models_in_one_process_do_not_mix_up_their_steps(tmp_path: Path) -> None:
    models = [
        loaded(tiny.hf_model("phi", seed), tmp_path / str(seed), "float32") for seed in (0, 1)
    ]
    alone = [packed_logits(model, PROMPTS) for model in models]
    again = [packed_logits(model, PROMPTS) for model in reversed(models)]
    for one, two in zip(alone, reversed(again), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])
