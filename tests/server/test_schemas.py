"""Fields that are known but not supported, and the schema of the rest."""

from typing import Any

import httpx
import pytest

from engine.params import SamplingParams
from server.schemas import ALIASES, UNSUPPORTED, ChatCompletionRequest, CompletionRequest
from tests.support.wire import CHAT, COMPLETIONS

BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": [5], "max_tokens": 1},
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
}
# What some other server would let a client ask for, and what would change the output.
ELSEWHERE = {
    *("structured_outputs", "response_format", "guided_json", "guided_regex", "guided_choice"),
    *("guided_grammar", "regex", "ebnf", "json_schema", "grammar", "stop_regex"),
    *("use_beam_search", "beam_width", "num_beams", "length_penalty", "early_stopping"),
    *("num_beam_groups", "diversity_penalty", "penalty_alpha", "dola_layers", "guidance_scale"),
    *("dynatemp_range", "dynatemp_exponent", "mirostat", "mirostat_tau", "mirostat_eta"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
    *("dry_sequence_breakers", "xtc_probability", "xtc_threshold", "tfs", "top_a", "samplers"),
    *("prompt_embeds", "logprob_token_ids", "custom_logit_processor", "lora_path", "watermark"),
    *("thinking_token_budget", "repetition_detection", "t_max_predict_ms", "n_keep"),
    *("return_hidden_states", "negative_prompt"),
}
ASKING = ({"some": "thing"}, 0.77)  # neutral for no field
NEUTRAL = [(name, value) for name, values in UNSUPPORTED.items() for value in (None, *values)]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_field_that_cannot_be_honoured_is_refused_by_name(
    client: httpx.Client, path: str, name: str
) -> None:
    for value in ASKING:
        response = client.post(path, json=BODIES[path] | {name: value})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert error["message"].startswith(name)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("name", "value"), NEUTRAL)
def test_a_value_that_asks_for_nothing_is_accepted(
    client: httpx.Client, path: str, name: str, value: Any
) -> None:
    response = client.post(path, json=BODIES[path] | {name: value})

    assert response.status_code == 200
    assert "x-ignored-fields" not in response.headers


def test_no_constraint_of_another_server_is_dropped_in_silence() -> None:
    for model in (CompletionRequest, ChatCompletionRequest):
        assert UNSUPPORTED.keys() | ALIASES.keys() | model.model_fields.keys() >= ELSEWHERE


def test_no_field_is_both_supported_and_refused() -> None:
    supported = {*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields}

    assert not supported & UNSUPPORTED.keys()
    assert not supported & ALIASES.keys()
    assert set(ALIASES.values()) <= supported


def test_every_sampling_parameter_is_a_field_of_both_routes() -> None:
    for model in (CompletionRequest, ChatCompletionRequest):
        assert model.model_fields.keys() >= SamplingParams.model_fields.keys()


def test_every_field_says_what_it_is_for() -> None:
    for model in (CompletionRequest, ChatCompletionRequest):
        for name, field in model.model_fields.items():
            assert field.description, name
