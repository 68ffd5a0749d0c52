"""Health, readiness and liveness in every state, and what requests are told meanwhile."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.core import EngineCore
from engine.errors import ModelUnavailable
from engine.prepare import ModelInfo
from engine.tokenizer import Tokenizer
from tests.support.engines import info, scripted_core, tiny_core
from tests.support.gated import GatedModel
from tests.support.scripted import ScriptedModel
from tests.support.servers import asgi_client, make_app
from tests.support.wire import CHAT, COMPLETIONS

PROBES = ("/live", "/health", "/ping", "/ready")
BODY = {"prompt": [5], "max_tokens": 3, "temperature": 0, "ignore_eos": True}
POSTS: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, BODY),
    (COMPLETIONS, BODY | {"stream": True}),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}]}),
    ("/tokenize", {"prompt": "a"}),
    ("/detokenize", {"tokens": [5]}),
]


async def probe(client: httpx.AsyncClient) -> list[tuple[int, str]]:
    """Status and word of every probe; HEAD must agree."""
    answers = []
    for path in PROBES:
        response = await client.get(path)
        head = await client.head(path)
        body = response.json()
        assert body.keys() == {"status", "reason"}
        assert (body["reason"] is None) == (body["status"] == "ok")
        assert head.status_code == response.status_code
        answers.append((response.status_code, body["status"]))
    return answers


def refused(response: httpx.Response, code: str) -> None:
    """Check a 503 of this code."""
    assert response.status_code == 503, response.text
    assert response.headers["content-type"] == "application/json"
    assert 1 <= int(response.headers["retry-after"]) <= 30
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("service_unavailable", None)
    assert error["code"] == code
    closes = response.headers.get("connection") == "close"
    assert closes == (code == "draining")


async def refuses_all(client: httpx.AsyncClient, code: str) -> None:
    for path, body in POSTS:
        refused(await client.post(path, json=body), code)
    refused(await client.get("/tokenizer_info"), code)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that will soon be so."""
    async with asyncio.timeout(30):
        while not await holds():
            await asyncio.sleep(0.005)


@pytest.mark.anyio
async def test_while_the_model_loads_the_port_answers(tiny_folder: Path) -> None:
    go = threading.Event()

    def load() -> tuple[EngineCore, ModelInfo]:
        assert go.wait(60)
        return tiny_core(tiny_folder)

    app = make_app(load)
    async with asgi_client(app, wait=False) as client:
        try:
            loading = (503, "loading")
            assert await probe(client) == [(200, "loading"), loading, loading, loading]
            await refuses_all(client, "model_loading")
            bad = await client.post(COMPLETIONS, json={"temperature": 3})
            assert bad.status_code == 503  # without a model, bodies are not read
            (model,) = (await client.get("/v1/models")).json()["data"]
            assert (model["id"], model["max_model_len"]) == ("tiny", None)
            assert (await client.get("/metrics")).status_code == 200
        finally:
            go.set()
        await asyncio.wait_for(app.state.server.engine.loaded(), 60)

        assert await probe(client) == [(200, "ok")] * 4
        assert (await client.post(COMPLETIONS, json=BODY)).status_code == 200


@pytest.mark.anyio
async def test_a_draining_server_is_not_ready_but_well(tiny_folder: Path) -> None:
    app = make_app(lambda: tiny_core(tiny_folder))
    draining = [(200, "draining")] * 3 + [(503, "draining")]
    async with asgi_client(app) as client:
        app.state.server.ready = False
        assert await probe(client) == draining
        assert (await client.post(COMPLETIONS, json=BODY)).status_code == 200  # for a while

        app.state.server.draining = True
        assert await probe(client) == draining
        await refuses_all(client, "draining")


class Breaking(ScriptedModel):
    def forward(self, *_args: Any) -> Any:
        raise RuntimeError("out of memory")


def broken_in_a_step(tokenizer: Tokenizer) -> FastAPI:
    core = scripted_core(Breaking(), tokenizer)
    return make_app(lambda: (core, info(core)))


def broken_at_start(_tokenizer: Tokenizer) -> FastAPI:
    def load() -> tuple[EngineCore, ModelInfo]:
        raise ModelUnavailable("no such model")

    return make_app(load)


@pytest.mark.anyio
@pytest.mark.parametrize("broken", [broken_in_a_step, broken_at_start])
async def test_a_dead_engine_is_unhealthy_everywhere(
    tokenizer: Tokenizer, broken: Callable[[Tokenizer], FastAPI]
) -> None:
    app = broken(tokenizer)
    async with asgi_client(app, wait=False) as client:
        if broken is broken_in_a_step:
            await app.state.server.engine.loaded()
            refused(await client.post(COMPLETIONS, json=BODY), "engine_dead")  # was running
        await asyncio.wait_for(app.state.server.engine.died(), 30)

        assert await probe(client) == [(503, "unhealthy")] * 4
        await refuses_all(client, "engine_dead")
        app.state.server.draining = True
        await refuses_all(client, "engine_dead")


@pytest.mark.anyio
async def test_probes_and_metrics_do_not_wait_for_a_step(tokenizer: Tokenizer) -> None:
    model = GatedModel()
    core = scripted_core(model, tokenizer)
    async with asgi_client(make_app(lambda: (core, info(core)))) as client:
        request = asyncio.create_task(client.post(COMPLETIONS, json=BODY))
        try:
            await asyncio.to_thread(model.stopped.wait, 30)
            assert await probe(client) == [(200, "ok")] * 4
            assert (await client.get("/metrics")).status_code == 200
            assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 200
        finally:
            model.gate.set()
        assert (await request).status_code == 200


@pytest.mark.anyio
async def test_an_engine_that_does_not_step_is_ill_until_it_does(tokenizer: Tokenizer) -> None:
    model = GatedModel()
    core = scripted_core(model, tokenizer)
    async with asgi_client(make_app(lambda: (core, info(core)), watchdog=0.05)) as client:
        assert await probe(client) == [(200, "ok")] * 4  # nothing to do: no step is missing
        request = asyncio.create_task(client.post(COMPLETIONS, json=BODY))
        try:

            async def ill() -> bool:
                return (await client.get("/live")).status_code == 503

            await until(ill)
            assert await probe(client) == [(503, "unhealthy")] * 4
            await refuses_all(client, "engine_dead")
        finally:
            model.gate.set()
        assert (await request).status_code == 200
        assert await probe(client) == [(200, "ok")] * 4


@pytest.mark.anyio
async def test_a_full_queue_refuses_and_counts_every_sequence(tokenizer: Tokenizer) -> None:
    model = GatedModel()
    core = scripted_core(model, tokenizer, max_num_seqs=2)
    app = make_app(lambda: (core, info(core)), max_waiting=2)
    async with asgi_client(app) as client:
        several = BODY | {"prompt": [[5], [6]], "n": 2}
        for_ever = await client.post(COMPLETIONS, json=several | {"prompt": [[5]] * 3})
        assert for_ever.status_code == 400
        assert for_ever.json()["error"]["param"] == "prompt"
        assert "at most 4 sequences" in for_ever.json()["error"]["message"]
        running = asyncio.create_task(client.post(COMPLETIONS, json=several))
        try:
            await asyncio.to_thread(model.stopped.wait, 30)
            for body in (BODY, BODY | {"stream": True}):
                refused(await client.post(COMPLETIONS, json=body), "overloaded")
            assert (await client.get("/ready")).status_code == 200
        finally:
            model.gate.set()
        assert (await running).status_code == 200
        assert (await client.post(COMPLETIONS, json=BODY)).status_code == 200
        metrics = (await client.get("/metrics")).text

    labels = '{model_name="tiny",reason="overloaded"}'
    assert f"vllm:admission_rejections_total{labels} 2.0" in metrics
