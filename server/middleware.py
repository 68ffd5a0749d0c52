"""Around every request: its id, its key, its line in the log, its metrics."""

import asyncio
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import Overloaded
from engine.messages import Finished
from server.errors import ApiError, to_api_error
from server.state import ServerState, shutting_down
from server.unanswered import Unanswered

CLIENT_GONE = 499  # never on the wire
UNMATCHED = "unmatched"  # instead of a path that no route has
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PUBLIC = {"/health", "/ready", "/live", "/ping", "/version"}
_DOCS = {"/docs", "/openapi.json"}

log = logging.getLogger("logitmill.request")


@dataclass(slots=True)
class RequestLog:
    """What the log says of a request once it is over."""

    request_id: str
    status: int = CLIENT_GONE
    finished: list[Finished] = field(default_factory=list)
    error: str | None = None

    def line(self, method: str, path: str, seconds: float) -> str:
        fields: dict[str, Any] = {
            "id": self.request_id,
            "method": method,
            "path": path,
            "status": self.status,
            "seconds": round(seconds, 4),
        }
        if self.finished:
            done = self.finished
            first = [one.first_token_s or one.finished_s for one in done]
            fields |= {
                "prompt_tokens": sum(one.prompt_tokens for one in done),
                "cached_tokens": sum(one.cached_tokens for one in done),
                "completion_tokens": sum(one.completion_tokens for one in done),
                "queue_s": round(max(one.scheduled_s - one.arrival_s for one in done), 4),
                "prefill_s": round(
                    max(at - one.scheduled_s for at, one in zip(first, done, strict=True)), 4
                ),
                "decode_s": round(
                    max(one.finished_s - at for at, one in zip(first, done, strict=True)), 4
                ),
                "finish_reason": sorted({str(r) for one in done for r in one.finish_reasons}),
            }
        if self.error is not None:
            fields["error"] = self.error
        return json.dumps(fields)


def choose_request_id(given: str) -> str:
    """The client's own id of its request if it is one, else a new one."""
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def record(
    state: ServerState, request_log: RequestLog, method: str, path: str, seconds: float
) -> None:
    """Count and log a request that is over; `path` is a route's, never a client's."""
    state.metrics.on_response(method, path, request_log.status, seconds)
    quiet = path in _PUBLIC or path == "/metrics"
    log.log(logging.DEBUG if quiet else logging.INFO, request_log.line(method, path, seconds))


class RequestContext:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_log = RequestLog(choose_request_id(headers.get("x-request-id", "")))
        scope.setdefault("state", {})["log"] = request_log
        started = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_log.request_id
                request_log.status = message["status"]
            await send(message)

        posting = scope["method"] == "POST"
        self.state.num_inflight += posting
        try:
            if self._admit(scope, headers.get("authorization")):
                await self._in_time(scope, receive, send_with_id)
            else:
                await _UNAUTHORIZED(scope, receive, send_with_id)
        except ClientDisconnect:
            request_log.status = CLIENT_GONE
        except Exception as error:
            expected = isinstance(error, ApiError | Overloaded)
            if not expected:
                log.exception("request %s failed", request_log.request_id)
            if request_log.status != CLIENT_GONE:  # too late for another answer
                raise
            failure = to_api_error(error)
            request_log.error = failure.code
            await failure.response()(scope, receive, send_with_id)
        finally:
            self.state.num_inflight -= posting
            path = getattr(scope.get("route"), "path", UNMATCHED)
            record(self.state, request_log, scope["method"], path, time.monotonic() - started)

    def _admit(self, scope: Scope, authorization: str | None) -> bool:
        """May this request be answered? Notes what separates its key's cached prompts."""
        scope["state"]["salt"] = ""
        if not self._needs_key(scope):
            return True
        keys = self.state.keys
        key_id = keys.identify(authorization)
        if key_id is not None and keys.several and not self.state.config.share_prefix_cache:
            scope["state"]["salt"] = key_id
        return key_id is not None

    def _needs_key(self, scope: Scope) -> bool:
        path = scope["path"]
        if scope["method"] == "OPTIONS" or path in _PUBLIC or path in _DOCS:
            return False
        return path != "/metrics" or self.state.config.protect_metrics

    async def _in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer, as long as there is time to begin.

        Raises ApiError when there is none, and Overloaded when the server shuts down.
        """
        whole = False

        async def receive_in_time() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            if self.state.draining:
                self.state.model()  # says why there is none
            request.begin_reading()
            message = await receive()
            if not message.get("more_body", False):
                whole = True
                request.end_reading()
            return message

        async def send_in_time(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.state.unanswered.discard(request)
                request.begin_answer()
            await send(message)

        try:
            async with asyncio.timeout(None) as limit:
                request = Unanswered(limit, self.state.config)
                scope["state"]["deadline"] = request.deadline
                self.state.unanswered.add(request)
                try:
                    await self.app(scope, receive_in_time, send_in_time)
                finally:
                    self.state.unanswered.discard(request)
        except TimeoutError:
            if not limit.expired():
                raise
            raise shutting_down() if self.state.draining else request.why() from None


_UNAUTHORIZED = ApiError(
    401,
    "Missing or wrong API key; send it as 'Authorization: Bearer KEY'.",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
).response()
