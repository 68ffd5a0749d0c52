"""The trace of each token in answers and streams, on both routes."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from engine.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.engines import info, scripted_core, tiny_core
from tests.support.logits import DIST_P
from tests.support.scripted import ScriptedModel
from tests.support.servers import asgi_client, live_server, make_app
from tests.support.wire import CHAT, COMPLETIONS, post_stream

BOTH = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
BYTES = "ab😀é€"  # all but the first two are several tokens
FIELDS = (
    "token_id",
    "token",
    "rank",
    "prob_before",
    "prob_after",
    "entropy",
    "varentropy",
    "temperature",
    "uniform",
    "stages",
    "top_before",
    "top_after",
)


def body_for(path: str, **changes: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "hello there"}]}
    asked = {"max_tokens": 8, "seed": 3, "ignore_eos": True, "return_token_ids": True}
    return (prompt if path == CHAT else {"prompt": "the hen"}) | asked | changes


def ask(client: httpx.Client, path: str, **changes: Any) -> dict[str, Any]:
    response = client.post(path, json=body_for(path, **changes))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ids_of(choice: dict[str, Any]) -> list[int]:
    return [one["token_id"] for one in choice["trace"]]


@BOTH
def test_each_token_has_a_trace_with_exactly_the_fields_of_the_contract(
    client: httpx.Client, path: str, tokenizer: Tokenizer
) -> None:
    shaped = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "n": 2}
    for wish in (True, {}, {"top": 3}, {"top": 3, "layers": [2, 0]}):
        answer = ask(client, path, trace=wish, **shaped)
        assert len(answer["choices"]) == 2
        for choice in answer["choices"]:
            assert ids_of(choice) == choice["token_ids"]
            assert len(choice["trace"]) == 8
            for one in choice["trace"]:
                layers = (
                    {"layers"} if "layers" in (wish if isinstance(wish, dict) else {}) else set()
                )
                assert one.keys() == {*FIELDS} | layers
                assert_sound(one, tokenizer, 3 if wish not in (True, {}) else 10)
                assert [layer["layer"] for layer in one.get("layers", [])] == [2, 0][
                    : 2 * len(layers)
                ]


def assert_sound(one: dict[str, Any], tokenizer: Tokenizer, top: int) -> None:
    """What must hold of any trace of a drawn token."""
    assert one["token"] == tokenizer.text_of(one["token_id"])
    assert 1 <= one["rank"] <= tiny.VOCAB
    assert 0 < one["prob_before"] <= one["prob_after"] <= 1
    assert 0 < one["uniform"] < 1
    assert one["temperature"] == pytest.approx(0.9)
    for stage in one["stages"]:
        assert stage.keys() == {"stage", "candidates", "removed"}
        assert 0 <= stage["removed"] < 1
        assert 1 <= stage["candidates"] <= tiny.VOCAB
    assert one["stages"][0]["stage"] == "temperature"
    lists = [
        one["top_before"],
        one["top_after"],
        *(layer["top"] for layer in one.get("layers", [])),
    ]
    for listed in lists:
        assert 1 <= len(listed) <= top
        probs = [entry["prob"] for entry in listed]
        assert probs == sorted(probs, reverse=True)
        assert sum(probs) < 1 + 1e-5
        for entry in listed:
            assert entry.keys() == {"token_id", "token", "prob"}
            assert entry["token"] == tokenizer.text_of(entry["token_id"])
    own = {entry["token_id"]: entry["prob"] for entry in one["top_before"]}
    if one["token_id"] in own:
        assert own[one["token_id"]] == pytest.approx(one["prob_before"], rel=1e-5)


@BOTH
def test_who_does_not_ask_gets_none_and_the_same_text(client: httpx.Client, path: str) -> None:
    shown = ask(client, path, trace=True)["choices"]
    for wish in (None, False):
        choices = ask(client, path, trace=wish)["choices"]
        assert all("trace" not in choice for choice in choices)
        for one in shown:
            one.pop("trace", None)
        assert choices == shown


def test_each_prompt_s_choices_have_their_own(client: httpx.Client) -> None:
    prompts = ["the", "he said", "on a hen"]
    together = ask(client, COMPLETIONS, prompt=prompts, n=2, trace=True)["choices"]
    alone = [
        choice
        for prompt in prompts
        for choice in ask(client, COMPLETIONS, prompt=prompt, n=2, trace=True)["choices"]
    ]
    assert [ids_of(choice) for choice in together] == [ids_of(choice) for choice in alone]
    for one, other in zip(together, alone, strict=True):
        assert_close(one["trace"], other["trace"])


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


def test_its_probabilities_are_those_of_the_logprobs(client: httpx.Client) -> None:
    (choice,) = ask(client, COMPLETIONS, trace=True, logprobs=3, temperature=1.3)["choices"]
    logprobs = choice["logprobs"]
    for one, own, top in zip(
        choice["trace"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert math.log(one["prob_before"]) == pytest.approx(own, abs=1e-4)
        named = {entry["token"]: entry["prob"] for entry in one["top_before"][:3]}
        assert named == {name: pytest.approx(math.exp(top[name]), abs=1e-5) for name in named}


def test_the_prompt_has_no_trace(client: httpx.Client) -> None:
    (choice,) = ask(client, COMPLETIONS, trace=True, echo=True, logprobs=1)["choices"]
    assert len(choice["logprobs"]["tokens"]) > 8
    assert ids_of(choice) == choice["token_ids"]
    (choice,) = ask(client, COMPLETIONS, trace=True, echo=True, max_tokens=0)["choices"]
    assert choice["trace"] == []


@BOTH
def test_a_greedy_token_was_certain(client: httpx.Client, path: str) -> None:
    (choice,) = ask(client, path, trace={"top": 1}, temperature=0, top_p=0.5)["choices"]
    for one in choice["trace"]:
        assert (one["temperature"], one["uniform"]) == (0, None)
        assert (one["rank"], one["prob_after"], one["stages"]) == (1, 1, [])
        assert one["top_before"][0]["token_id"] == one["token_id"]


# -- streams

CASES: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 1.2, "top_p": 0.9},
    "greedy": {"temperature": 0},
    "several choices": {"n": 3, "trace": {"top": 2, "layers": [1]}},
    "characters split over tokens": {"letters": BYTES, "max_tokens": 24},
    "stop strings": {"letters": "abc", "max_tokens": 24, "stop": ["abca", "cab", "bb"]},
    "a stop string never completed": {"letters": "ab", "stop": ["aaaaaaaaaaaab"]},
    "special tokens": {"letters": "ab", "logit_bias": {"2": 2}, "ignore_eos": True},
    "an end": {"letters": "ab", "logit_bias": {"2": 2}, "ignore_eos": False, "max_tokens": 24},
    "entropix": {"entropix": {"clarify_token": "a"}},
    "beams": {"use_beam_search": True, "beam_width": 3, "n": 2},
    "mirostat": {"mirostat": 2},
}


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_a_stream_carries_each_trace_with_its_token(
    client: httpx.Client, path: str, case: str, tokenizer: Tokenizer
) -> None:
    changes = {"trace": {"top": 3}} | CASES[case]
    if letters := changes.pop("letters", None):
        ids = {*tokenizer.encode(letters, add_special_tokens=False), 2}
        changes["allowed_token_ids"] = sorted(ids)
    whole = ask(client, path, **changes)["choices"]
    chunks = post_stream(client, path, body_for(path, **changes))
    parts: dict[int, list[Any]] = {choice["index"]: [] for choice in whole}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if path == COMPLETIONS or choice["delta"].keys() == {"content"}:
                assert ids_of(choice) == choice["token_ids"]
            parts[choice["index"]] += choice.get("trace", [])
    for choice in whole:
        assert choice["trace"]
        assert_close(parts[choice["index"]], choice["trace"])
        assert ids_of(choice) == choice["token_ids"]


@BOTH
def test_a_trace_alone_is_news_enough_for_a_chunk(client: httpx.Client, path: str) -> None:
    """A token without text is shown when it is drawn, not when text comes."""
    changes = {"allowed_token_ids": [2], "max_tokens": 5, "trace": True, "return_token_ids": None}
    chunks = post_stream(client, path, body_for(path, **changes))
    traces = [choice.get("trace") for chunk in chunks for choice in chunk["choices"]]
    assert sum(len(one) for one in traces if one) == 5
    assert max(len(one) for one in traces if one) < 5


# -- a trace that can be followed by hand


@pytest.fixture(scope="module")
def dice(tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    """A server whose model always says the same five tokens: 10 to 14."""
    row = torch.full((tiny.VOCAB,), -torch.inf)
    row[10:15] = DIST_P
    core = scripted_core(ScriptedModel(lambda _token, _position: row.clone()), tokenizer)
    app = make_app(lambda: (core, info(core)))
    with (
        live_server(app) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=30) as client,
    ):
        yield client


@BOTH
def test_the_worked_distribution_goes_over_the_wire_as_it_is(
    dice: httpx.Client, path: str, tokenizer: Tokenizer
) -> None:
    shaped: dict[str, Any] = {"temperature": 2, "min_p": 0.3, "sampler_order": "llama.cpp"}
    (choice,) = ask(dice, path, max_tokens=1, trace={"top": 4}, **shaped)["choices"]
    (one,) = choice["trace"]
    roots = [math.sqrt(p) for p in (0.4, 0.3, 0.15)]
    after = [root / sum(roots) for root in roots]
    place = one["token_id"] - 10
    assert place in (0, 1, 2)

    def listed(probs: list[float]) -> list[dict[str, Any]]:
        return [
            {"token_id": i, "token": tokenizer.text_of(i), "prob": pytest.approx(p, abs=1e-6)}
            for i, p in enumerate(probs, 10)
        ]

    assert 0 < one.pop("uniform") < 1
    assert one == {
        "token_id": 10 + place,
        "token": tokenizer.text_of(10 + place),
        "rank": place + 1,
        "prob_before": pytest.approx((0.4, 0.3, 0.15)[place], abs=1e-6),
        "prob_after": pytest.approx(after[place], abs=1e-6),
        "entropy": pytest.approx(1.392321, abs=1e-6),
        "varentropy": pytest.approx(0.350912, abs=1e-6),
        "temperature": 2.0,
        "stages": [
            {"stage": "min_p", "candidates": 3, "removed": pytest.approx(0.15, abs=1e-6)},
            {"stage": "temperature", "candidates": 3, "removed": 0.0},
        ],
        "top_before": listed([0.4, 0.3, 0.15, 0.1]),
        "top_after": listed(after),
    }


# -- what is refused


@BOTH
@pytest.mark.parametrize(
    ("wish", "param", "code"),
    [
        ({"top": 0}, "trace.top", "invalid_value"),
        ({"top": 101}, "trace.top", "invalid_value"),
        ({"top": "3"}, "trace.top", "invalid_type"),
        ({"layers": [3]}, "trace.layers", "invalid_value"),
        ({"layers": [-1]}, "trace.layers", "invalid_value"),
        ({"layers": [0] * 257}, "trace.layers", "invalid_value"),
        ({"layer": [0]}, "trace.layer", "invalid_value"),
        (7, "trace", "invalid_type"),
    ],
)
def test_wishes_that_cannot_be_are_refused(
    client: httpx.Client, path: str, wish: Any, param: str, code: str
) -> None:
    response = client.post(path, json=body_for(path, trace=wish))
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


@pytest.mark.anyio
async def test_a_model_whose_layers_cannot_be_read_says_so(tmp_path: Path) -> None:
    """One without a norm behind its layers; all else of a trace it can give."""
    folder = tiny.save(tiny.hf_model("opt-projected"), tmp_path)
    async with asgi_client(make_app(lambda: tiny_core(folder))) as client:
        refused = await client.post(COMPLETIONS, json=body_for(COMPLETIONS, trace={"layers": [1]}))
        plain = await client.post(COMPLETIONS, json=body_for(COMPLETIONS, trace=True))
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == ("trace.layers", "unsupported_parameter")
    assert len(plain.json()["choices"][0]["trace"]) == 8
    json.dumps(plain.json(), allow_nan=False)
