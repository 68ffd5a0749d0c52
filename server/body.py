"""Request bodies: size and media type, then what they hold, before any endpoint sees them."""

import time
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from engine.errors import Overloaded
from server.errors import ApiError
from server.inputs import Incoming, Input
from server.middleware import CLIENT_GONE, RequestLog
from server.serving import ClientGone, while_connected
from server.state import ServerState, state_of
from server.worker import LARGE_BYTES

_MOST_BODIES = 16  # of the largest size, that may be in memory at once


class JSONRequest(Request):
    """A request whose body has been read and checked our way."""

    found: Input

    async def read(self) -> None:
        """Find out what the body asks for. Raises ApiError, and what reading it raises."""
        state, log = state_of(self), self.state.log
        state.model()  # without one, the body is of no use
        held = _Held(self, state)
        try:
            data = await held.body()
            _check_media_type(self.headers.get("content-type", ""))
            incoming = Incoming(
                path=self.scope["route"].path,
                data=data,
                label=log.request_id,
                number=state.next_number(),
                arrival_s=time.monotonic(),
                salt=self.state.salt,
                named=log.request_id == self.headers.get("x-request-id"),
            )
            self.found = await while_connected(self, state.read(incoming))
        finally:
            held.release()
        if self.found.num_ignored:
            state.metrics.on_ignored(self.found.num_ignored)
        _rename(log, incoming, self.found)


class JSONRoute(APIRoute):
    """A route that takes a JSON body; its endpoint gets a JSONRequest, and the body's model."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_and_answer(request: Request) -> Response:
            if request.method != "POST":
                return await handle(request)
            # What FastAPI would make of the body has been made; it knows of the endpoint's
            # parameters for its documents.
            ours = JSONRequest(request.scope, request.receive)
            try:
                await ours.read()
                answer: Response = await self.endpoint(ours, ours.found.body)
            except ClientGone:
                return Response(status_code=CLIENT_GONE)
            answer.headers.update(ours.found.headers)
            return answer

        return read_and_answer


class _Held:
    """A body while it is in memory, which only so many may be at once."""

    def __init__(self, request: Request, state: ServerState) -> None:
        self._request = request
        self._state = state
        self._size = 0

    async def body(self) -> bytes:
        """The whole body. Raises ApiError as soon as it is known to be too large, or Overloaded."""
        limit = self._state.config.max_body_bytes
        announced = self._request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        async for chunk in self._request.stream():
            self._size += len(chunk)
            self._state.body_bytes += len(chunk)
            if self._size > limit:
                raise _too_large(limit)
            if self._size > LARGE_BYTES and self._state.body_bytes > _MOST_BODIES * limit:
                raise Overloaded("too many large bodies are being read; try again later")
            chunks.append(chunk)
        return b"".join(chunks)

    def release(self) -> None:
        self._state.body_bytes -= self._size
        self._size = 0


def _rename(log: RequestLog, incoming: Incoming, found: Input) -> None:
    """A label in the body counts where no header has given one."""
    label = getattr(found.body, "request_id", None)
    if label is not None and not incoming.named:
        log.request_id = label


def _check_media_type(content_type: str) -> None:
    message = Message()
    message["content-type"] = content_type
    if message.get_content_type() != "application/json":
        raise ApiError(
            415,
            f"Content-Type must be application/json, got {content_type[:100] or 'none'}.",
            code="unsupported_media_type",
        )


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than the {limit} bytes this server accepts.",
        code="request_too_large",
        headers={"Connection": "close"},
    )
