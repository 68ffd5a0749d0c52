"""Every family against Hugging Face: the logits of a pass, and what greedy search says."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core import EngineCore
from engine.errors import ModelUnavailable
from engine.models.decoder import Decoder
from engine.models.transformers import TransformersModel
from engine.prepare import ModelInfo
from tests.support import tiny
from tests.support.engines import assert_all_free, request, run, tiny_core
from tests.support.packed import packed_logits

# Beyond the sliding windows (7) and the blocks (4), of lengths that end anywhere in a block.
PROMPTS = [
    [(index * step + 5) % (tiny.VOCAB - 3) + 3 for index in range(length)]
    for length, step in ((1, 1), (6, 7), (13, 11), (22, 3))
]
NEW_TOKENS = 12


@dataclass
class Pair:
    """The same weights in Hugging Face's hands and in ours."""

    family: str
    hf: Any
    core: EngineCore
    info: ModelInfo


def lively(hf: Any) -> Any:
    """With biases that are not zero and norms that are not one, so that each has to be right."""
    generator = torch.Generator().manual_seed(1)
    for parameter in hf.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return hf


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    hf = lively(tiny.hf_model(request.param))
    folder = tiny.save(hf, tmp_path_factory.mktemp(request.param))
    # 8 tokens a step: prompts are cut into chunks, beside sequences that already decode.
    core, info = tiny_core(folder, max_batch_tokens=8, max_num_seqs=8)
    return Pair(request.param, hf, core, info)


def test_llama_shaped_models_take_the_fast_path_and_the_rest_their_own_code(pair: Pair) -> None:
    wanted = Decoder if pair.family in tiny.LLAMA_SHAPED else TransformersModel
    assert type(pair.core.model) is wanted
    assert pair.info.model_type == pair.hf.config.model_type


@torch.inference_mode()
def test_logits_of_packed_sequences_equal_a_pass_over_each(pair: Pair) -> None:
    got = packed_logits(pair.core.model, PROMPTS)
    for ids, logits in zip(PROMPTS, got, strict=True):
        want = pair.hf(torch.tensor([ids])).logits[0]
        assert logits.dtype == torch.float32
        # Sums in another order; the logits reach into the hundreds.
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_greedy_text_of_a_crowd_equals_generate_for_each(pair: Pair) -> None:
    core = pair.core
    requests = [
        request(core, ids, str(index), max_tokens=NEW_TOKENS, ignore_eos=True)
        for index, ids in enumerate(PROMPTS)
    ]
    results = run(core, *requests)
    for index, ids in enumerate(PROMPTS):
        assert results.ids(str(index)) == greedy(pair.hf, ids), f"prompt {index}"
    assert_all_free(core)


def greedy(hf: Any, ids: list[int]) -> list[int]:
    hf.generation_config.eos_token_id = None  # both go on past it
    out = hf.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    new: list[int] = out[0, len(ids) :].tolist()
    return new


@pytest.mark.parametrize("family", tiny.REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.hf_model(family), tmp_path)
    with pytest.raises(ModelUnavailable, match=tiny.REFUSED[family][2]) as refusal:
        tiny_core(folder)
    assert "\n" not in str(refusal.value)
    assert json.loads((folder / "config.json").read_text())["model_type"] in str(refusal.value)
