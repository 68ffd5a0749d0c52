"""HTTP/1.1 on one connection: uvicorn's protocol, with bounds on what a client can cost.

A client is bounded before anybody looks at its request: in the size of a head and of what stands
around a body, in the time it takes to send a head, in what it may send ahead, in how long it leaves
an answer unread. What is wrong below the application is answered in the API's form all the same.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState as Connections

from engine.errors import Overloaded
from server.errors import ApiError, to_api_error
from server.middleware import UNMATCHED, RequestLog, choose_request_id, record
from server.state import ServerState

HEAD_BYTES = 64 << 10  # of a head, and of what stands around a body without being body
TARGET_BYTES = 8 << 10  # of a request's path and query
# The parser takes all it is given, so it is given little at a time: what it has not been given can
# still be refused or wait. The shortest requests that fit are a few dozen.
_PIECE_BYTES = 1 << 10
_HELD_BYTES = 64 << 10  # sent ahead of an answer, before no more is read
_DISCARDED_BYTES = 8 << 20  # of a body behind its answer; then the connection is closed
_LINGER_S = 5.0  # the same in time
_LAST_LINGER_S = 1.0  # while the server shuts down
_LEAST_READ_BYTES = 64 << 10  # of an answer, in --slow-client-timeout
_PROBES_S = (0.02, 0.1, 0.5, 2.0, 5.0)  # between looks at a client that sends no more

_FRAMING = (b"content-length", b"transfer-encoding")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_TCP_CLOSE = 7  # the first byte of Linux' tcp_info, once the peer has reset the connection

log = logging.getLogger(__name__)


class _Flow(FlowControl):
    """Reading that stays paused, whoever wants more, while `closed`."""

    closed = False

    def resume_reading(self) -> None:
        if not self.closed:
            super().resume_reading()


class _Outlet(asyncio.Transport):
    """A connection as an answer sees it: closed in such a way that the answer can be read."""

    def __init__(self, connection: "Connection") -> None:
        super().__init__()
        self._connection = connection

    def write(self, data: Any) -> None:
        self._connection.transport.write(data)

    def is_closing(self) -> bool:
        return self._connection.ending or self._connection.transport.is_closing()

    def close(self) -> None:
        self._connection.hang_up()


class _Body:
    """What a parser tells a connection that knows the head already."""

    def __init__(self, connection: "Connection") -> None:
        self.on_body = connection.on_body
        self.on_message_complete = connection.on_message_complete


class Connection(HttpToolsProtocol):
    """A client's connection. Used on the event loop only.

    `_timer` is for what the connection waits for: a head, a sign that a silent client is gone, or,
    while `ending`, the rest of a body.
    """

    flow: _Flow

    def __init__(
        self,
        config: Config,
        connections: Connections,
        app_state: dict[str, Any],
        state: ServerState,
    ) -> None:
        super().__init__(config, connections, app_state)
        self.state = state
        self.ending = False  # only what was written still matters
        self._outlet = _Outlet(self)
        self._answering: RequestResponseCycle | None = None  # the oldest without its whole answer
        self._fault: ApiError | None = None  # in the body that is being read
        self._in_head = False  # behind the first byte of a head
        self._deaf = False  # nothing more can be understood
        self._peer_done = False  # it sends no more, but may read
        self._budget = HEAD_BYTES
        self._held = b""
        self._discarded = 0
        self._head_since = time.monotonic()
        self._num_probes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # -- from the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._write_timer, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.pipeline.clear()
        self._held = b""
        self.ending = True
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.ending or self._deaf:
            self._discard(len(data))
            return
        self._unset_keepalive_if_required()
        self._held += data
        self._parse()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's type, uvicorn has less
        """A client that sends no more may still read: behind a whole request it gets its answer.

        A client that is gone looks the same at first. Whether it is shows when it is written to,
        which no client of HTTP/1.0 allows before its answer: such a one counts as gone.
        """
        cycle = None if self._unanswered is None else self._answering
        if cycle is None or cycle.more_body or cycle.scope["http_version"] != "1.1":
            self._hang_up_at_once()
        elif not self._peer_done:
            self._peer_done = self.flow.closed = True
            self._probe()
        return not self.transport.is_closing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None and not self.ending:
            self._write_timer.cancel()
            self._write_timer = None

    # -- what came, and what may be parsed of it

    @property
    def _unanswered(self) -> RequestResponseCycle | None:
        """The newest request, unless it has its whole answer."""
        return None if self.cycle is None or self.cycle.response_complete else self.cycle

    @property
    def _may_parse(self) -> bool:
        """Nothing behind a request is looked at before its answer is out."""
        if self.ending or self._deaf or self.pipeline:
            return False
        return self._unanswered is None or self._unanswered.more_body

    def _parse(self) -> None:
        data, at = self._held, 0
        if (data or self._in_head) and self._unanswered is None and self._timer is None:
            self._await_head()
        while at < len(data) and self._may_parse:
            piece = data[at : at + _PIECE_BYTES]
            at += len(piece)
            self._feed(piece)
        self._held = b"" if self.ending or self._deaf else data[at:]
        self.flow.closed = len(self._held) > _HELD_BYTES or self._deaf or self._peer_done
        if self.flow.closed:
            self.flow.pause_reading()

    def _feed(self, piece: bytes) -> None:
        self._budget -= len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(piece[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(_invalid(f"The request is not valid HTTP: {error}."))
        else:
            if self._in_head and len(self.url) > TARGET_BYTES:
                self._refuse(_target_too_long())
            elif self._budget < 0:
                self._refuse(_head_too_large() if self._in_head else _too_much_around_body())

    def _decline_upgrade(self, rest: bytes) -> None:
        """Answer in HTTP/1.1, as any server may; `rest` is what came behind the head.

        The parser takes whatever is there for the other protocol, a body too: Java's client, which
        offers HTTP/2 with its first request, sends one. So that is left to a parser of its own.
        """
        cycle = self.cycle
        cycle.keep_alive = False
        framing = [pair for pair in self.headers if pair[0] in _FRAMING]
        if not framing:
            self._understand_no_more()
            return
        cycle.more_body = True
        cycle.message_event.clear()
        self.parser = httptools.HttpRequestParser(_Body(self))
        lines = [name + b": " + value + b"\r\n" for name, value in framing]
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(lines) + b"\r\n")
        if rest:
            self._feed(rest)

    def _go_on(self) -> None:
        """Turn to what was sent ahead of an answer that is now out."""
        if self.ending:
            return
        if self._held or self._in_head:
            self._unset_keepalive_if_required()
            self._parse()
        if not self._peer_done:
            self.flow.resume_reading()
        elif self._unanswered is None or self._unanswered.more_body:
            self.hang_up()
        else:
            self._probe()

    # -- from the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # a trailer would pass for a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head = False
        self._budget = HEAD_BYTES
        self._set_timer(None)

    def on_body(self, body: bytes) -> None:
        self._budget = min(HEAD_BYTES, self._budget + 2 * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._budget = HEAD_BYTES
        super().on_message_complete()

    # -- requests and their answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        cycle.transport = self._outlet
        cycle.scope["state"]["probes"] = []
        super()._start_asgi_task(cycle, self._bounded(cycle, app))

    def _bounded(self, cycle: RequestResponseCycle, app: ASGIApp) -> Any:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            async def receive_body() -> Message:
                message = await receive()
                if self._fault is not None:
                    raise self._fault
                return message

            async def send_answer(message: Message) -> None:
                if cycle.more_body and message["type"] == "http.response.start":
                    cycle.keep_alive = False  # what comes of the body would have to be read
                await send(message)

            try:
                await app(scope, receive_body, send_answer)
            except asyncio.CancelledError:  # by uvicorn, at the very end: no time is left to tell
                cycle.disconnected = True
                self.transport.abort()

        return answer

    def on_response_complete(self) -> None:
        if self.ending:
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        if self._held or self._in_head or self._peer_done:
            self.loop.call_soon(self._go_on)

    def _refuse(self, error: ApiError) -> None:
        """End what cannot be parsed on: with an answer, unless one is due to what came before."""
        cycle = self._unanswered
        if cycle is None:
            self._answer(error)
        elif cycle.more_body and not self._in_head:
            self._fault = error
            self._understand_no_more()
            cycle.message_event.set()
        else:
            self._understand_no_more()

    def _understand_no_more(self) -> None:
        """Answer what was understood, then close."""
        self._deaf = True
        if self._unanswered is None:
            self.hang_up()
        else:
            self.cycle.keep_alive = False

    def _answer(self, error: ApiError) -> None:
        """Answer in the application's place, and close."""
        begun = self.url if self._in_head else b""
        given = dict(self.headers).get(b"x-request-id", b"") if self._in_head else b""
        request_log = RequestLog(
            choose_request_id(given.decode("latin-1")), status=error.status, error=error.code
        )
        self.transport.write(
            as_http(error, request_log.request_id, self.server_state.default_headers)
        )
        self.hang_up()
        method = self.parser.get_method().decode() if begun else "-"
        seconds = time.monotonic() - self._head_since
        record(self.state, request_log, method, UNMATCHED, seconds)

    # -- waiting for clients, and parting from them

    def _set_timer(self, delay_s: float | None, due: Callable[[], None] | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if delay_s is not None and due is not None:
            self._timer = self.loop.call_later(delay_s, due)

    def _await_head(self) -> None:
        self._head_since = time.monotonic()
        self._set_timer(self.state.config.head_timeout, self._give_up_head)

    def _give_up_head(self) -> None:
        limit_s = self.state.config.head_timeout
        if self._in_head:
            self._answer(_head_too_slow(limit_s))
        else:
            self.state.metrics.on_dropped("silent")
            log.debug("closed a connection without a request for %g s", limit_s)
            self.hang_up()

    def _probe(self) -> None:
        """Write something harmless: a client that is gone answers it with a reset."""
        cycle = self._answering
        if self.ending or cycle is None or cycle.response_complete:
            return
        if self._is_reset():
            self.transport.abort()
            return
        if cycle.response_started:
            for write in cycle.scope["state"]["probes"]:
                write()
        else:
            self.transport.write(_CONTINUE)
        delay_s = _PROBES_S[min(self._num_probes, len(_PROBES_S) - 1)]
        self._num_probes += 1
        self._set_timer(delay_s, self._probe)

    def _is_reset(self) -> bool:
        if not hasattr(socket, "TCP_INFO"):
            return False  # then writing fails before long
        end = self.transport.get_extra_info("socket")
        return bool(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE)

    def hang_up(self) -> None:
        """Close, once the client can have read what it was told.

        Closed on what it still sends, it would be reset, and might lose the answer to that.
        """
        if self.ending:
            return
        sends = self._in_head or self._deaf or self.flow.read_paused
        sends = sends or (self.cycle is not None and self.cycle.more_body)
        if self._peer_done or not sends or self.transport.is_closing():
            self._hang_up_at_once()
            return
        self.ending = True
        self._held = b""
        self._unset_keepalive_if_required()
        self.flow.closed = False
        self.flow.resume_reading()
        self.transport.write_eof()
        linger_s = _LINGER_S if self.state.ready else _LAST_LINGER_S
        self._set_timer(linger_s, self._hang_up_at_once)

    def _hang_up_at_once(self) -> None:
        self.ending = True
        self._set_timer(None)
        self._unset_keepalive_if_required()
        self.transport.close()
        self._watch_reader()  # what was written has to leave

    def _discard(self, num_bytes: int) -> None:
        self._discarded += num_bytes
        if self._discarded > _DISCARDED_BYTES:
            self._hang_up_at_once()

    def timeout_keep_alive_handler(self) -> None:
        self.hang_up()

    def shutdown(self) -> None:
        """Part from a client that has no answer to come; others get theirs, and no more."""
        if not self.ending and self._in_head and self._unanswered is None:
            self._answer(to_api_error(Overloaded("the server is shutting down", "draining")))
        if self.ending or self._unanswered is None:
            self._hang_up_at_once()
        else:
            super().shutdown()

    def cut(self) -> None:
        """Drop a client whose answer is not out, although all its time is over."""
        if self._unanswered is not None:
            self.transport.abort()

    def _watch_reader(self) -> None:
        """Drop the client if it leaves what was written unread."""
        left = self.transport.get_write_buffer_size()
        if self._write_timer is None and left:
            self._write_timer = self.loop.call_later(
                self.state.config.slow_client_timeout, self._check_reader, left
            )

    def _check_reader(self, left_before: int) -> None:
        self._write_timer = None
        left = self.transport.get_write_buffer_size()
        if left and left > left_before - _LEAST_READ_BYTES:
            self.state.metrics.on_dropped("slow_client")
            log.debug("dropped a client that did not read %d bytes", left)
            self.transport.abort()
        else:
            self._watch_reader()


def as_http(error: ApiError, request_id: str, headers: list[tuple[bytes, bytes]]) -> bytes:
    """An error as a whole response, the last one of its connection."""
    response = error.response()
    own = [(b"x-request-id", request_id.encode("latin-1")), (b"connection", b"close")]
    kept = [pair for pair in response.raw_headers if pair[0] != b"connection"]
    lines = [name + b": " + value + b"\r\n" for name, value in [*headers, *kept, *own]]
    return STATUS_LINE[error.status] + b"".join(lines) + b"\r\n" + bytes(response.body)


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_http")


def _target_too_long() -> ApiError:
    return ApiError(
        414,
        f"The path and query of the request are longer than {TARGET_BYTES} bytes.",
        code="uri_too_long",
    )


def _head_too_large() -> ApiError:
    return ApiError(
        431,
        f"The head of the request, all its header fields together, is larger than {HEAD_BYTES} "
        "bytes.",
        code="request_header_fields_too_large",
    )


def _too_much_around_body() -> ApiError:
    return _invalid(
        f"{HEAD_BYTES} bytes more than the body between them are neither head nor body: chunk "
        "sizes and extensions, trailers, empty lines."
    )


def _head_too_slow(limit_s: float) -> ApiError:
    return ApiError(
        408,
        f"The head of the request was not complete within {limit_s:g} seconds.",
        code="request_timeout",
    )
