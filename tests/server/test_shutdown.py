"""The end of a server: drained, hurried, or forced by a model that cannot be served."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
from tests.support.wire import CHAT, COMPLETIONS, assembled, events

BODY = {"prompt": [5], "max_tokens": 30, "temperature": 0, "ignore_eos": True}


class Running:
    """A server in a thread of its own, to be sent signals."""

    def __init__(self, app: FastAPI) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = Server(app, host="127.0.0.1", port=0)
        self.state = self.server.state
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.server.handle_exit(number, None)


@contextmanager
def running(app: FastAPI, gated: GatedModel | None = None) -> Iterator[Running]:
    """A server that is over, and its model let go, when the test is."""
    one = Running(app)
    one.thread.start()
    try:
        eventually(lambda: one.server.started)
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


def test_a_served_folder_drains_on_sigterm(tiny_folder: Path) -> None:
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
                    server.send_signal(signal.SIGTERM)
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
