"""Streams: the same answer in pieces, and the form of the pieces."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from engine.tokenizer import Tokenizer
from tests.support.engines import info, scripted_core
from tests.support.gated import GatedModel
from tests.support.scripted import ScriptedModel, sequence
from tests.support.servers import live_server, make_app
from tests.support.wire import CHAT, COMPLETIONS, assembled, comparable, events, post_stream

HELLO = [{"role": "user", "content": "hello there"}]
BYTES = "ab😀é€"  # all but the first two are several tokens

SHARED: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0},
    "several choices": {"n": 3},
    "characters split over tokens": {"letters": BYTES},
    "stop strings split over tokens": {"letters": "abc", "stop": ["abca", "cab", "bb"]},
    "stop strings kept": {
        "letters": "abc",
        "stop": ["abca", "cab", "bb"],
        "include_stop_str_in_output": True,
    },
    "stop strings of split characters": {"letters": BYTES, "stop": ["é", "😀b", "€€"], "n": 2},
    "stop strings that overlap": {"letters": "ab", "stop": ["aab", "ab", "baa"], "min_tokens": 6},
    "stop string never completed": {"letters": "ab", "stop": ["aaaaaaaaaaaaab"], "max_tokens": 9},
    "stop token": {"letters": "ab", "stop_token_ids": [66, 68]},
    "special token as stop string": {"letters": "ab", "ends": True, "stop": ["</s>"]},
    "end of sequence": {"letters": "ab", "ends": True},
    "end of sequence ignored": {"letters": "ab", "ends": True, "ignore_eos": True},
    "special tokens shown": {
        "letters": "ab",
        "ends": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
    },
    "token ids": {"letters": BYTES, "return_token_ids": True},
    "token ids and a stop string": {"letters": "ab", "return_token_ids": True, "stop": ["aab"]},
    "truncated prompt": {"truncate_prompt_tokens": 2, "return_token_ids": True},
}
ONLY_COMPLETIONS: dict[str, dict[str, Any]] = {
    "echo": {"echo": True},
    "echo of half a character": {"prompt": [66, 106, 107], "echo": True, "letters": BYTES},
    "several prompts": {"prompt": ["the", "he said", "on"], "n": 2, "echo": True},
    "prompts of token ids": {"prompt": [[5, 6, 7], [8], [66, 67]], "return_token_ids": True},
    "no generation": {"max_tokens": 0, "echo": True},
    "names by id": {"letters": BYTES, "return_tokens_as_token_ids": True},
}
CASES = [
    (path, name)
    for path, cases in ((COMPLETIONS, SHARED | ONLY_COMPLETIONS), (CHAT, SHARED))
    for name in cases
]


def body_for(path: str, changes: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A request; `letters` limits it to their tokens, and `ends` allows an end too."""
    body: dict[str, Any] = {"max_tokens": 24, **changes}
    if letters := body.pop("letters", None):
        ids = tokenizer.encode(letters, add_special_tokens=False)
        body["allowed_token_ids"] = sorted({*ids, *([2] if body.pop("ends", False) else [])})
    if path == CHAT:
        return {"messages": HELLO} | body
    return {"prompt": "the hen"} | body


Pair = tuple[httpx.Response, list[dict[str, Any]]]  # unstreamed and streamed


@pytest.fixture(scope="module")
def answers(client: httpx.Client, tokenizer: Tokenizer) -> dict[tuple[str, str], list[Pair]]:
    """Every case asked for in both ways, with different seeds, all at the same time."""

    def ask(case: tuple[str, str], seed: int) -> Pair:
        path, name = case
        body = body_for(path, (SHARED | ONLY_COMPLETIONS)[name], tokenizer) | {"seed": seed}
        if seed:
            body |= {"logprobs": 2} if path == COMPLETIONS else {"logprobs": True}
            body |= {"top_logprobs": 2} if path == CHAT else {}
        # Salts, or the second answer would report cached tokens.
        whole = client.post(path, json=body | {"cache_salt": f"{name} {seed}"})
        options = {"stream_options": {"include_usage": True}, "cache_salt": f"{name} {seed} again"}
        return whole, post_stream(client, path, body | options)

    asked = [(case, seed) for case in CASES for seed in range(3)]
    with ThreadPoolExecutor(16) as pool:
        pairs = pool.map(lambda one: ask(*one), asked)
        answers: dict[tuple[str, str], list[Pair]] = {case: [] for case in CASES}
        for (case, _), pair in zip(asked, pairs, strict=True):
            answers[case].append(pair)
    return answers


@pytest.mark.parametrize("case", CASES, ids=[f"{p.split('/')[2]}, {name}" for p, name in CASES])
def test_a_stream_adds_up_to_the_unstreamed_answer(
    answers: dict[tuple[str, str], list[Pair]], case: tuple[str, str]
) -> None:
    for whole, chunks in answers[case]:
        assert whole.status_code == 200
        assert comparable(assembled(chunks)) == comparable(whole.json())


def test_a_stop_string_is_never_seen_in_part(client: httpx.Client, tokenizer: Tokenizer) -> None:
    seen = 0
    for seed in range(10):
        body = body_for(COMPLETIONS, {"letters": "abc", "stop": ["abab", "cc"]}, tokenizer)
        chunks = post_stream(client, COMPLETIONS, body | {"seed": seed, "max_tokens": 60})
        texts = [chunk["choices"][0]["text"] for chunk in chunks]
        if chunks[-1]["choices"][0]["stop_reason"] is None:
            continue
        seen += 1
        free = client.post(COMPLETIONS, json=body | {"seed": seed, "stop": None, "max_tokens": 60})
        text = free.json()["choices"][0]["text"]
        found = min(i for i in (text.find("abab"), text.find("cc")) if i >= 0)
        assert "".join(texts) == text[:found]
    assert seen > 5


# -- the form


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_headers_tell_proxies_not_to_keep_events_back(client: httpx.Client, path: str) -> None:
    body = {"prompt": "a"} if path == COMPLETIONS else {"messages": HELLO}
    request = client.build_request("POST", path, json=body | {"stream": True, "max_tokens": 2})

    response = client.send(request)

    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]
    assert response.content.count(b"[DONE]") == 1


def test_without_include_usage_no_chunk_has_a_usage(client: httpx.Client) -> None:
    chunks = post_stream(client, COMPLETIONS, {"prompt": "a", "max_tokens": 3})

    assert not any("usage" in chunk for chunk in chunks)
    assert all(chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_usage_chunk_comes_once_after_all_choices(client: httpx.Client, path: str) -> None:
    body: dict[str, Any] = {"prompt": "a"} if path == COMPLETIONS else {"messages": HELLO}
    body |= {"max_tokens": 4, "n": 2, "ignore_eos": True}

    *others, last = post_stream(
        client,
        path,
        body | {"stream_options": {"include_usage": True, "include_obfuscation": True}},
    )

    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in others)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_continuous_usage_counts_the_chunks_own_choice(client: httpx.Client, path: str) -> None:
    body: dict[str, Any] = (
        {"prompt": ["a", "the hen"]} if path == COMPLETIONS else {"messages": HELLO}
    )
    options = {"include_usage": True, "continuous_usage_stats": True}
    body |= {"max_tokens": 5, "n": 2, "stream_options": options}

    *chunks, last = post_stream(client, path, body)

    counted: dict[int, int] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        index = choice["index"]
        assert chunk["usage"]["completion_tokens"] >= counted.get(index, 0)
        counted[index] = chunk["usage"]["completion_tokens"]
        total = chunk["usage"]["prompt_tokens"] + counted[index]
        assert chunk["usage"]["total_tokens"] == total
    assert last["usage"]["completion_tokens"] == sum(counted.values())
    prompt_tokens = {chunk["choices"][0]["index"]: chunk["usage"] for chunk in chunks}
    per_choice = [prompt_tokens[index]["prompt_tokens"] for index in sorted(prompt_tokens)]
    assert last["usage"]["prompt_tokens"] == sum(per_choice[::2])


def test_a_bad_request_gets_a_plain_error_although_it_asked_for_a_stream(
    client: httpx.Client,
) -> None:
    response = client.post(COMPLETIONS, json={"prompt": "a", "stream": True, "temperature": 3})

    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["param"] == "temperature"


# -- over time


@pytest.fixture
def held(tokenizer: Tokenizer) -> Iterator[tuple[GatedModel, httpx.Client]]:
    """A server whose model says "hello" but waits before its third token."""
    letters = tokenizer.encode("hello", add_special_tokens=False)
    model = GatedModel(sequence([*letters, 2], prompt_len=1), free_steps=2)
    core = scripted_core(model, tokenizer)
    app = make_app(lambda: (core, info(core)), sse_keepalive=0.02)
    with live_server(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        try:
            yield model, client
        finally:
            model.gate.set()


def test_comments_keep_a_silent_stream_alive(held: tuple[GatedModel, httpx.Client]) -> None:
    model, client = held
    body = {"prompt": [5], "temperature": 0, "stream": True}
    with client.stream("POST", COMPLETIONS, json=body) as response:
        content = b""
        for chunk in response.iter_raw():
            content += chunk
            if content.count(b": keep-alive\n\n") >= 3:
                model.gate.set()

    chunks = events(content)
    assert assembled(chunks)["choices"][0]["text"] == "hello"


def test_text_arrives_while_the_rest_is_still_being_generated(
    held: tuple[GatedModel, httpx.Client],
) -> None:
    model, client = held
    body = {"prompt": [5], "temperature": 0, "stream": True}
    with client.stream("POST", COMPLETIONS, json=body) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("data: {"))
        model.gate.set()
        rest = "".join(lines)

    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"]
    assert rest.endswith("[DONE]")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_failure_after_the_headers_becomes_an_event(tokenizer: Tokenizer, path: str) -> None:
    letters = tokenizer.encode("ab", add_special_tokens=False)

    def script(_token: int, position: int) -> Tensor:
        row = torch.nn.functional.one_hot(torch.tensor(letters[position % 2]), 128) * 20.0
        return row * float("nan") if position > 100 else row

    core = scripted_core(ScriptedModel(script), tokenizer)
    body: dict[str, Any] = {"prompt": [5] * 98} if path == COMPLETIONS else {"messages": HELLO}
    with (
        live_server(make_app(lambda: (core, info(core)))) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        options = {"include_usage": True}
        body |= {"max_tokens": 120, "temperature": 0, "stream_options": options}
        *chunks, last = post_stream(client, path, body)
        after = client.post(COMPLETIONS, json={"prompt": [5], "max_tokens": 2})

    assert chunks
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert last == {
        "error": {
            "message": "the model's logits are not numbers",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
    assert after.status_code == 200
