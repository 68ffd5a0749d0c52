"""Connections taken from a socket, as long as there are files for them."""

import asyncio
import errno
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

from engine.errors import Overloaded
from server.errors import to_api_error
from server.protocol import as_http

_AT_ONCE = 64  # connections taken before the event loop turns to others
_KEPT_FILES = 64  # for the server's own: the model's, keys, sockets, what libraries import
_LINGER_S = 0.5
_RETRY_S = 0.2
_LOG_EVERY_S = 10.0
_SENT_BYTES = 64 << 10  # of a request that is read before it is turned away
UNLIMITED = 1 << 30
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)


class Listener:
    """Takes connections, and turns away those for which there are no files left, with a 503.

    A new file gets the lowest free number, so its number tells how many are open. The event loops'
    own servers do not look: where files run out, uvloop's closes connections without a word.
    """

    def __init__(
        self,
        sock: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        on_refusal: Callable[[], None],
        *,
        max_files: int,
        backlog: int,
    ) -> None:
        self._socket = sock
        self._make_protocol = make_protocol
        self._on_refusal = on_refusal
        self._max_files = max_files
        self._kept_files = min(_KEPT_FILES, max_files // 4)
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._turned_away: list[socket.socket] = []
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)
        self._num_refused = 0  # and not in the log yet
        self._logged_at = float("-inf")
        self._closed = False
        sock.setblocking(False)
        sock.listen(backlog)
        self._loop.add_reader(sock, self._take)

    def close(self) -> None:
        """Take no more. The socket stays open, for whoever owns it to close."""
        self._closed = True
        self._loop.remove_reader(self._socket)
        for task in self._tasks:
            task.cancel()
        for connection in self._turned_away:
            connection.close()
        self._turned_away.clear()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _take(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                self._wait_a_moment()
                if error.errno in _EXHAUSTED:
                    self._take_on_spare(str(error.strerror))
                else:
                    log.warning("cannot take a connection: %s", error)
                return
            connection.setblocking(False)
            if connection.fileno() >= self._max_files - self._kept_files:
                self._turn_away(connection)
            else:
                task = self._loop.create_task(self._serve(connection))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _wait_a_moment(self) -> None:
        """Do not try again and again what fails at once."""
        self._loop.remove_reader(self._socket)
        self._loop.call_later(_RETRY_S, self._take_again)

    def _take_again(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._socket, self._take)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError:  # it has gone already
            connection.close()

    def _take_on_spare(self, reason: str) -> None:
        """There is not a single file left but the one that is kept for this: to say so."""
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        try:
            connection, _ = self._socket.accept()
        except OSError as error:  # another thread was faster, or nobody is there any more
            if error.errno in _EXHAUSTED:
                self._refused(f"{reason}; they have to wait")
        else:
            connection.setblocking(False)
            self._tell(connection, reason)
            connection.close()
        with suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)

    def _turn_away(self, connection: socket.socket) -> None:
        self._tell(
            connection,
            f"of the {self._max_files} files the process may open (ulimit -n), all but "
            f"{self._kept_files}, which are kept for the server itself, are in use",
        )
        self._turned_away.append(connection)
        if len(self._turned_away) > self._kept_files // 4:
            self._turned_away.pop(0).close()
        self._loop.call_later(_LINGER_S, self._part_from, connection)

    def _part_from(self, connection: socket.socket) -> None:
        if connection in self._turned_away:
            self._turned_away.remove(connection)
        connection.close()

    def _tell(self, connection: socket.socket, reason: str) -> None:
        error = to_api_error(Overloaded("the server has no room for more connections"))
        try:
            connection.send(as_http(error, uuid.uuid4().hex, []))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(_SENT_BYTES)  # closed with that unread, it would be reset
        except OSError:  # it has sent nothing yet, or has gone
            pass
        self._refused(reason)

    def _refused(self, reason: str) -> None:
        self._on_refusal()
        self._num_refused += 1
        if time.monotonic() - self._logged_at >= _LOG_EVERY_S:
            log.warning("refused %d connections: %s", self._num_refused, reason)
            self._num_refused, self._logged_at = 0, time.monotonic()


def raise_file_limit() -> int:
    """Let the process open as many files as it may; returns how many that are."""
    try:
        import resource
    except ImportError:  # not a Unix
        return UNLIMITED
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # some systems name a limit and then keep to a lower one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UNLIMITED if most == resource.RLIM_INFINITY else most
