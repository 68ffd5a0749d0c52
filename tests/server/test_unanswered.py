"""Requests that take too long: to come, or to be answered."""

import json
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.core import EngineCore
from engine.tokenizer import Tokenizer
from tests.support.engines import assert_all_free, info, scripted_core
from tests.support.gated import GatedModel
from tests.support.scripted import ScriptedModel
from tests.support.servers import eventually, live_server, make_app
from tests.support.sockets import Reply, dial, exchange, post, read_to_end
from tests.support.wire import CHAT, COMPLETIONS, events

BODY = {"prompt": [5] * 20, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
HEAD = (
    f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
)
ABORTED = 'logitmill:request_success_total{engine="0",finished_reason="abort"'
SOON = {"head_timeout": 0.5, "body_timeout": 0.5}


def served(model: ScriptedModel, tokenizer: Tokenizer, **config: Any) -> tuple[FastAPI, EngineCore]:
    core = scripted_core(model, tokenizer)
    return make_app(lambda: (core, info(core)), **config), core


@pytest.fixture
def impatient(tokenizer: Tokenizer) -> FastAPI:
    """An application that waits for little."""
    return served(ScriptedModel(), tokenizer, **SOON)[0]


@pytest.fixture
def gated() -> Iterator[GatedModel]:
    """A model that stops in the middle of an answer."""
    model = GatedModel(free_steps=5)
    yield model
    model.gate.set()


def metric(url: str, name: str) -> float:
    """The value of a series, the beginning of whose name is this."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    (value,) = [line.split()[-1] for line in lines if line.startswith(name)]
    return float(value)


def dropped(url: str, reason: str) -> float:
    return metric(url, f'logitmill:connections_dropped_total{{reason="{reason}"}}')


# -- clients that are slow


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_client_that_says_nothing_is_parted_from_without_a_word(
    impatient: FastAPI, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    with live_server(impatient, loop=loop) as url:
        connections = [dial(url) for _ in range(200)]
        for connection in connections[:100]:
            connection.sendall(b"\r\n")
        assert [read_to_end(connection) for connection in connections] == [b""] * 200
        eventually(lambda: dropped(url, "silent") == 200)
        for connection in connections:
            connection.close()

    assert not [one for one in caplog.records if one.levelno > logging.INFO]


@pytest.mark.parametrize(
    "sent", ["G", "GET /live HTTP/1.1", "GET /live HTTP/1.1\r\nX: a\r\n", "GET /" + "a" * 5000]
)
def test_half_a_head_is_told_that_its_time_is_over(impatient: FastAPI, sent: str) -> None:
    whole = "GET /live HTTP/1.1\r\n\r\n"
    with live_server(impatient) as url:
        first = exchange(url, sent.encode())
        behind = exchange(url, (whole + sent).encode())

    for reply in (first, Reply(behind.raw[behind.raw.index(b"HTTP/1.1 408") :], 0)):
        assert reply.response.status == 408
        assert reply.error["code"] == "request_timeout"
        assert "0.5 seconds" in reply.error["message"]
    assert behind.raw.startswith(b"HTTP/1.1 200 OK")


def test_half_a_body_is_told_that_its_time_is_over(
    impatient: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), live_server(impatient) as url:
        reply = exchange(url, HEAD.encode() + b"{")

    assert reply.response.status == 408
    assert reply.error["code"] == "request_timeout"
    assert "0.5 seconds" in reply.error["message"]
    (line,) = [one.getMessage() for one in caplog.records if one.name == "logitmill.request"]
    logged = json.loads(line)
    assert (logged["path"], logged["status"]) == (COMPLETIONS, 408)
    assert logged["error"] == "request_timeout"


@pytest.mark.parametrize("start", ["GET /", HEAD], ids=["head", "body"])
def test_a_trickle_does_not_keep_a_connection_open(impatient: FastAPI, start: str) -> None:
    with live_server(impatient) as url, dial(url) as connection:
        connection.sendall(start.encode())
        answer = bytearray()
        over = threading.Event()

        def read() -> None:
            answer.extend(read_to_end(connection))
            over.set()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for _ in range(1000):
                if over.wait(0.03):
                    break
                connection.sendall(b" " if start is HEAD else b"a")
        except ConnectionError:
            pass
        reader.join(60)

    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_request_that_comes_in_pieces_is_a_request(tokenizer: Tokenizer) -> None:
    app, _ = served(ScriptedModel(), tokenizer)
    request = post(COMPLETIONS, BODY, "Connection: close")
    with live_server(app) as url, dial(url) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(request), 7):
            connection.sendall(request[at : at + 7])
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 OK")


# -- clients that do not read


@pytest.mark.parametrize("close", [False, True])
def test_a_client_that_does_not_read_a_whole_answer_is_given_up_too(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, close: bool
) -> None:
    app, _ = served(ScriptedModel(), tokenizer, slow_client_timeout=0.3)
    wide = BODY | {"prompt": [[5]] * 60, "logprobs": 20}  # a megabyte
    with caplog.at_level(logging.INFO), live_server(app, send_buffer=4096) as url:
        with dial(url, receive_buffer=4096) as connection:
            connection.sendall(post(COMPLETIONS, wide, *(["Connection: close"] if close else [])))
            eventually(lambda: dropped(url, "slow_client") == 1)
            answer = read_to_end(connection)
        whole = httpx.post(f"{url}{COMPLETIONS}", json=wide, trust_env=False, timeout=60)

    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert len(answer) < len(whole.content)
    assert not [one for one in caplog.records if one.levelno > logging.INFO]


def test_a_client_that_reads_slowly_gets_its_whole_answer(tokenizer: Tokenizer) -> None:
    app, _ = served(ScriptedModel(), tokenizer, slow_client_timeout=3600)
    wide = BODY | {"prompt": [[5]] * 60, "logprobs": 20}
    with live_server(app, send_buffer=4096) as url, dial(url) as connection:
        connection.sendall(post(COMPLETIONS, wide, "Connection: close"))
        parts = []
        while part := connection.recv(3000):
            parts.append(part)

    assert Reply(b"".join(parts), 0).response.status == 200
    assert (
        json.loads(b"".join(parts).partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 1800
    )


# -- a limit on whole requests


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_request_that_takes_too_long_gets_504(
    tokenizer: Tokenizer, gated: GatedModel, path: str
) -> None:
    app, core = served(gated, tokenizer, request_timeout=0.5)
    body = BODY if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
    with live_server(app) as url:
        response = httpx.post(f"{url}{path}", json=body, trust_env=False, timeout=60)
        assert app.state.server.engine.num_open == 0
        gated.gate.set()
        again = httpx.get(f"{url}/live", trust_env=False)
        eventually(lambda: not core.has_work)
        assert_all_free(core)

    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "deadline_exceeded")
    assert "0.5 seconds" in error["message"]
    assert again.status_code == 200


def test_a_stream_that_takes_too_long_ends_with_an_event(
    tokenizer: Tokenizer, gated: GatedModel, caplog: pytest.LogCaptureFixture
) -> None:
    app, core = served(gated, tokenizer, request_timeout=2.0)
    with caplog.at_level(logging.INFO), live_server(app) as url:
        body = BODY | {"stream": True, "n": 2}
        response = httpx.post(f"{url}{COMPLETIONS}", json=body, trust_env=False, timeout=60)
        assert app.state.server.engine.num_open == 0
        gated.gate.set()
        eventually(lambda: not core.has_work)
        assert_all_free(core)

    assert response.status_code == 200
    *chunks, last = events(response.content)
    assert chunks
    assert last["error"]["code"] == "deadline_exceeded"
    (line,) = [one.getMessage() for one in caplog.records if one.name == "logitmill.request"]
    assert json.loads(line)["error"] == "deadline_exceeded"


def test_a_stream_that_nobody_reads_is_freed_in_time_all_the_same(tokenizer: Tokenizer) -> None:
    model = GatedModel(free_steps=200)
    core = scripted_core(model, tokenizer)
    app = make_app(lambda: (core, info(core)), request_timeout=1.0)
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "ignore_eos": True}
    with (
        live_server(app, send_buffer=4096) as url,
        dial(url, receive_buffer=4096) as connection,
    ):
        try:
            wide = body | {"logprobs": True, "top_logprobs": 20}
            connection.sendall(post(CHAT, wide, "Connection: close"))
            eventually(lambda: metric(url, ABORTED) == 1)
            assert app.state.server.num_inflight == 1
        finally:
            model.gate.set()
        answer = read_to_end(connection)

    assert b"deadline_exceeded" in answer
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_the_time_of_a_request_begins_with_its_head(tokenizer: Tokenizer) -> None:
    app, _ = served(ScriptedModel(), tokenizer, request_timeout=0.4)
    with live_server(app) as url:
        reply = exchange(url, HEAD.encode() + b"{")

    assert reply.response.status == 504
    assert reply.error["code"] == "deadline_exceeded"


def test_what_is_done_in_time_is_not_disturbed(tokenizer: Tokenizer) -> None:
    app, _ = served(ScriptedModel(), tokenizer, request_timeout=600)
    plain, _ = served(ScriptedModel(), tokenizer)
    texts = []
    for one in (app, plain):
        with live_server(one) as url, httpx.Client(base_url=url, trust_env=False) as client:
            texts.append(client.post(COMPLETIONS, json=BODY).json()["choices"])
            streamed = client.post(COMPLETIONS, json=BODY | {"stream": True})
            assert events(streamed.content)[-1]["choices"][0]["finish_reason"] == "length"
    assert texts[0] == texts[1]
