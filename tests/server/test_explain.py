"""POST /v1/explain: the traces of a given text, and what is refused."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.params import SamplingParams
from engine.tokenizer import Tokenizer
from server.inputs import NEED_MORE
from server.schemas import ExplainedPosition, Explanation
from tests.support import tiny
from tests.support.engines import tiny_core
from tests.support.logits import STRATEGIES, asking
from tests.support.servers import asgi_client, make_app
from tests.support.wire import COMPLETIONS

EXPLAIN = "/v1/explain"
LAYERS = {"top": 5, "layers": [0, 2]}


def explain(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post(EXPLAIN, json={"prompt": "the hen", "seed": 1} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def generate(client: httpx.Client, **body: Any) -> dict[str, Any]:
    asked = {"max_tokens": 12, "ignore_eos": True, "return_token_ids": True, "trace": LAYERS}
    response = client.post(COMPLETIONS, json={"prompt": "the hen", "seed": 1} | asked | body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def positions_of(answer: dict[str, Any]) -> list[int]:
    return [one["position"] for one in answer["positions"]]


def assert_close(got: Any, want: Any) -> None:
    """The same but for rounding."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for name in want:
            assert_close(got[name], want[name])
    elif isinstance(want, list):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_close(one, other)
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-6)
    else:
        assert got == want


# -- the answer


def test_an_answer_has_exactly_the_fields_of_the_contract(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    response = client.post(
        EXPLAIN,
        json={"prompt": "the hen", "continuation": " is"},
        headers={"X-Request-Id": "one"},
    )
    answer = response.json()
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in ("the hen", " is")]
    assert response.headers["x-request-id"] == "one"
    assert answer.keys() == get_fields(Explanation)
    assert (answer["id"], answer["object"]) == ("explain-one", "explanation")
    assert answer["model"] == "tiny"
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["created"] > 1_700_000_000
    assert answer["token_ids"] == [*ids[0], *ids[1]]
    assert answer["usage"] == {
        "prompt_tokens": len(ids[0]) + len(ids[1]),
        "completion_tokens": 0,
        "total_tokens": len(ids[0]) + len(ids[1]),
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    for place, one in enumerate(answer["positions"], len(ids[0])):
        assert one.keys() == get_fields(ExplainedPosition)
        assert (one["position"], one["forced"]) == (place, True)
        assert one["trace"]["token_id"] == answer["token_ids"][place]
        assert len(one["trace"]["top_before"]) == 10
        assert "layers" not in one["trace"]


def get_fields(kind: Any) -> set[str]:
    return set(kind.__annotations__)


KINDS: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 1.2, "top_p": 0.9},
    "greedy": {"temperature": 0, "frequency_penalty": 0.5},
    "penalties": {"dry_multiplier": 0.8, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
    "feedback": {"mirostat": 2, "mirostat_tau": 3, "dola_layers": [0, 1]},
    "entropix": {"entropix": {"clarify_token": "a"}},
    "least": {"min_tokens": 9, "ignore_eos": False, "logit_bias": {"2": 6}},
    "order": {"sampler_order": "llama.cpp", "xtc_probability": 0.5, "dynatemp_range": 0.3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_of_a_drawn_text_what_was_said_when_it_was_drawn(
    client: httpx.Client, kind: str, tokenizer: Tokenizer
) -> None:
    choice = generate(client, **KINDS[kind])
    prompt = tokenizer.encode("the hen")
    shaped = {"trace": LAYERS} | KINDS[kind]
    ids, start = choice["token_ids"], len(prompt)
    answer = explain(client, continuation=ids, **shaped)
    assert positions_of(answer) == [*range(start, start + len(ids))]
    assert_close([one["trace"] for one in answer["positions"]], choice["trace"])
    # The last one again, not given but drawn, and some of those before it.
    places = [start + len(ids) - 1, start, start + 3, start]
    answer = explain(client, continuation=ids[:-1], positions=places, **shaped)
    assert positions_of(answer) == [start, start + 3, start + len(ids) - 1]
    assert [one["forced"] for one in answer["positions"]] == [True, True, False]
    want = [choice["trace"][0], choice["trace"][3], choice["trace"][-1]]
    assert_close([one["trace"] for one in answer["positions"]], want)


def test_without_a_continuation_it_is_the_token_behind_the_prompt(client: httpx.Client) -> None:
    choice = generate(client, max_tokens=1)
    answer = explain(client, trace=LAYERS)
    (one,) = answer["positions"]
    assert (one["position"], one["forced"]) == (len(answer["token_ids"]), False)
    assert_close(one["trace"], choice["trace"][0])


def test_positions_of_the_prompt_are_those_of_shorter_prompts(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("the hen in the tent")
    answer = explain(client, prompt=ids, positions=[*range(1, len(ids) + 1)], top_k=9)
    assert positions_of(answer) == [*range(1, len(ids) + 1)]
    for one in answer["positions"]:
        place = one["position"]
        assert one["forced"] == (place < len(ids))
        (drawn,) = explain(client, prompt=ids[:place], top_k=9)["positions"]
        shared = ("entropy", "varentropy", "temperature", "stages", "top_before", "top_after")
        for name in shared:
            assert_close(one["trace"][name], drawn["trace"][name])
        if one["forced"]:
            assert one["trace"]["token_id"] == ids[place]
            left = {entry["token_id"]: entry["prob"] for entry in drawn["trace"]["top_after"]}
            # Nine are left, and all of them listed.
            assert one["trace"]["prob_after"] == pytest.approx(left.get(ids[place], 0), abs=1e-6)


def test_a_token_that_was_not_to_come_had_no_probability(client: httpx.Client) -> None:
    for shaped in ({"temperature": 0}, {"top_k": 1}):
        (drawn,) = explain(client, **shaped)["positions"]
        best = drawn["trace"]["token_id"]
        for token in (best, (best + 1) % tiny.VOCAB):
            (one,) = explain(client, continuation=[token], **shaped)["positions"]
            assert one["trace"]["prob_after"] == pytest.approx(float(token == best))
            assert one["trace"]["prob_before"] < 1
            assert (one["trace"]["rank"] == 1) == (token == best)


def test_texts_and_ids_are_the_same(client: httpx.Client, tokenizer: Tokenizer) -> None:
    forms: list[Any] = ["the hen", tokenizer.encode("the hen")]
    behind: list[Any] = [" is", tokenizer.encode(" is", add_special_tokens=False)]
    answers = [
        explain(client, prompt=one, continuation=other)["positions"]
        for one in forms
        for other in behind
    ]
    assert len(answers[0]) > 1
    for answer in answers[1:]:
        assert_close(answer, answers[0])


def test_nothing_is_generated_whatever_is_asked_for(client: httpx.Client) -> None:
    want = explain(client, continuation=" is")
    for more in ({"max_tokens": 50}, {"n": 3, "best_of": 4}, {"stop": [" "]}):
        got = explain(client, continuation=" is", **more)
        assert_close(got["positions"], want["positions"])
        assert got["usage"]["completion_tokens"] == 0


def test_a_prompt_that_is_cached_is_explained_all_the_same(client: httpx.Client) -> None:
    ids = [9, 10, 11, 12, 13] * 5
    client.post(COMPLETIONS, json={"prompt": ids, "max_tokens": 2}).raise_for_status()
    places = [1, 7, 20, 25]
    answers = [explain(client, prompt=ids, positions=places, trace=LAYERS) for _ in range(2)]
    assert positions_of(answers[0]) == places
    assert_close(answers[1]["positions"], answers[0]["positions"])


@pytest.mark.anyio
async def test_long_texts_come_in_parts_and_reach_to_the_end_of_the_context(
    tiny_folder: Path,
) -> None:
    ids = [3 + (7 * index) % 120 for index in range(256)]
    places = [*range(1, 256, 5), 256]
    body = {"prompt": ids[:100], "continuation": ids[100:], "positions": places, "seed": 1}
    body |= {"trace": {"top": 2, "layers": [1]}, "mirostat": 2}
    found = []
    for budget in (16, 512):
        app = make_app(lambda budget=budget: tiny_core(tiny_folder, max_batch_tokens=budget))
        async with asgi_client(app) as client:
            response = await client.post(EXPLAIN, json=body)
            assert response.status_code == 200, response.text
            found.append(response.json()["positions"])
            too_long = await client.post(EXPLAIN, json=body | {"prompt": ids[:101]})
            error = too_long.json()["error"]
            assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert [one["position"] for one in found[0]] == places
    assert [one["forced"] for one in found[0]] == [True] * 51 + [False]
    assert_close(found[0], found[1])


# -- what is refused


def refused(client: httpx.Client, **body: Any) -> tuple[str | None, str | None]:
    """The param and code of a 400."""
    given = {"prompt": "the hen"} | body
    response = client.post(EXPLAIN, json={k: v for k, v in given.items() if v is not ...})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["param"], error["code"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": ...}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_type"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": ["the", "hen"]}, "prompt", "invalid_type"),
        ({"prompt": [5, tiny.VOCAB]}, "prompt", "invalid_token_id"),
        ({"continuation": [5, tiny.VOCAB]}, "continuation", "invalid_token_id"),
        ({"continuation": [-1]}, "continuation", "invalid_token_id"),
        ({"continuation": 5}, "continuation", "invalid_type"),
        ({"positions": []}, "positions", "invalid_value"),
        ({"positions": 3}, "positions", "invalid_type"),
        ({"positions": ["3"]}, "positions[0]", "invalid_type"),
        ({"positions": [1.5]}, "positions[0]", "invalid_type"),
        ({"positions": [2, 0]}, "positions[1]", "invalid_value"),
        ({"positions": [-1]}, "positions[0]", "invalid_value"),
        ({"positions": [1, 2, 6]}, "positions[2]", "invalid_value"),
        ({"positions": [2**70]}, "positions[0]", "invalid_value"),
        ({"trace": False}, "trace", "invalid_value"),
        ({"trace": {"top": 101}}, "trace.top", "invalid_value"),
        ({"trace": {"layers": [3]}}, "trace.layers", "invalid_value"),
        ({"grammar": "root"}, "grammar", "unsupported_parameter"),
        ({"top_p": 2}, "top_p", "invalid_value"),
        ({"mirostat": 2, "top_p": 0.9}, "mirostat", "incompatible_parameters"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    client: httpx.Client, body: dict[str, Any], param: str, code: str
) -> None:
    assert refused(client, **body) == (param, code)


def test_the_place_behind_the_text_is_the_last(client: httpx.Client) -> None:
    end = len(explain(client, continuation=" is")["token_ids"])
    assert positions_of(explain(client, continuation=" is", positions=[end])) == [end]
    assert refused(client, continuation=" is", positions=[end + 1]) == (
        "positions[0]",
        "invalid_value",
    )


@pytest.mark.parametrize("name", NEED_MORE)
def test_what_needs_more_sequences_is_refused_by_name(client: httpx.Client, name: str) -> None:
    assert refused(client, **asking(name)) == (name, "unsupported_parameter")


def test_all_that_needs_more_sequences_or_tokens_is_refused() -> None:
    """Whatever field says so: but for several samples, of which one is explained."""
    for name in [*STRATEGIES, "guidance_scale", "cd_amateur", "kl_bandwidth"]:
        params = SamplingParams.model_validate(asking(name))
        hidden = params.num_pause_tokens or params.num_latent_thoughts
        if params.num_sequences > 1 or params.has_companion or params.sed or hidden:
            sampled = name in ("n", "best_of")
            assert sampled != any(params.asks(one) for one in NEED_MORE), name


def test_unknown_fields_are_named_or_refused(client: httpx.Client) -> None:
    response = client.post(EXPLAIN, json={"prompt": "the", "unheard": 1, "stream": True})
    assert response.headers["x-ignored-fields"] == "stream, unheard"
    assert response.headers["content-type"] == "application/json"
    assert response.json()["positions"]


@pytest.mark.anyio
async def test_a_strict_server_refuses_unknown_fields(tiny_folder: Path) -> None:
    app = make_app(lambda: tiny_core(tiny_folder), strict_params=True)
    async with asgi_client(app) as client:
        response = await client.post(EXPLAIN, json={"prompt": "the", "unheard": 1})
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("unheard", "unknown_parameter")


def test_another_model_is_not_found(client: httpx.Client) -> None:
    response = client.post(EXPLAIN, json={"prompt": "the", "model": "other"})
    want = client.post(COMPLETIONS, json={"prompt": "the", "model": "other"})
    assert (response.status_code, response.json()) == (want.status_code, want.json())
    assert response.status_code == 404
