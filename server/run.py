"""Run the server: a socket, uvicorn, and an end in steps."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Coroutine
from types import FrameType

import uvicorn
from fastapi import FastAPI

from engine.client import EngineState
from engine.core import EngineCore
from engine.errors import ModelUnavailable, Overloaded
from engine.load import load_engine
from engine.memory import keep_collections_short
from engine.models.source import locate
from engine.prepare import ModelInfo
from server.app import create_app
from server.settings import BadOption, Settings
from server.state import ServerState

_KEEP_ALIVE_S = 75  # clients keep connections in a pool for a minute
_LAST_ANSWERS_S = 5.0  # for the errors of requests that were cut off

log = logging.getLogger(__name__)


def serve(settings: Settings) -> int:
    """Serve until a signal or the engine's death; returns the exit code.

    Raises ModelUnavailable if there is no such model, BadOption if the port cannot be had.
    """
    location = locate(settings.engine.model, settings.source)
    amateur_name = settings.engine.amateur_model
    amateur = None if amateur_name is None else locate(amateur_name)

    stopping, fetching = threading.Event(), threading.Lock()

    def load() -> tuple[EngineCore, ModelInfo]:
        with fetching:
            beside = None if amateur is None else (amateur.name, amateur.fetch(stopping))
            folder = location.fetch(stopping)
        loaded = load_engine(settings.engine, folder, beside)
        keep_collections_short()
        return loaded

    config = settings.server
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    app = create_app(
        load,
        config,
        config.served_model_name or [location.name],
        max_waiting=settings.engine.max_waiting,
        sampling=settings.sampling,
        warm=True,
    )
    server = Server(app, host=config.host, port=config.port)
    server.run(_listen(config.host, config.port))
    if server.state.engine.state is EngineState.LOADING:
        # The thread that loads is left behind, and inside torch it would not survive the
        # interpreter's end. First it removes what it has half downloaded or converted.
        stopping.set()
        fetching.acquire(timeout=_LAST_ANSWERS_S)
        logging.shutdown()
        os._exit(server.exit_code)
    return server.exit_code


def _listen(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of a host. uvicorn would only do it once the model is loading."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, _, _, _, address in found:
            sockets.append(socket.create_server(address, family=family))
            shown = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
            log.info("listening on http://%s:%d", shown, sockets[-1].getsockname()[1])
    except OSError as error:
        for one in sockets:
            one.close()
        reason = str(error.strerror).partition(" (")[0]  # behind it is the address again
        raise BadOption(f"cannot listen on {host}, port {port}: {reason}") from error
    return sockets


class Server(uvicorn.Server):
    """uvicorn, with a shutdown that lets requests finish.

    SIGTERM: readiness goes at once, but requests are taken for `drain_delay` so that balancers
    notice; then new ones are refused while running ones get `shutdown_timeout`; the rest is ended
    with an error. SIGINT leaves out the delay, a second signal everything but the end.
    """

    def __init__(self, app: FastAPI, *, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_config=None,
                access_log=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_ANSWERS_S,  # type: ignore[arg-type]
            )
        )
        self.state: ServerState = app.state.server
        self.exit_code = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hurry = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop keeps only weak references

    async def main_loop(self) -> None:
        """Until it is time to go; called by uvicorn once the socket is open."""
        self._loop = asyncio.get_running_loop()
        self._start(self._watch())
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown, or hurry the one that has begun; called by uvicorn on a signal."""
        if self._loop is None:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._on_signal, sig)

    def _on_signal(self, sig: int) -> None:
        if not self.state.ready:
            self._hurry.set()
            return
        self.state.ready = False
        config = self.state.config
        delay_s = 0.0 if sig == signal.SIGINT else config.drain_delay
        self._start(self._drain(delay_s, config.shutdown_timeout))

    async def _drain(self, delay_s: float, timeout_s: float) -> None:
        log.info("draining: %d requests are running", self.state.num_inflight)
        await self._pause(delay_s)
        self.state.draining = True
        await self._until_idle(timeout_s, or_hurry=True)
        self.state.engine.fail_all(Overloaded("the server is shutting down", "draining"))
        await self._until_idle(_LAST_ANSWERS_S, or_hurry=False)
        self.should_exit = True

    async def _until_idle(self, limit_s: float, *, or_hurry: bool) -> None:
        """Wait until no request is being answered."""
        ends_at = asyncio.get_running_loop().time() + limit_s
        while self.state.num_inflight and asyncio.get_running_loop().time() < ends_at:
            if or_hurry and self._hurry.is_set():
                return
            await asyncio.sleep(0.02)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            pass

    async def _watch(self) -> None:
        """End the process when the engine cannot go on: whoever started it can start it again."""
        error = await self.state.engine.died()
        self.exit_code = 2 if isinstance(error, ModelUnavailable) else 1
        log.error("%s", error)
        await self._until_idle(_LAST_ANSWERS_S, or_hurry=False)
        self.should_exit = True

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
