"""The application in a test: behind httpx without a socket, or on one."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Literal

import httpx
import torch
from fastapi import FastAPI

from engine.core import EngineCore
from engine.prepare import ModelInfo
from server.app import create_app
from server.config import ServerConfig
from server.listener import UNLIMITED
from server.run import Server

MODEL = "tiny"
Load = Callable[[], tuple[EngineCore, ModelInfo]]


def make_app(load: Load, *, max_waiting: int = 1024, **config: Any) -> FastAPI:
    """The application around an engine; options of `ServerConfig` as keywords."""
    settings = ServerConfig.model_validate({"drain_delay": 0.0} | config)

    def load_with_one_thread() -> tuple[EngineCore, ModelInfo]:
        torch.set_num_threads(1)  # a thread, as the engine's is, starts with a count of its own
        return load()

    return create_app(load_with_one_thread, settings, [MODEL], max_waiting=max_waiting)


@asynccontextmanager
async def asgi_client(app: FastAPI, *, wait: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    """A client that talks to the application in this event loop; streams arrive whole."""
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
    ):
        if wait:
            await asyncio.wait_for(app.state.server.engine.loaded(), 60)
        yield client


@contextmanager
def live_server(app: FastAPI, **options: Any) -> Iterator[str]:
    """The application on a real socket of 127.0.0.1, in a thread; gives its URL."""
    with live(app, **options) as (url, _):
        yield url


@contextmanager
def live(
    app: FastAPI,
    *,
    send_buffer: int | None = None,
    loop: Literal["auto", "asyncio", "uvloop"] = "auto",
    max_files: int = UNLIMITED,
) -> Iterator[tuple[str, Server]]:
    """The same, with the server.

    `send_buffer` limits what the system keeps of an answer that is not read.
    """
    with socket.socket() as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.bind(("127.0.0.1", 0))
        server = Server(app, host="127.0.0.1", port=0, max_files=max_files)
        server.config.loop = loop
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(trust_env=False, timeout=10) as client:
                eventually(lambda: _healthy(client, url) or not thread.is_alive())
            assert thread.is_alive(), "the server has ended"
            yield url, server
        finally:
            server.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what another thread will soon make true."""
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError("it never happened")


def _healthy(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
