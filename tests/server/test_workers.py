"""Bodies that take long are read elsewhere, and end there if they take too much."""

import asyncio
import json
import os
import pickle
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import InvalidRequest, Overloaded
from engine.messages import Request
from engine.tokenizer import Tokenizer
from server import inputs, worker, workers
from server.config import ServerConfig
from server.errors import ApiError
from server.inputs import CHAT, Incoming, Input, Reader
from server.workers import Workers
from tests.support import tiny
from tests.support.engines import info, scripted_core, tiny_core
from tests.support.scripted import ScriptedModel
from tests.support.servers import asgi_client, make_app
from tests.support.wire import COMPLETIONS

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "hi"}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
DOUBLING = (
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
EXPLODING = "(?:" * 60 + "a" + "+)" * 60


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    tokenizer = Tokenizer(folder)
    core = scripted_core(ScriptedModel(context_len=256), tokenizer, num_blocks=1000)
    config = ServerConfig(trust_request_templates=True)
    return Reader(config, ["tiny"], {}, info(core), tokenizer)


@asynccontextmanager
async def some_workers() -> AsyncIterator[Workers]:
    own = Workers()
    try:
        yield own
    finally:
        await own.stop()


def incoming(body: dict[str, Any], path: str = COMPLETIONS, padding: int = 0) -> Incoming:
    data = json.dumps(body).encode() + b" " * padding
    return Incoming(path, data, "label", 7, time.monotonic(), salt="salt")


# -- the same wherever it is read


BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "the hen", "stop": ["</s>", "x"], "seed": 1, "request_id": "mine"}),
    (COMPLETIONS, {"prompt": [[5, 6], [7]], "seed": 1, "bad_words": ["in"], "echo": True}),
    (COMPLETIONS, {"prompt": "a", "seed": 1, "sed": {"eval_prompt": "?"}, "unheard_of": 1}),
    (COMPLETIONS, {"prompt": "a", "seed": 1, "use_beam_search": True, "n": 2, "top_p": 0.5}),
    (CHAT, {"messages": [USER], "seed": 1, "logprobs": True, "top_logprobs": 3, "stream": True}),
    ("/v1/explain", {"prompt": "the hen", "continuation": " in", "seed": 1}),
    ("/tokenize", {"prompt": "the hen", "return_token_strs": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    (inputs.TOKENIZER_INFO, {}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_a_worker_finds_what_the_server_would(
    reader: Reader, path: str, body: dict[str, Any]
) -> None:
    asked = incoming(body, path)
    here = inputs.read(asked, reader)
    async with some_workers() as own:
        there = await own.read(asked, reader)
    for one in fields(Input):
        assert getattr(there, one.name) == getattr(here, one.name), one.name
    assert all(isinstance(request, Request) for request in there.requests)
    assert {request.cache_salt for request in there.requests} <= {"salt"}


async def test_what_requests_share_comes_once(reader: Reader) -> None:
    bias = {str(token_id): 1.0 for token_id in range(128)}
    asked = incoming({"prompt": [[5]] * 64, "logit_bias": bias}, padding=worker.LARGE_BYTES)
    async with some_workers() as own:
        found = await own.read(asked, reader)
    assert len(found.requests) == 64
    assert len({id(request.params) for request in found.requests}) == 1
    assert len({request.request_id for request in found.requests}) == 64


REFUSED: list[tuple[str, dict[str, Any], str | None]] = [
    (COMPLETIONS, {"prompt": "a", "temperature": 3}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "model": "other"}, "model"),
    (COMPLETIONS, {"prompt": [500]}, "prompt"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [USER], "chat_template": ENDLESS}, "chat_template"),
    (CHAT, {"messages": [USER], "chat_template": DOUBLING}, "chat_template"),
    (COMPLETIONS, {"prompt": "a", "cot_branches": 2, "cot_pattern": EXPLODING}, "cot_pattern"),
]


@pytest.mark.parametrize(("path", "body", "param"), REFUSED)
async def test_what_is_refused_is_refused_by_name(
    reader: Reader, path: str, body: dict[str, Any], param: str | None
) -> None:
    async with some_workers() as own:
        with pytest.raises(ApiError) as raised:
            await own.read(incoming(body, path), reader)
        assert raised.value.status in (400, 404)
        assert raised.value.param == param
        assert (await own.read(incoming({"prompt": "a"}), reader)).requests


async def test_a_text_that_renders_to_more_than_the_context_is_not_encoded(reader: Reader) -> None:
    template = "{% for i in range(3000) %}{{ 'the hen and the fox ' * 100 }}{% endfor %}"
    body = {"messages": [USER], "chat_template": template}
    known = replace(reader, tokenizer=pickle.loads(pickle.dumps(reader.tokenizer)))
    known.tokenizer.__dict__["_coarsest"] = (8, [])
    with pytest.raises(InvalidRequest) as raised:
        inputs.read(incoming(body, CHAT), known)
    assert (raised.value.param, raised.value.code) == ("messages", "context_length_exceeded")
    assert "characters" in str(raised.value)


# -- how much


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": list(range(3, 60)) * 10}, "prompt", "context_length_exceeded"),
        ({"prompt": [[5], [5] * 257]}, "prompt[1]", "context_length_exceeded"),
        ({"prompt": [[5]] * 257}, "prompt", "invalid_value"),
        ({"prompt": "a", "stop_token_ids": [5] * 129}, "stop_token_ids", "invalid_value"),
        ({"prompt": "a", "allowed_token_ids": ["x"] * 129}, "allowed_token_ids", "invalid_value"),
        ({"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(129)))}, "logit_bias",
         "invalid_value"),
        ({"prompt": "a", "guidance_scale": 2.0, "negative_prompt": [5] * 257}, "negative_prompt",
         "invalid_value"),
    ],
)  # fmt: skip
def test_lists_that_are_too_long_are_refused_unread(
    reader: Reader, body: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        inputs.read(incoming(body), reader)
    assert (raised.value.param, raised.value.code) == (param, code)


def test_a_list_of_ids_that_is_to_be_truncated_may_be_long(reader: Reader) -> None:
    ids = [3 + index % 100 for index in range(5000)]
    for side, want in (("left", ids[-40:]), ("right", ids[:40])):
        body = {"prompt": ids, "truncate_prompt_tokens": 40, "truncation_side": side}
        (request,) = inputs.read(incoming(body), reader).requests
        assert list(request.prompt_ids) == want
    with pytest.raises(InvalidRequest, match="maximum context length"):
        inputs.read(incoming({"prompt": ids, "truncate_prompt_tokens": 4000}), reader)


def test_an_answer_lists_only_so_many_tokens(reader: Reader) -> None:
    roomy = replace(reader, config=ServerConfig(max_logprobs=-1))
    body = {"prompt": [[5]] * 256, "max_tokens": 200, "logprobs": 128}
    with pytest.raises(InvalidRequest) as raised:
        inputs.read(incoming(body), roomy)
    assert str(256 * 200 * 128) in str(raised.value)
    assert str(inputs.MAX_LISTED) in str(raised.value)
    inputs.read(incoming(body | {"max_tokens": 100}), roomy)


def test_only_what_is_small_and_no_program_is_read_on_the_event_loop() -> None:
    assert inputs.quick(incoming({"prompt": "a"})) == {"prompt": "a"}
    assert inputs.quick(incoming({"prompt": "a"}, padding=inputs.QUICK_BYTES)) is None
    assert inputs.quick(incoming({"prompt": "a", "cot_pattern": "a"})) is None
    assert inputs.quick(incoming({"messages": [USER]}, CHAT)) is None
    assert inputs.quick(incoming({"prompt": ["a", "b"], "bad_words": ["c"]})) is None
    assert inputs.quick(incoming({"prompt": [[5], [6]]})) is None
    assert inputs.quick(incoming({"prompt": [5, 6]})) == {"prompt": [5, 6]}
    assert inputs.quick(incoming({"messages": [USER]}, "/tokenize")) is None


# -- processes that end


async def test_a_worker_that_is_ended_fails_its_body_alone(reader: Reader) -> None:
    async with some_workers() as own:
        slow = incoming({"messages": [USER], "chat_template": ENDLESS}, CHAT)
        pid = await an_idle_one(own, reader)
        task = asyncio.create_task(own.read(slow, reader))
        await until(lambda: not own._idle)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ApiError, match="cannot be read") as raised:
            await task
        assert raised.value.status == 400
        assert (await own.read(incoming({"prompt": "a"}), reader)).requests


async def test_what_prompts_share_is_encoded_once(reader: Reader) -> None:
    """Encoding a long text for each of many prompts would take more time than there is."""
    body = {"prompt": ["a"] * 256, "max_tokens": 2, "guidance_scale": 2.0}
    own = replace(reader, info=replace(reader.info, context_len=1 << 20, num_blocks=1 << 20))
    async with some_workers() as some:
        found = await some.read(incoming(body | {"negative_prompt": "word " * 12_000}), own)
    assert len({one.companion_ids for one in found.requests}) == 1
    assert len(found.requests) == 256


async def test_where_memory_runs_out_workers_go_before_the_server(reader: Reader) -> None:
    async with some_workers() as own:
        pid = await an_idle_one(own, reader)
        assert own._forker is not None
        for each in (pid, own._forker.result()._process.pid):
            assert Path(f"/proc/{each}/oom_score_adj").read_text() == "1000\n"


async def test_the_process_that_forks_is_started_again(reader: Reader) -> None:
    async with some_workers() as own:
        await own.warm_up(reader)
        assert own._forker is not None
        process = own._forker.result()._process
        process.kill()
        process.wait()
        assert (await own.read(incoming({"prompt": "a"}), reader)).requests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_signals_for_the_whole_service_are_the_servers_to_deal_with(
    reader: Reader, number: signal.Signals
) -> None:
    """Bodies are read to the end while it drains."""
    async with some_workers() as own:
        pid = await an_idle_one(own, reader)
        assert own._forker is not None
        forker = own._forker.result()._process
        for each in (pid, forker.pid):
            os.kill(each, number)
        assert await an_idle_one(own, reader) == pid
        assert forker.poll() is None


async def test_whoever_leaves_takes_the_worker_along(reader: Reader) -> None:
    async with some_workers() as own:
        slow = incoming({"messages": [USER], "chat_template": ENDLESS}, CHAT)
        pid = await an_idle_one(own, reader)
        task = asyncio.create_task(own.read(slow, reader))
        await until(lambda: not own._idle)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not os.path.exists(f"/proc/{pid}"))


async def test_a_worker_that_has_read_a_large_body_is_gone(reader: Reader) -> None:
    async with some_workers() as own:
        await own.read(incoming({"prompt": "a"}, padding=worker.LARGE_BYTES), reader)
        assert not own._idle
        await own.read(incoming({"prompt": "a"}), reader)
        assert len(own._idle) == 1


async def test_others_are_read_while_some_take_long(reader: Reader) -> None:
    async with some_workers() as own:
        slow = incoming({"messages": [USER], "chat_template": ENDLESS}, CHAT)
        await an_idle_one(own, reader)
        tasks = [asyncio.create_task(own.read(slow, reader)) for _ in range(2)]
        await until(lambda: not own._idle)
        assert (await own.read(incoming({"prompt": "a"}), reader)).requests
        assert not any(task.done() for task in tasks)
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_only_so_many_wait(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_MOST_WAITING", 3)
    async with some_workers() as own:
        slow = incoming({"messages": [USER], "chat_template": ENDLESS}, CHAT)
        tasks = [asyncio.create_task(own.read(slow, reader)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await own.read(incoming({"prompt": "a"}), reader)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await own.read(incoming({"prompt": "a"}), reader)).requests


async def an_idle_one(own: Workers, reader: Reader) -> int:
    """The process that will read the next body."""
    await own.read(incoming({"prompt": "a"}), reader)
    (one,) = own._idle
    return one.pid


async def until(holds: Any) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)


# -- in the server


async def test_a_hostile_template_holds_up_nobody(tiny_folder: Path) -> None:
    app = make_app(lambda: tiny_core(tiny_folder), trust_request_templates=True)
    async with asgi_client(app) as client:
        await client.post(CHAT, json={"messages": [USER], "max_tokens": 1})
        bad = {"messages": [USER], "chat_template": ENDLESS}
        task = asyncio.create_task(client.post(CHAT, json=bad))
        await asyncio.sleep(0)
        good = await client.post(CHAT, json={"messages": [USER], "max_tokens": 1})
        assert good.status_code == 200
        assert not task.done()
        refused = await task
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == ("chat_template", "invalid_value")
    assert "processor time" in error["message"]


async def test_so_many_large_bodies_and_no_more(tiny_folder: Path) -> None:
    """What is being read is counted until it has been, and small bodies are always taken."""
    app = make_app(lambda: tiny_core(tiny_folder), max_body_bytes=200_000)
    state = app.state.server
    large = {"prompt": "a", "max_tokens": 1, "metadata": "x" * 100_000}
    async with asgi_client(app) as client:
        state.body_bytes = 16 * 200_000
        refused = await client.post(COMPLETIONS, json=large)
        small = await client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1})
        state.body_bytes -= 16 * 200_000
        taken = await client.post(COMPLETIONS, json=large)
        assert state.body_bytes == 0
    assert (refused.status_code, small.status_code, taken.status_code) == (503, 200, 200)
    assert refused.json()["error"]["code"] == "overloaded"


async def test_a_labels_place_is_the_header_then_the_body(tiny_folder: Path) -> None:
    app = make_app(lambda: tiny_core(tiny_folder))
    async with asgi_client(app) as client:
        body = {"prompt": "a", "max_tokens": 1, "request_id": "body"}
        for headers, want in (({}, "body"), ({"X-Request-Id": "head"}, "head")):
            answer: httpx.Response = await client.post(COMPLETIONS, json=body, headers=headers)
            assert answer.json()["id"] == f"cmpl-{want}"
            assert answer.headers["x-request-id"] == want
