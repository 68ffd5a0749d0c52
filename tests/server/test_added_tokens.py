"""A folder whose tokenizer has tokens that its model has no rows of logits for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import ModelUnavailable
from tests.support import tiny
from tests.support.engines import tiny_core
from tests.support.servers import live_server, make_app
from tests.support.wire import COMPLETIONS

ADDED = ["<end>", "<think>", "<sep>"]
BASE = {"prompt": "hello", "max_tokens": 8, "temperature": 1.0, "seed": 5}
SED = {"eval_prompt": "ok?", "verdict_tokens": ["y", "n"], "rollout_tokens": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune that added three tokens, one of them its end, and kept the model's size."""
    folder = tmp_path_factory.mktemp("added")
    model = tiny.hf_model("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = [2, tiny.VOCAB]
    tiny.save(model, folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED, "eos_token": "<end>"})
    assert tokenizer.convert_tokens_to_ids(ADDED) == [tiny.VOCAB + i for i in range(3)]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    with (
        live_server(make_app(lambda: tiny_core(folder))) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
    ):
        yield client


def test_an_end_without_a_row_is_none_of_the_models(folder: Path) -> None:
    assert tiny_core(folder)[1].eos_token_ids == {2}


@pytest.mark.parametrize(
    "wish",
    [
        {"min_tokens": 4},
        {"stop": ["<think>"], "min_tokens": 4},
        {"stop": ["<think>", "<end>"], "eos_length_penalty": 0.5},
        {"eos_length_penalty": 0.5},
        {"exponential_decay_length_penalty": [2, 1.5]},
        {"bad_words": ["<sep>", "a<sep>b", "e"]},
        {"ignore_eos": True, "stop": ["<end>"]},
        {"use_beam_search": True, "beam_width": 3, "min_tokens": 4},
        {"use_beam_search": True, "beam_width": 3, "stop": ["<end>"], "min_tokens": 4},
        {"xtc_probability": 1.0, "xtc_threshold": 0.01},
        {"dry_multiplier": 1.0, "dry_sequence_breakers": ["<sep>", "\n"]},
        {"logprobs": 5, "prompt_logprobs": 5, "return_tokens_as_token_ids": True},
    ],
    ids=str,
)
def test_what_can_never_be_generated_is_left_out(
    wish: dict[str, Any], client: httpx.Client
) -> None:
    answer = client.post(COMPLETIONS, json=BASE | wish)
    assert answer.status_code == 200, answer.text
    assert client.post(COMPLETIONS, json=BASE).status_code == 200


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"prompt": "a<sep>b"}, "prompt"),
        ({"prompt": [5, tiny.VOCAB]}, "prompt"),
        ({"stop_token_ids": [tiny.VOCAB]}, "stop_token_ids"),
        ({"logit_bias": {str(tiny.VOCAB): 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [5, tiny.VOCAB]}, "allowed_token_ids"),
        ({"pause_token": "<sep>", "num_pause_tokens": 2}, "pause_token"),
        ({"entropix": {"clarify_token": "<sep>"}}, "entropix.clarify_token"),
        ({"sed": SED | {"eval_prompt": "<sep>?"}}, "sed.eval_prompt"),
        ({"sed": SED | {"verdict_tokens": ["<think>", "n"]}}, "sed.verdict_tokens"),
        ({"guidance_scale": 2.0, "negative_prompt": "<sep>"}, "negative_prompt"),
        ({"kl_bandwidth": 1.0, "kl_reference_prompt": "<sep>"}, "kl_reference_prompt"),
    ],
    ids=str,
)
def test_what_the_model_would_have_to_read_is_refused(
    wish: dict[str, Any], param: str, client: httpx.Client
) -> None:
    answer = client.post(COMPLETIONS, json=BASE | wish)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, "invalid_token_id")
    assert client.post(COMPLETIONS, json=BASE).status_code == 200


def test_an_amateur_with_fewer_rows_is_refused(tmp_path: Path) -> None:
    large = tiny.save(tiny.hf_model("llama"), tmp_path / "large")
    small = tiny.save(tiny.hf_model("llama", vocab_size=tiny.VOCAB - 1), tmp_path / "small")
    with pytest.raises(ModelUnavailable, match="small has logits for 127 tokens, and the model fo"):
        tiny_core(large, ("small", small))
