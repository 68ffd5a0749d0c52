"""The application in a test: behind httpx without a socket, or on one."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from engine.core import EngineCore
from engine.prepare import ModelInfo
from server.app import create_app
from server.config import ServerConfig
from server.run import Server

MODEL = "tiny"
Load = Callable[[], tuple[EngineCore, ModelInfo]]


def make_app(load: Load, *, max_waiting: int = 1024, **config: Any) -> FastAPI:
    """The application around an engine; options of `ServerConfig` as keywords."""
    settings = ServerConfig.model_validate({"drain_delay": 0.0} | config)
    return create_app(load, settings, [MODEL], max_waiting=max_waiting)


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
def live_server(app: FastAPI) -> Iterator[str]:
    """The application on a real socket of 127.0.0.1, in a thread; gives its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = Server(app, host="127.0.0.1", port=0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(trust_env=False, timeout=10) as client:
                for _ in range(2000):
                    if _healthy(client, url):
                        break
                else:
                    raise AssertionError("the server did not become healthy")
            yield url
        finally:
            server.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()


def _healthy(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
