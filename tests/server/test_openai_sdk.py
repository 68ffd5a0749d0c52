"""The official Python SDK: answers, streams, and an exception class for each error."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI

from engine.tokenizer import Tokenizer
from tests.support.engines import info, scripted_core, tiny_core
from tests.support.gated import GatedModel
from tests.support.scripted import ScriptedModel, constant
from tests.support.servers import eventually, live_server, make_app

KEY = "sk-test"
ASK: dict[str, Any] = {"model": "tiny", "prompt": "the hen", "max_tokens": 12, "seed": 3}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 12,
    "seed": 3,
}


@pytest.fixture(scope="module")
def app(tiny_folder: Path) -> FastAPI:
    return make_app(lambda: tiny_core(tiny_folder), api_key=KEY, max_body_bytes=100_000)


@pytest.fixture(scope="module")
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with client_of(url) as sdk:
        yield sdk


@pytest.fixture
async def async_sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    http_client = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=KEY, max_retries=0, http_client=http_client
    ) as sdk:
        yield sdk


def client_of(url: str, **options: Any) -> openai.OpenAI:
    http_client = openai.DefaultHttpxClient(trust_env=False)
    given = {"base_url": f"{url}/v1", "api_key": KEY, "max_retries": 0, "http_client": http_client}
    return openai.OpenAI(**(given | options))


# -- answers


def test_completions(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(**ASK, n=2, logprobs=2, echo=True, stop=["zzz"])

    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    for choice in answer.choices:
        assert choice.text.startswith("the hen")
        assert choice.finish_reason in ("stop", "length")
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert choice.logprobs.text_offset is not None
        assert len(choice.logprobs.text_offset) == len(choice.logprobs.tokens)


def test_a_streamed_completion(sdk: openai.OpenAI) -> None:
    whole = sdk.completions.create(**ASK)
    chunks = list(sdk.completions.create(**ASK, stream=True))
    options: Any = {"include_usage": True}
    with_usage = list(sdk.completions.create(**ASK, stream=True, stream_options=options))

    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert with_usage[-1].choices == []
    assert with_usage[-1].usage is not None
    assert whole.usage is not None
    assert with_usage[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_chat(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)

    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.message.tool_calls is None
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [3] * len(
        choice.logprobs.content
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None


def test_a_streamed_chat(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(**CHAT)
    options: Any = {"include_usage": True}
    chunks = list(sdk.chat.completions.create(**CHAT, stream=True, stream_options=options))

    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert chunks[-1].usage is not None


def test_the_helper_that_collects_a_chat_stream(sdk: openai.OpenAI) -> None:
    # The helper raises for answers that were cut off.
    until_a_letter = CHAT | {"stop": list("abcdefghijklmnopqrstuvwxyz"), "max_tokens": 60}
    whole = sdk.chat.completions.create(**until_a_letter, n=2)
    with sdk.chat.completions.stream(**until_a_letter, n=2) as stream:
        final = stream.get_final_completion()

    texts = [choice.message.content for choice in whole.choices]
    assert [choice.message.content for choice in final.choices] == texts
    assert [choice.finish_reason for choice in final.choices] == [
        choice.finish_reason for choice in whole.choices
    ]


@pytest.mark.anyio
async def test_the_asynchronous_client(async_sdk: openai.AsyncOpenAI) -> None:
    whole = await async_sdk.completions.create(**ASK)
    pieces = [
        c.choices[0].text async for c in await async_sdk.completions.create(**ASK, stream=True)
    ]
    chat = await async_sdk.chat.completions.create(**CHAT)
    deltas = [
        chunk.choices[0].delta.content or ""
        async for chunk in await async_sdk.chat.completions.create(**CHAT, stream=True)
    ]

    assert "".join(pieces) == whole.choices[0].text
    assert "".join(deltas) == chat.choices[0].message.content
    assert [model.id async for model in async_sdk.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError):
        await async_sdk.completions.create(**ASK, temperature=3)


def test_our_own_parameters_go_through_extra_body(sdk: openai.OpenAI) -> None:
    extra = {"min_p": 0.1, "top_k": 5, "return_token_ids": True, "typical_p": 0.9}

    answer = sdk.completions.create(**ASK, extra_body=extra)

    choice: Any = answer.choices[0]
    assert len(choice.token_ids) == answer.usage.completion_tokens  # type: ignore[union-attr]


def test_models(sdk: openai.OpenAI) -> None:
    (listed,) = sdk.models.list()

    assert listed.id == "tiny"
    assert sdk.models.retrieve("tiny") == listed


def test_raw_responses_have_the_request_id(sdk: openai.OpenAI) -> None:
    headers = {"X-Request-Id": "mine-1"}

    raw = sdk.completions.with_raw_response.create(**ASK, extra_headers=headers)

    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().id == "cmpl-mine-1"
    with sdk.chat.completions.with_streaming_response.create(**CHAT, stream=True) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-request-id"]


# -- errors


def test_a_bad_request(sdk: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.completions.create(
                **ASK, temperature=3, stream=stream, extra_headers={"X-Request-Id": "bad-1"}
            )
        error = caught.value
        assert (error.type, error.param) == ("invalid_request_error", "temperature")
        assert error.code == "invalid_value"
        assert error.request_id == "bad-1"
        assert "temperature must be between 0 and 2, got 3" in error.message


def test_a_conversation_that_is_too_long_has_the_code_agents_look_for(sdk: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "a" * 500}]
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model="tiny", messages=messages)

    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is" in caught.value.message


def test_a_wrong_key(url: str) -> None:
    with client_of(url, api_key="sk-wrong") as sdk:
        with pytest.raises(openai.AuthenticationError) as caught:
            sdk.completions.create(**ASK)
        with pytest.raises(openai.AuthenticationError):
            sdk.models.list()

    assert caught.value.code == "invalid_api_key"


def test_an_unknown_model(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.completions.create(**(ASK | {"model": "other"}))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("org/other")
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.embeddings.create(model="tiny", input="a")
    assert caught.value.code == "unknown_url"


def test_a_body_that_is_too_large(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        sdk.completions.create(**(ASK | {"prompt": "a" * 2_000_000}))

    assert caught.value.status_code == 413
    assert caught.value.code == "request_too_large"


def test_a_server_that_is_overloaded(tokenizer: Tokenizer) -> None:
    model = GatedModel()
    core = scripted_core(model, tokenizer, max_num_seqs=1)
    app = make_app(lambda: (core, info(core)), max_waiting=0)
    with live_server(app) as url, client_of(url, timeout=30) as sdk:
        try:
            with sdk.completions.create(**ASK, stream=True):
                eventually(lambda: app.state.server.engine.num_open == 1)
                with pytest.raises(openai.InternalServerError) as caught:
                    sdk.completions.create(**ASK)
        finally:
            model.gate.set()

    assert caught.value.status_code == 503
    assert caught.value.code == "overloaded"
    assert caught.value.response.headers["retry-after"]


def test_a_fault_of_the_server_is_not_tried_again(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(constant([float("nan")] * 128))
    core = scripted_core(model, tokenizer)
    with (
        live_server(make_app(lambda: (core, info(core)))) as url,
        client_of(url, max_retries=5) as sdk,
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            sdk.completions.create(**ASK)
        rows = model.num_rows
        with pytest.raises(openai.APIError) as streamed:
            list(sdk.completions.create(**ASK, stream=True))

    assert caught.value.status_code == 500
    assert rows == 1
    assert streamed.value.code == "internal_error"
    assert "not numbers" in streamed.value.message


def test_leaving_a_stream_aborts_it(tokenizer: Tokenizer) -> None:
    model = GatedModel(free_steps=4)
    core = scripted_core(model, tokenizer)
    app = make_app(lambda: (core, info(core)))
    with live_server(app) as url, client_of(url) as sdk:
        try:
            with sdk.completions.create(**(ASK | {"max_tokens": 200}), stream=True) as stream:
                next(iter(stream))
            eventually(lambda: app.state.server.engine.num_open == 0)
        finally:
            model.gate.set()
