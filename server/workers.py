"""The server's end of the processes that read bodies."""

import asyncio
import io
import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from contextlib import suppress

from engine.errors import GenerationFailed, Overloaded
from engine.messages import Request
from server.errors import ApiError
from server.inputs import Incoming, Input, Reader
from server.worker import FORK, LARGE_BYTES, too_much

_MOST_WORKERS = 4
_MOST_LARGE = 2  # bodies at once that take long: the others have workers left
_MOST_WAITING = 64  # bodies: what they hold in memory is bounded, too
_MOST_READ = 1000  # by one worker, whose memory may grow a little with each
_START_S = 60.0
_PATIENCE_S = 120.0  # for one body, whose reader the system has ended long before
_LENGTH = struct.Struct("!Q")

log = logging.getLogger(__name__)


class Workers:
    """Reads bodies in other processes, started when the first one comes. For the event loop."""

    def __init__(self) -> None:
        self._forker: asyncio.Task[_Forker] | None = None
        self._idle: deque[_Worker] = deque()
        self._free = asyncio.Semaphore(_MOST_WORKERS)
        self._free_large = asyncio.Semaphore(_MOST_LARGE)
        self._num_waiting = 0

    async def warm_up(self, reader: Reader) -> None:
        """Start before anybody needs it."""
        await self._forker_of(reader)

    async def read(self, incoming: Incoming, reader: Reader) -> Input:
        """Have a body read. Raises ApiError, also for what takes too much, and Overloaded."""
        if self._num_waiting >= _MOST_WAITING:
            raise Overloaded("too many bodies are waiting to be read; try again later")
        self._num_waiting += 1
        try:
            if len(incoming.data) < LARGE_BYTES:
                return await self._read(incoming, reader)
            async with self._free_large:
                return await self._read(incoming, reader)
        finally:
            self._num_waiting -= 1

    async def stop(self) -> None:
        """End all of them."""
        while self._idle:
            self._idle.pop().close()
        forker, self._forker = self._forker, None
        if forker is not None:
            with suppress(Overloaded):  # it has never started
                await asyncio.to_thread((await forker).stop)

    async def _read(self, incoming: Incoming, reader: Reader) -> Input:
        async with self._free:
            worker = await self._worker(reader)
            content = None
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    content = await worker.ask(pickle.dumps(incoming))
            except (OSError, EOFError, TimeoutError):
                log.warning("a worker has ended over a body of %d bytes", len(incoming.data))
                raise too_much() from None
            finally:
                if content is None:  # also where nobody waits any more
                    worker.kill()
                elif len(incoming.data) >= LARGE_BYTES or worker.num_read >= _MOST_READ:
                    worker.close()
                else:
                    self._idle.append(worker)
                    if len(self._idle) > 1:  # one is there at once, others soon
                        self._idle.popleft().close()
        return await _unpickled(content)

    async def _worker(self, reader: Reader) -> "_Worker":
        """One that has nothing to do, or a new one."""
        while self._idle:
            worker = self._idle.pop()
            if not worker.has_ended:
                return worker
            worker.close()
        forker = await self._forker_of(reader)
        try:
            return await forker.fork()
        except (OSError, EOFError):
            log.warning("the process that forks workers has ended; another one is started")
            if self._forker is not None and self._forker.done() and self._forker.result() is forker:
                await self.stop()
            try:
                return await (await self._forker_of(reader)).fork()
            except (OSError, EOFError) as error:
                raise _unstarted() from error

    async def _forker_of(self, reader: Reader) -> "_Forker":
        if self._forker is None:
            self._forker = asyncio.create_task(_Forker.start(reader))
        task = self._forker
        try:
            # Whoever waits first may leave; the others still wait for it.
            return await asyncio.shield(task)
        except Overloaded:
            if self._forker is task:
                self._forker = None  # the next one tries again
            raise


class _Worker:
    """A process that reads one body after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.pid = 0
        self.num_read = 0

    async def ask(self, message: bytes) -> bytes:
        """Send a message and wait for the answer. Raises OSError or EOFError if it ends."""
        self._writer.write(_LENGTH.pack(len(message)))
        self._writer.write(message)
        await self._writer.drain()
        self.num_read += 1
        return await self.receive()

    async def receive(self) -> bytes:
        (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
        return await self._reader.readexactly(int(size))

    @property
    def has_ended(self) -> bool:
        return self._reader.at_eof()

    def close(self) -> None:
        """Let it end; it does once it is done with what it has."""
        self._writer.close()

    def kill(self) -> None:
        """End it in the middle of whatever it does."""
        if self.pid and not self.has_ended:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._writer.close()


class _Forker:
    """The process that workers are forks of."""

    def __init__(self, process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
        self._process = process
        self._control = control

    @classmethod
    async def start(cls, reader: Reader) -> "_Forker":
        """Raises Overloaded if the system has no room for it."""
        content = await asyncio.to_thread(pickle.dumps, reader)
        control, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.to_thread(_start, theirs.fileno())
        except OSError as error:
            control.close()
            raise _unstarted() from error
        forker = cls(process, control)
        try:
            await asyncio.wait_for(asyncio.to_thread(forker._send, content), _START_S)
        except (OSError, TimeoutError) as error:
            await asyncio.to_thread(forker.stop)
            raise _unstarted() from error
        return forker

    def _send(self, content: bytes) -> None:
        self._control.sendall(_LENGTH.pack(len(content)))
        self._control.sendall(content)

    async def fork(self) -> _Worker:
        """A new worker. Raises OSError or EOFError if there is no process to fork any more."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [FORK], [theirs.fileno()])  # one byte: nobody waits
            except OSError:
                ours.close()
                raise
        worker = _Worker(*await asyncio.open_connection(sock=ours, limit=1 << 20))
        try:
            worker.pid = int(await asyncio.wait_for(worker.receive(), _START_S))
        except BaseException:
            worker.close()
            raise
        return worker

    def stop(self) -> None:
        self._control.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _start(descriptor: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "server.worker", str(descriptor)],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a terminal's signals are the server's to deal with
    )


def _unstarted() -> Overloaded:
    return Overloaded("the process that reads bodies cannot be started")


async def _unpickled(content: bytes) -> Input:
    """What a worker has found, its requests one by one, so that nobody waits for all of them."""
    unpickler = pickle.Unpickler(io.BytesIO(content))
    found = unpickler.load()
    if isinstance(found, ApiError):
        raise found
    if not isinstance(found, Input):
        log.error("a body cannot be read: %s", found)
        raise GenerationFailed("the request cannot be read")
    for _ in range(unpickler.load()):
        request: Request = unpickler.load()
        found.requests.append(request)
        await asyncio.sleep(0)
    return found
