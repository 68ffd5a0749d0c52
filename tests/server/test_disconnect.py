"""Clients that go away: what they asked for is dropped at once, and nothing else."""

import json
import logging
import socket
import struct
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI

from engine.core import EngineCore
from engine.tokenizer import Tokenizer
from server.state import ServerState
from tests.support.engines import assert_all_free, info, scripted_core
from tests.support.gated import GatedModel
from tests.support.servers import eventually, live_server, make_app
from tests.support.wire import CHAT, COMPLETIONS

LOGGER = "logitmill.request"
CLIENTS = 100
NUM_LANES = 8


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, logger=LOGGER):
        yield


def connect(url: str, path: str, body: dict[str, Any], *, length: int | None = None) -> Any:
    """A socket on which a request has been sent; `length` may announce more than that."""
    address = urlsplit(url)
    assert address.hostname is not None
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((address.hostname, address.port))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {length or len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def reset(connection: socket.socket) -> None:
    """Close without a goodbye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(one.getMessage()) for one in caplog.records if one.name == LOGGER]


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    (value,) = [line.split()[-1] for line in text.splitlines() if line.startswith(f"vllm:{name}")]
    return float(value)


def idle(url: str) -> bool:
    names = ("num_requests_running{", "num_requests_waiting{", "kv_cache_usage_perc{")
    return all(metric(url, name) == 0 for name in names)


def served(tokenizer: Tokenizer, model: GatedModel) -> tuple[FastAPI, ServerState, EngineCore]:
    core = scripted_core(
        model, tokenizer, num_blocks=128, max_num_seqs=NUM_LANES, max_batch_tokens=16
    )
    app = make_app(lambda: (core, info(core)))
    return app, app.state.server, core


LONG = {"prompt": [5] * 40, "max_tokens": 60, "ignore_eos": True}
KINDS: list[tuple[str, dict[str, Any], int]] = [  # with how many sequences each has
    (COMPLETIONS, LONG, 1),
    (COMPLETIONS, LONG | {"stream": True, "n": 2}, 2),
    (COMPLETIONS, LONG | {"prompt": [[5] * 30, [6] * 30], "best_of": 3}, 6),
    (CHAT, {"messages": [{"role": "user", "content": "hello"}], "stream": True}, 1),
]


@pytest.mark.parametrize("free_steps", [1, 15], ids=["in prefill", "in decode"])
def test_when_a_hundred_clients_vanish_nothing_of_them_stays(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, free_steps: int
) -> None:
    model = GatedModel(free_steps=free_steps)
    app, state, core = served(tokenizer, model)
    kinds = [KINDS[number % len(KINDS)] for number in range(CLIENTS)]
    num_sequences = sum(width for _, _, width in kinds)
    with live_server(app) as url:
        try:
            clients = [connect(url, path, body) for path, body, _ in kinds]
            eventually(lambda: state.engine.num_open == num_sequences)
            assert model.stopped.wait(30)
            for number, client in enumerate(clients):
                client.close() if number % 3 else reset(client)
            # Seen while the engine is still busy with its step.
            eventually(lambda: state.engine.num_open == 0 and state.num_inflight == 0)
        finally:
            model.gate.set()
        eventually(lambda: idle(url))
        assert_all_free(core)
        assert metric(url, 'request_success_total{engine="0",finished_reason="abort"') == (
            num_sequences
        )

        after = httpx.post(f"{url}{COMPLETIONS}", json=LONG, trust_env=False, timeout=30)
        assert after.status_code == 200

    lines = [line for line in logged(caplog) if line["status"] == 499]
    assert len(lines) == CLIENTS
    assert {line["path"] for line in lines} == {COMPLETIONS, CHAT}
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


def test_a_neighbour_keeps_its_shared_prefix_and_its_tokens(tokenizer: Tokenizer) -> None:
    body = {"prompt": [7] * 33, "max_tokens": 30, "seed": 1, "ignore_eos": True, "stream": False}
    model = GatedModel(free_steps=6)
    app, state, core = served(tokenizer, model)
    with live_server(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        try:
            leaving = connect(url, COMPLETIONS, body | {"stream": True})
            staying = connect(url, COMPLETIONS, body)
            assert model.stopped.wait(30)
            eventually(lambda: state.engine.num_open == 2)
            leaving.close()
            eventually(lambda: state.engine.num_open == 1)
        finally:
            model.gate.set()
        answer = staying.makefile("rb").read()
        staying.close()
        alone = client.post(COMPLETIONS, json=body | {"cache_salt": "alone"}).json()
        eventually(lambda: idle(url))
        assert_all_free(core)

    kept = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert kept["choices"] == alone["choices"]


def test_a_client_that_leaves_while_it_sends_its_body_is_no_error(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    model = GatedModel()
    model.gate.set()
    app, state, _ = served(tokenizer, model)
    with live_server(app) as url:
        client = connect(url, COMPLETIONS, {}, length=1000)
        eventually(lambda: state.num_inflight == 1)
        client.close()
        eventually(lambda: state.num_inflight == 0)
        eventually(lambda: bool(logged(caplog)))

    (line,) = logged(caplog)
    assert line["status"] == 499
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


def test_a_client_that_does_not_read_is_given_up(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    model = GatedModel(free_steps=120)
    core = scripted_core(model, tokenizer)
    app = make_app(lambda: (core, info(core)), slow_client_timeout=0.2)
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "ignore_eos": True}
    body |= {"logprobs": True, "top_logprobs": 20}  # so that an event is large
    with live_server(app, send_buffer=4096) as url:
        try:
            client = connect(url, CHAT, body)
            eventually(lambda: bool(logged(caplog)))
        finally:
            model.gate.set()
        content = client.makefile("rb").read()
        client.close()
        eventually(lambda: idle(url))
        assert metric(url, 'request_success_total{engine="0",finished_reason="abort"') == 1

    (line,) = logged(caplog)
    assert line["status"] == 499
    assert content.startswith(b"HTTP/1.1 200 OK")
    assert b"[DONE]" not in content
