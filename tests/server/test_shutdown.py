"""The end of a server: drained, hurried, or forced by a model that cannot be served."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.core import EngineCore
from engine.errors import ModelUnavailable
from engine.prepare import ModelInfo
from engine.tokenizer import Tokenizer
from server.run import Server, serve
from server.settings import BadOption, resolve
from tests.support.engines import info, scripted_core
from tests.support.gated import GatedModel
from tests.support.scripted import ScriptedModel
from tests.support.servers import eventually, free_port, make_app
from tests.support.sockets import Reply, dial, post, read_to_end
from tests.support.wire import CHAT, COMPLETIONS, assembled, events

BODY = {"prompt": [5], "max_tokens": 30, "temperature": 0, "ignore_eos": True}


class Running:
    """A server in a thread of its own, to be sent signals."""

    def __init__(self, app: FastAPI, loop: str = "auto") -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = Server(app, host="127.0.0.1", port=0)
        self.server.config.loop = loop
        self.state = self.server.state
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.server.handle_exit(number, None)


@contextmanager
def running(
    app: FastAPI, gated: GatedModel | None = None, *, loop: str = "auto"
) -> Iterator[Running]:
    """A server that is over, and its model let go, when the test is."""
    one = Running(app, loop)
    one.thread.start()
    try:
        eventually(lambda: one.server.is_listening)
        yield one
    finally:
        if gated is not None:
            gated.gate.set()
        one.server.should_exit = True
        one.thread.join(60)
        one.listener.close()
        assert not one.thread.is_alive()


class Asked(threading.Thread):
    """A request that is being answered meanwhile."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__()
        self.url, self.body = url, body
        self.response: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.response = httpx.post(
            f"{self.url}{COMPLETIONS}", json=self.body, trust_env=False, timeout=60
        )

    @property
    def answer(self) -> httpx.Response:
        self.join(60)
        assert self.response is not None
        return self.response


@pytest.fixture
def gated() -> GatedModel:
    """A model that stops in the middle of an answer."""
    return GatedModel(free_steps=5)


def app_of(model: ScriptedModel, tokenizer: Tokenizer, **config: Any) -> FastAPI:
    core = scripted_core(model, tokenizer)
    return make_app(lambda: (core, info(core)), **config)


def refused_as_draining(response: httpx.Response) -> None:
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"
    assert response.headers["connection"] == "close"
    assert int(response.headers["retry-after"]) >= 1


def test_running_requests_end_well_and_new_ones_are_refused(
    tokenizer: Tokenizer, gated: GatedModel
) -> None:
    with running(app_of(gated, tokenizer), gated) as one:
        stream = Asked(one.url, BODY | {"stream": True})
        assert gated.stopped.wait(30)
        whole = Asked(one.url, BODY)
        eventually(lambda: one.state.engine.num_open == 2)
        one.signal()
        eventually(lambda: one.state.draining)

        with httpx.Client(base_url=one.url, trust_env=False) as client:
            for path, body in ((COMPLETIONS, BODY), (CHAT, {"messages": [{"role": "user",
                                "content": "hi"}]}), ("/tokenize", {"prompt": "a"})):  # fmt: skip
                refused_as_draining(client.post(path, json=body))
            probes = [client.get(path).status_code for path in ("/live", "/health", "/ready")]
            assert probes == [200, 200, 503]
        assert one.thread.is_alive()
        gated.gate.set()

        assert whole.answer.json()["choices"][0]["finish_reason"] == "length"
        answer = assembled(events(stream.answer.content))
        assert answer["choices"][0]["text"] == whole.answer.json()["choices"][0]["text"]
        one.thread.join(60)
        assert not one.thread.is_alive()
        assert one.server.exit_code == 0


def test_for_a_while_requests_are_still_taken(tokenizer: Tokenizer) -> None:
    app = app_of(ScriptedModel(), tokenizer, drain_delay=600)
    with running(app) as one:
        eventually(lambda: one.state.engine.info is not None)
        one.signal()
        eventually(lambda: not one.state.ready)

        with httpx.Client(base_url=one.url, trust_env=False) as client:
            assert client.get("/ready").json()["status"] == "draining"
            assert client.post(COMPLETIONS, json=BODY).status_code == 200
            one.signal()  # in a hurry
        one.thread.join(60)
        assert not one.thread.is_alive()


def test_an_interrupt_leaves_out_the_delay(tokenizer: Tokenizer) -> None:
    with running(app_of(ScriptedModel(), tokenizer, drain_delay=600)) as one:
        one.signal(signal.SIGINT)
        one.thread.join(60)
        assert not one.thread.is_alive()
        assert one.server.exit_code == 0


@pytest.mark.parametrize("hurried", [True, False], ids=["second signal", "timeout"])
def test_what_cannot_wait_is_cut_off_with_an_error(
    tokenizer: Tokenizer, gated: GatedModel, hurried: bool
) -> None:
    app = app_of(gated, tokenizer, shutdown_timeout=600 if hurried else 0.05)
    with running(app, gated) as one:
        stream = Asked(one.url, BODY | {"stream": True})
        assert gated.stopped.wait(30)
        whole = Asked(one.url, BODY)
        eventually(lambda: one.state.engine.num_open == 2)
        one.signal()
        if hurried:
            eventually(lambda: one.state.draining)
            one.signal()

        refused_as_draining(whole.answer)
        *chunks, last = events(stream.answer.content)
        assert chunks
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
        assert last.keys() == {"error"}
        assert (last["error"]["type"], last["error"]["code"]) == ("service_unavailable", "draining")
        gated.gate.set()
        one.thread.join(60)
        assert not one.thread.is_alive()
        assert one.server.exit_code == 0


HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n"


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_half_sent_requests_hold_up_nothing_and_are_told(
    tokenizer: Tokenizer, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = app_of(ScriptedModel(), tokenizer, shutdown_timeout=600, body_timeout=600)
    parts = {
        "body": HEAD + "\r\n{",
        "head": HEAD,
        "nothing": "",
        "idle": "GET /live HTTP/1.1\r\n\r\n",
    }
    with running(app, loop=loop) as one:
        connections = {kind: [dial(one.url) for _ in range(10)] for kind in parts}
        for kind, text in parts.items():
            for connection in connections[kind]:
                connection.sendall(text.encode())
        for connection in connections["idle"]:
            response = HTTPResponse(connection)
            response.begin()
            assert response.status == 200
            assert response.read()
        eventually(lambda: one.state.num_inflight == 10)
        eventually(lambda: len(one.server.server_state.connections) == 40)
        one.signal()

        told = {kind: [read_to_end(each) for each in some] for kind, some in connections.items()}
        one.thread.join(60)
        assert not one.thread.is_alive()
        for some in connections.values():
            for connection in some:
                connection.close()

    for raw in told["body"] + told["head"]:
        reply = Reply(raw, 0)
        assert reply.response.status == 503
        assert reply.error["code"] == "draining"
        assert int(reply.response.headers["retry-after"]) >= 1
    assert {*told["nothing"], *told["idle"]} == {b""}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_body_that_begins_after_the_signal_is_taken_until_the_delay_is_over(
    tokenizer: Tokenizer,
) -> None:
    with running(app_of(ScriptedModel(), tokenizer, drain_delay=600)) as one:
        eventually(lambda: one.state.engine.info is not None)
        request = post(COMPLETIONS, BODY)
        with dial(one.url) as first, dial(one.url) as second:
            one.signal()
            eventually(lambda: not one.state.ready)
            for connection in (first, second):
                connection.sendall(request[:-5])
            eventually(lambda: one.state.num_inflight == 2)
            first.sendall(request[-5:])
            assert first.recv(1000).startswith(b"HTTP/1.1 200 OK")
            one.signal()  # the delay is over
            assert Reply(read_to_end(second), 0).error["code"] == "draining"
        one.thread.join(60)
        assert not one.thread.is_alive()


def test_what_is_not_read_or_not_done_is_cut_off_without_a_trace(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream that its client leaves unread, and a text that a worker is not done with."""
    monkeypatch.setattr("server.run._LAST_ANSWERS_S", 0.5)
    model = GatedModel(free_steps=200)
    app = app_of(model, tokenizer, shutdown_timeout=0.0, slow_client_timeout=600)
    with running(app, model) as one:
        one.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        eventually(lambda: one.state.engine.info is not None)
        with dial(one.url, receive_buffer=4096) as unread, dial(one.url) as waiting:
            wide = {
                "messages": [{"role": "user", "content": "hi"}],
                "stream": True,
                "logprobs": True,
            }
            wide |= {"top_logprobs": 20, "ignore_eos": True}
            unread.sendall(post(CHAT, wide))
            long = {"prompt": "a" * 100_000}  # after which its worker ends
            assert httpx.post(f"{one.url}/tokenize", json=long, trust_env=False).is_success
            forker = one.state.workers._forker
            assert forker is not None
            process = forker.result()._process
            os.kill(process.pid, signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            waiting.sendall(post("/tokenize", long))
            eventually(lambda: one.state.num_inflight == 2)
            connections = one.server.server_state.connections
            eventually(lambda: any(each.flow.write_paused for each in connections))
            one.signal()
            assert Reply(read_to_end(waiting), 0).error["code"] == "draining"
            model.gate.set()
            one.thread.join(60)
            assert not one.thread.is_alive()

    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_terminal_that_goes_is_a_signal_to_end_unless_the_server_was_told_to_stay(
    tokenizer: Tokenizer,
) -> None:
    server = Server(app_of(ScriptedModel(), tokenizer), host="127.0.0.1", port=0)
    before = signal.getsignal(signal.SIGHUP)
    with server.capture_signals():
        assert signal.getsignal(signal.SIGHUP) == server.handle_exit
    assert signal.getsignal(signal.SIGHUP) is before
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with server.capture_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_process_ends_when_the_engine_is_dead(tokenizer: Tokenizer) -> None:
    class Breaking(ScriptedModel):
        def forward(self, *_args: Any) -> Any:
            raise RuntimeError("out of memory")

    with running(app_of(Breaking(), tokenizer)) as one:
        asked = Asked(one.url, BODY | {"stream": True})
        *_, last = events(asked.answer.content)
        assert last["error"]["code"] == "engine_dead"
        one.thread.join(60)
        assert not one.thread.is_alive()
        assert one.server.exit_code == 1


def test_the_process_ends_when_the_model_cannot_be_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def load() -> tuple[EngineCore, ModelInfo]:
        raise ModelUnavailable("it is a potato")

    with running(make_app(load)) as one:
        one.thread.join(60)
        assert not one.thread.is_alive()
        assert one.server.exit_code == 2
    assert "it is a potato" in caplog.text
    assert "Traceback" not in caplog.text


def test_idle_connections_outlive_the_pools_of_clients(tokenizer: Tokenizer) -> None:
    server = Server(app_of(ScriptedModel(), tokenizer), host="127.0.0.1", port=0)

    assert server.config.timeout_keep_alive >= 75


# -- the real process


@contextmanager
def process(*options: str) -> Iterator["subprocess.Popen[str]"]:
    """`python -m server serve` with its standard error as a pipe."""
    command = [sys.executable, "-m", "server", "serve", "--threads", "1", *options]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LOGITMILL_")}
    environment |= {name: os.environ[name] for name in ("LOGITMILL_HOME",) if name in os.environ}
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_served_folder_drains_on_a_signal(tiny_folder: Path, number: signal.Signals) -> None:
    port = free_port()
    options = ("--model", str(tiny_folder), "--port", str(port), "--drain-delay", "0")
    with (
        process(*options, "--kv-cache-memory", "4MiB", "--dtype", "float32") as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client,
    ):
        before: list[int] = []

        def status() -> int | None:
            assert server.poll() is None
            try:
                return client.get("/health").status_code
            except httpx.ConnectError:
                return None

        def healthy() -> bool:
            before.extend([found] if (found := status()) is not None else [])
            return before[-1:] == [200]

        eventually(healthy)
        (model,) = client.get("/v1/models").json()["data"]
        assert model["id"] == tiny_folder.name
        body = {"prompt": "the hen", "max_tokens": 240, "ignore_eos": True, "stream": True}
        content = b""
        with client.stream("POST", COMPLETIONS, json=body) as response:
            for chunk in response.iter_raw():
                if not content:
                    server.send_signal(number)
                content += chunk
        answer = assembled(events(content))
        _, errors = server.communicate(timeout=60)

    assert set(before) <= {503, 200}
    assert answer["choices"][0]["finish_reason"] == "length"
    assert server.returncode == 0
    requests = [json.loads(line[line.index("{") :]) for line in errors.splitlines() if
                "logitmill.request: {" in line]  # fmt: skip
    assert {"POST", "GET"} == {line["method"] for line in requests}
    assert "Traceback" not in errors


def test_an_interrupt_while_the_model_loads_leaves_the_loading_behind(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a daemon it would end with the interpreter, but not while it is inside torch."""
    port, may_load, codes = free_port(), threading.Event(), list[int]()

    def load(*_: Any) -> Any:
        eventually(lambda: answers(port))
        os.kill(os.getpid(), signal.SIGINT)
        assert may_load.wait(60)
        raise ModelUnavailable("too late")

    monkeypatch.setattr("server.run.load_engine", load)
    monkeypatch.setattr("os._exit", codes.append)
    try:
        serve(resolve({"model": str(tiny_folder), "port": port}, None, {}))
    finally:
        may_load.set()

    assert codes == [0]


def test_a_thread_that_does_not_end_is_left_behind(
    tiny_folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GatedModel()  # in the middle of a step
    core = scripted_core(model, tokenizer)
    port, codes = free_port(), list[int]()

    def ask_and_interrupt() -> None:
        eventually(lambda: answers(port))
        asked = Asked(f"http://127.0.0.1:{port}", BODY)
        assert model.stopped.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        refused_as_draining(asked.answer)

    def leave(code: int) -> None:
        codes.append(code)
        model.gate.set()

    monkeypatch.setattr("server.run.load_engine", lambda *_: (core, info(core)))
    monkeypatch.setattr("server.run._LAST_THREADS_S", 0.5)
    monkeypatch.setattr("os._exit", leave)
    asking = threading.Thread(target=ask_and_interrupt)
    asking.start()
    options = {"model": str(tiny_folder), "port": port, "shutdown_timeout": 0}
    assert serve(resolve(options, None, {})) == 0
    asking.join(60)

    assert codes == [0]


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/live", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_a_port_that_is_taken_is_a_clear_error(tiny_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = resolve({"model": str(tiny_folder), "port": port}, None, {})
        with pytest.raises(BadOption, match=f"127.0.0.1, port {port}: Address already in use"):
            serve(settings)
