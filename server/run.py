"""Run the server: a socket, uvicorn, and an end in steps."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from engine.client import EngineState
from engine.core import EngineCore
from engine.errors import ModelUnavailable
from engine.load import load_engine
from engine.memory import keep_collections_short
from engine.models.source import locate
from engine.prepare import ModelInfo
from server.app import create_app
from server.listener import UNLIMITED, Listener, raise_file_limit
from server.protocol import Connection
from server.settings import BadOption, Settings
from server.state import ServerState, shutting_down

_KEEP_ALIVE_S = 75  # clients keep connections in a pool for a minute
_LAST_ANSWERS_S = 5.0  # for the errors of requests that were cut off
_LAST_THREADS_S = 10.0  # for threads, once nothing is served any more

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
    server = Server(app, host=config.host, port=config.port, max_files=raise_file_limit())
    # The engine may be in the middle of a long step, a worker in a long text.
    last = threading.Timer(_LAST_THREADS_S, lambda: _leave(server.exit_code))
    last.daemon = True
    server.on_shutdown = last.start
    try:
        server.run(_listen(config.host, config.port))
    finally:
        last.cancel()
    if server.state.engine.state is EngineState.LOADING:
        # The thread that loads is left behind, and inside torch it would not survive the
        # interpreter's end. First it removes what it has half downloaded or converted.
        stopping.set()
        fetching.acquire(timeout=_LAST_ANSWERS_S)
        _leave(server.exit_code)
    return server.exit_code


def _leave(exit_code: int) -> None:
    """End the process, whatever its threads are doing."""
    logging.shutdown()
    os._exit(exit_code)


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
    """uvicorn, with a shutdown that lets requests finish, and connections of our own.

    SIGTERM or SIGHUP: readiness goes at once, but requests are taken for `drain_delay` so that
    balancers notice; then new ones, and those whose bodies are still coming, are refused while
    running ones get `shutdown_timeout`; the rest is ended with an error. SIGINT leaves out the
    delay, a second signal everything but the end.
    """

    def __init__(self, app: FastAPI, *, host: str, port: int, max_files: int = UNLIMITED) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http="httptools",
                ws="none",
                log_config=None,
                access_log=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_ANSWERS_S,  # type: ignore[arg-type]
            )
        )
        self.state: ServerState = app.state.server
        self.exit_code = 0
        self.is_listening = False
        self.on_shutdown: Callable[[], None] = lambda: None
        self._max_files = max_files
        self._listeners: list[Listener] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hurry = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop keeps only weak references

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then take connections from these sockets."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=[])
        state, connections, config = self.state, self.server_state, self.config
        for one in sockets or ():
            self._listeners.append(
                Listener(
                    one,
                    lambda: Connection(config, connections, self.lifespan.state, state),
                    lambda: state.metrics.on_dropped("no_files"),
                    max_files=self._max_files,
                    backlog=config.backlog,
                )
            )
        self.is_listening = True

    async def main_loop(self) -> None:
        """Until it is time to go; called by uvicorn once the socket is open."""
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
        self.state.drain()
        await self._until_idle(timeout_s, or_hurry=True)
        self.state.engine.fail_all(shutting_down())
        self.state.give_up()
        await self._end()

    async def _end(self) -> None:
        """Let those who have been told the end read it, and go."""
        await self._until_idle(_LAST_ANSWERS_S, or_hurry=False)
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.cut()
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
        await self._end()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the sockets, wait for the last answers, stop the application."""
        self.on_shutdown()
        for listener in self._listeners:
            listener.close()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, and SIGHUP too: a terminal that goes, unless under nohup."""
        with super().capture_signals():
            hangup = getattr(signal, "SIGHUP", None)
            in_main = threading.current_thread() is threading.main_thread()
            if hangup is None or not in_main or signal.getsignal(hangup) is signal.SIG_IGN:
                yield
                return
            before = signal.signal(hangup, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(hangup, before)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
