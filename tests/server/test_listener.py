"""Connections beyond the files there are for them."""

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from engine.tokenizer import Tokenizer
from server.listener import raise_file_limit
from tests.support.engines import info, scripted_core
from tests.support.scripted import ScriptedModel
from tests.support.servers import eventually, free_port, live, make_app
from tests.support.sockets import Reply, dial, exchange, read_to_end

LIVE = b"GET /live HTTP/1.1\r\nConnection: close\r\n\r\n"
LOGGER = "server.listener"


@pytest.fixture
def app(tokenizer: Tokenizer) -> FastAPI:
    core = scripted_core(ScriptedModel(), tokenizer)
    return make_app(lambda: (core, info(core)))


def next_file() -> int:
    """The number that the next file gets."""
    with open(os.devnull) as file:
        return file.fileno()


def limit_that_leaves(num_files: int) -> int:
    """A limit that so many more files reach, the server's own left aside."""
    wanted = next_file() + num_files
    return next(limit for limit in range(wanted, 1 << 20) if limit - min(64, limit // 4) >= wanted)


def refused(raw: bytes) -> None:
    reply = Reply(raw, 0)
    assert reply.response.status == 503
    assert (reply.error["type"], reply.error["code"]) == ("service_unavailable", "overloaded")
    assert int(reply.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_connections_beyond_the_files_are_turned_away_with_a_word(
    app: FastAPI, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    limit = limit_that_leaves(40)  # of which a connection takes two, one here and one there
    answers: list[bytes] = []
    with ExitStack() as opened, live(app, loop=loop, max_files=limit) as (url, server):
        for _ in range(60):
            connection = opened.enter_context(dial(url))
            connection.sendall(b"GET /live HTTP/1.1\r\n\r\n")
            answers.append(connection.recv(1000))
        served = [answer for answer in answers if answer.startswith(b"HTTP/1.1 200 OK")]
        told = answers[len(served) :]
        assert len(served) >= 15
        assert len(told) >= 35
        for answer in told:
            refused(answer)
        assert len(server.server_state.connections) == len(served)
        opened.close()
        eventually(lambda: not server.server_state.connections)
        assert exchange(url, LIVE).response.status == 200
        text = app.state.server.metrics.export().decode()

    (line,) = [one.getMessage() for one in caplog.records if one.name == LOGGER]  # not one for each
    assert str(limit) in line
    (count,) = [
        one for one in text.splitlines() if 'connections_dropped_total{reason="no_files"' in one
    ]
    assert float(count.split()[-1]) >= len(told)


@contextmanager
def no_files_left() -> Iterator[None]:
    """While not even a single file can be opened in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(name) for name in os.listdir("/proc/self/fd"))
    with ExitStack() as opened:
        while opened.enter_context(open(os.devnull)).fileno() < most:
            pass  # so that every number below the limit is taken
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_file(), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_without_a_single_file_a_client_is_told_and_so_is_the_log(
    app: FastAPI, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    with live(app, loop=loop) as (url, server):
        eventually(lambda: not server.server_state.connections)
        port = int(url.rpartition(":")[2])
        with socket.socket() as one, socket.socket() as other:
            for connection in (one, other):
                connection.settimeout(30)
            with no_files_left():
                for connection in (one, other):
                    connection.connect(("127.0.0.1", port))
                answers = [read_to_end(one), read_to_end(other)]
        for answer in answers:
            refused(answer)
        assert exchange(url, LIVE).response.status == 200  # and it takes connections again

    records = [one for one in caplog.records if one.name == LOGGER]
    assert len(records) == 1
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


def test_the_process_may_open_as_many_files_as_it_is_allowed() -> None:
    program = (
        "import resource\n"
        "from server.listener import raise_file_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))\n"
        "print(raise_file_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout == "300 (300, 300)\n"
    assert raise_file_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_a_server_with_few_files_keeps_those_it_needs(tiny_folder: Path, tmp_path: Path) -> None:
    """256 is what some systems give; a model must load beside whatever connections come."""
    port = free_port()
    options = ["--model", str(tiny_folder), "--port", str(port), "--drain-delay", "0"]
    options += ["--kv-cache-memory", "4MiB", "--dtype", "float32", "--threads", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LOGITMILL_")}
    log = tmp_path / "log"
    with log.open("w") as errors:
        server = subprocess.Popen(
            [
                "sh",
                "-c",
                'ulimit -n 256; exec "$0" "$@"',
                sys.executable,
                "-m",
                "server",
                "serve",
                *options,
            ],
            stderr=errors,
            env=environment | {"LOGITMILL_HOME": str(tmp_path)},
        )
    url = f"http://127.0.0.1:{port}"
    connections: list[socket.socket] = []
    try:
        eventually(lambda: answers(url))
        connections = [dial(url) for _ in range(300)]
        eventually(lambda: "refused" in log.read_text())
        for connection in connections[:20]:
            connection.close()
        body = {"prompt": "the hen", "max_tokens": 2}
        eventually(lambda: completes(url, body))
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
        for connection in connections:
            connection.close()
    assert "Traceback" not in log.read_text()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/live", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def completes(url: str, body: dict[str, object]) -> bool:
    response = httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=30)
    if response.status_code != 200:
        assert json.loads(response.text)["error"]["code"] in ("overloaded", "model_loading")
    return response.status_code == 200
