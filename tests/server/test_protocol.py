"""HTTP below the application: what is bounded, and who is told what."""

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.tokenizer import Tokenizer
from server.protocol import HEAD_BYTES, TARGET_BYTES
from server.run import Server
from tests.support.engines import info, scripted_core
from tests.support.gated import GatedModel
from tests.support.scripted import ScriptedModel
from tests.support.servers import eventually, live, live_server, make_app
from tests.support.sockets import MOST_TAKEN, dial, exchange, post, read_to_end
from tests.support.wire import COMPLETIONS

BODY = {"prompt": [5], "max_tokens": 3, "temperature": 0, "ignore_eos": True}
LIVE = b"GET /live HTTP/1.1\r\n\r\n"
LAST = b"GET /live HTTP/1.1\r\nConnection: close\r\n\r\n"
CHUNKED = (
    f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Type: application/json\r\n"
    "Transfer-Encoding: chunked\r\n\r\n"
).encode()


def app_of(model: ScriptedModel, tokenizer: Tokenizer, **config: Any) -> FastAPI:
    core = scripted_core(model, tokenizer)
    return make_app(lambda: (core, info(core)), **config)


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def url(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A server with a key and a limit on bodies, on each of the loops it may run on."""
    app = app_of(ScriptedModel(), tokenizer, api_key="k", max_body_bytes="1MiB")
    with live_server(app, loop=request.param) as url:
        yield url


# -- heads


TOO_LARGE = "request_header_fields_too_large"


@pytest.mark.parametrize(
    ("begin", "flood", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\nX: ", b"a", 431, TOO_LARGE),
        (b"GET / HTTP/1.1\r\nAuthorization: Bearer ", b"a", 431, TOO_LARGE),
        (b"GET / HTTP/1.1\r\n", b"X: a\r\n", 431, TOO_LARGE),
        (b"GET / HTTP/1.1\r\n", b"X", 431, TOO_LARGE),
        (b"GET /", b"a", 414, "uri_too_long"),
        (b"GET /?", b"a", 414, "uri_too_long"),
        (b"", b"\r\n", 400, "invalid_http"),
    ],
    ids=["value", "key", "fields", "name", "path", "query", "line breaks"],
)
def test_a_head_has_a_largest_size_before_anybody_looks_at_it(
    url: str, begin: bytes, flood: bytes, status: int, code: str
) -> None:
    reply = exchange(url, begin, flood=flood)

    assert reply.response.status == status
    assert (reply.error["type"], reply.error["code"]) == ("invalid_request_error", code)
    assert reply.num_sent < MOST_TAKEN
    limit = TARGET_BYTES if status == 414 else HEAD_BYTES
    assert str(limit) in reply.error["message"]


def test_a_head_up_to_the_limit_is_answered(url: str) -> None:
    begin, end = b"GET /live HTTP/1.1\r\nConnection: close\r\nX: ", b"\r\n\r\n"
    room = HEAD_BYTES - len(begin) - len(end)

    assert exchange(url, begin + b"a" * room + end).response.status == 200
    assert exchange(url, begin + b"a" * (room + 2048) + end).response.status == 431


def test_every_head_of_a_connection_is_bounded(url: str) -> None:
    body = post(COMPLETIONS, BODY, "Authorization: Bearer k")
    reply = exchange(url, LIVE + body + LIVE + b"GET / HTTP/1.1\r\nX: ", flood=b"a")

    assert reply.raw.count(b"HTTP/1.1 200 OK") == 3
    assert reply.raw.count(b"HTTP/1.1 431 ") == 1
    assert reply.num_sent < MOST_TAKEN


@pytest.mark.parametrize(
    "head",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"HELLO\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nName with spaces: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET x HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_not_http_is_told_so_in_the_apis_form(url: str, head: bytes) -> None:
    reply = exchange(url, head)

    assert reply.response.status == 400
    assert (reply.error["type"], reply.error["code"]) == ("invalid_request_error", "invalid_http")


def test_such_requests_are_logged_and_counted(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level("INFO", logger="logitmill.request"),
        live_server(app_of(ScriptedModel(), tokenizer)) as url,
    ):
        reply = exchange(url, b"GET /?%b" % (b"a" * 20_000))
        ours = exchange(url, b"GET / HTTP/1.1\r\nX-Request-Id: mine\r\nA: b\r\nX Y: 1\r\n\r\n")
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text

    assert ours.response.headers["x-request-id"] == "mine"
    lines = [one.getMessage() for one in caplog.records if one.name == "logitmill.request"]
    assert [line for line in lines if reply.response.headers["x-request-id"] in line]
    assert not [line for line in lines if "aaaa" in line]
    assert 'http_requests_total{handler="unmatched",method="GET",status="414"} 1.0' in metrics


# -- bodies


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (f"POST {COMPLETIONS} HTTP/1.1\r\n", 401),
        ("POST /nowhere HTTP/1.1\r\nAuthorization: Bearer k\r\n", 404),
        ("PUT /live HTTP/1.1\r\n", 405),
        ("GET /live HTTP/1.1\r\n", 200),
        (f"POST {COMPLETIONS} HTTP/1.1\r\nAuthorization: Bearer k\r\n", 413),
    ],
)
@pytest.mark.parametrize("framing", ["Content-Length: 1000000000", "Transfer-Encoding: chunked"])
def test_behind_an_answer_a_body_is_read_for_a_while_and_kept_by_nobody(
    url: str, head: str, status: int, framing: str
) -> None:
    flood = b" " if "Length" in framing else b"1000\r\n%b\r\n" % (b" " * 0x1000)

    reply = exchange(url, f"{head}{framing}\r\n\r\n".encode(), flood=flood)

    assert reply.response.status == status
    assert reply.response.headers["connection"] == "close"
    assert reply.num_sent < MOST_TAKEN


def test_a_client_of_which_no_body_is_read_can_read_the_answer_first(url: str) -> None:
    """Closed on unread bytes, a connection is reset, and takes the answer with it."""
    body = b" " * 4_000_000
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
    with dial(url) as connection:
        connection.sendall(head.encode() + body)
        response = read_to_end(connection)

    assert response.startswith(b"HTTP/1.1 401 ")
    assert b"invalid_api_key" in response


def test_a_small_body_behind_a_refusal_leaves_the_connection_open(url: str) -> None:
    wrong = post(COMPLETIONS, BODY, "Authorization: Bearer wrong")

    reply = exchange(url, wrong + wrong + LAST)

    assert reply.raw.count(b"HTTP/1.1 401 ") == 2
    assert reply.raw.count(b"HTTP/1.1 200 OK") == 1


@pytest.mark.parametrize(
    ("begin", "flood"),
    [
        (b"2;", b"a"),
        (b"2\r\n{}\r\n0\r\nX: ", b"a"),
        (b"2\r\n{}\r\n0\r\n", b"X: a\r\n"),
        (b"", b"1\r\n \r\n"),
        (b"", b"0"),
        (b"2\r\n{}zz", b""),
        (b"x\r\n{}\r\n", b""),
    ],
    ids=["extension", "trailer", "trailers", "tiny chunks", "zeros", "no line end", "no size"],
)
def test_what_stands_around_a_body_is_bounded_too(url: str, begin: bytes, flood: bytes) -> None:
    head = CHUNKED.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer k\r\n\r\n")

    reply = exchange(url, head + begin, flood=flood)

    assert reply.response.status == 400
    assert reply.error["code"] == "invalid_http"
    assert reply.num_sent < MOST_TAKEN


def test_chunks_of_any_reasonable_size_are_a_body(url: str) -> None:
    text = post(COMPLETIONS, BODY).partition(b"\r\n\r\n")[2]
    head = CHUNKED.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer k\r\nConnection: close\r\n\r\n")
    single = b"".join(b"1\r\n%c\r\n" % byte for byte in text)
    padded = b"4000;name=value\r\n%b\r\n" % (b" " * 0x4000) * 60
    for chunks in (single, padded + single):
        reply = exchange(url, head + chunks + b"0\r\nX: trailer\r\n\r\n")
        assert reply.response.status == 200


def test_a_trailer_is_no_header(url: str) -> None:
    trailers = b"0\r\nAuthorization: Bearer k\r\nX-Request-Id: forged\r\n\r\n"
    reply = exchange(url, CHUNKED + b"2\r\n{}\r\n" + trailers + LAST)

    assert reply.response.status == 401
    assert b"forged" not in reply.raw


# -- several requests at once


def test_requests_sent_ahead_are_answered_in_order(url: str) -> None:
    bodies = [BODY | {"request_id": f"r{number}"} for number in range(20)]
    requests = [post(COMPLETIONS, body, "Authorization: Bearer k") for body in bodies]

    raw = exchange(url, b"".join(requests) + LIVE * 3000 + LAST).raw

    places = [raw.index(f'"cmpl-r{number}"'.encode()) for number in range(20)]
    assert places == sorted(places)
    assert raw.count(b"HTTP/1.1 200 OK") == 3021


def test_requests_sent_ahead_wait_unread(tokenizer: Tokenizer) -> None:
    """Each parsed request would cost kilobytes, and the time to parse it, which is everybody's."""
    model = GatedModel(free_steps=1)
    app = app_of(model, tokenizer)
    with live(app) as (url, server), dial(url) as connection:
        try:
            connection.settimeout(1)
            connection.sendall(post(COMPLETIONS, BODY))
            assert model.stopped.wait(30)
            with pytest.raises(TimeoutError):  # it is not read any more
                connection.sendall(LIVE * 1_000_000)
            assert num_queued(server) < 100
            assert app.state.server.num_inflight == 1
        finally:
            model.gate.set()
        connection.settimeout(30)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")


def num_queued(server: Server) -> int:
    return max(len(one.pipeline) for one in server.server_state.connections)


def test_garbage_behind_a_request_does_not_spoil_its_answer(url: str) -> None:
    reply = exchange(url, LIVE + b"GARBAGE\r\n\r\n")

    assert reply.response.status == 200
    assert reply.raw.count(b"HTTP/1.1 ") == 1
    later = exchange(url, post(COMPLETIONS, BODY, "Authorization: Bearer k") + b"\0" * 5000)
    assert later.raw.startswith(b"HTTP/1.1 200 OK")


# -- offers to change the protocol


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_upgrade_is_declined_and_the_request_answered(
    url: str, protocol: str, chunked: bool
) -> None:
    offer = (
        "Authorization: Bearer k",
        "Connection: Upgrade, HTTP2-Settings",
        f"Upgrade: {protocol}",
    )
    request = post(COMPLETIONS, BODY, *offer, "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk")
    if chunked:
        head, _, body = request.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if b"Content-Length" not in line]
        framed = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        request = b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", framed])

    with dial(url) as connection:
        connection.sendall(request[:-20])
        connection.sendall(request[-20:])
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close" in answer
    bare = b"\r\n".join([b"GET /live HTTP/1.1", *(line.encode() for line in offer), b"", b""])
    assert exchange(url, bare).response.status == 200


# -- clients that send no more


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_close_their_side_behind_a_request_get_its_answer(
    url: str, stream: bool
) -> None:
    body = BODY | {"max_tokens": 30, "stream": stream}
    request = post(COMPLETIONS, body, "Authorization: Bearer k")
    connections = [dial(url) for _ in range(48)]
    for connection in connections:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
    answers = [read_to_end(connection) for connection in connections]
    for connection in connections:
        connection.close()

    ends = [
        answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else b"}}}")
        for answer in answers
    ]
    assert ends == [True] * 48
    assert exchange(url, request + LIVE, half_close=True).raw.count(b" 200 OK") == 2


def test_while_such_a_client_waits_it_is_sent_nothing_it_must_not_get(
    tokenizer: Tokenizer,
) -> None:
    model = GatedModel(free_steps=2)
    with live_server(app_of(model, tokenizer)) as url, dial(url) as one, dial(url) as other:
        try:
            one.sendall(post(COMPLETIONS, BODY))
            one.shutdown(socket.SHUT_WR)
            other.sendall(post(COMPLETIONS, BODY | {"stream": True}))
            other.shutdown(socket.SHUT_WR)
            before = one.recv(1000)
            begun = b""
            while b": keep-alive" not in begun:
                begun += other.recv(1000)
        finally:
            model.gate.set()
        whole, stream = before + read_to_end(one), begun + read_to_end(other)

    continues = b"HTTP/1.1 100 Continue\r\n\r\n"
    assert before.startswith(continues)
    rest = whole.replace(continues, b"")
    assert rest.startswith(b"HTTP/1.1 200 OK")
    assert rest.endswith(b"}}}")
    assert stream.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_closes_its_side_and_then_leaves_is_noticed(
    tokenizer: Tokenizer, stream: bool
) -> None:
    model = GatedModel(free_steps=2)
    app = app_of(model, tokenizer)
    with live_server(app) as url:
        try:
            connection = dial(url)
            connection.sendall(post(COMPLETIONS, BODY | {"stream": stream}))
            connection.shutdown(socket.SHUT_WR)
            assert model.stopped.wait(30)
            assert connection.recv(1000)  # a sign that it is not taken for gone
            assert app.state.server.engine.num_open == 1
            connection.close()
            eventually(lambda: app.state.server.engine.num_open == 0)
        finally:
            model.gate.set()


@pytest.mark.parametrize(
    "request_",
    [post(COMPLETIONS, BODY)[:-2], post(COMPLETIONS, BODY, version="1.0")],
    ids=["half a body", "HTTP/1.0"],
)
def test_half_a_request_or_one_of_http_1_0_ends_with_its_client(
    tokenizer: Tokenizer, request_: bytes
) -> None:
    """Nothing may be written to a client of HTTP/1.0 before its answer to find out."""
    model = GatedModel(free_steps=2)
    app = app_of(model, tokenizer)
    with live_server(app) as url:
        try:
            with dial(url) as connection:
                connection.sendall(request_)
                eventually(lambda: app.state.server.num_inflight == 1)
                connection.shutdown(socket.SHUT_WR)
                assert read_to_end(connection) == b""
            eventually(lambda: app.state.server.num_inflight == 0)
        finally:
            model.gate.set()
