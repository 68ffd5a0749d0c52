"""Around every request: its id, its key, its line in the log, its metrics."""

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

from engine.messages import Finished
from server.errors import ApiError, to_api_error
from server.state import ServerState
from server.stream import SlowClient

CLIENT_GONE = 499  # never on the wire
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
        given = headers.get("x-request-id", "")
        request_log = RequestLog(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
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
            if self._needs_key(scope) and not self.state.keys.allow(headers.get("authorization")):
                await _UNAUTHORIZED(scope, receive, send_with_id)
            else:
                await self.app(scope, receive, send_with_id)
        except (ClientDisconnect, SlowClient):
            request_log.status = CLIENT_GONE
        except Exception as error:
            log.exception("request %s failed", request_log.request_id)
            if request_log.status != CLIENT_GONE:  # too late for another answer
                raise
            failure = to_api_error(error)
            request_log.error = failure.code
            await failure.response()(scope, receive, send_with_id)
        finally:
            self.state.num_inflight -= posting
            route = scope.get("route")
            path = getattr(route, "path", "unmatched")
            seconds = time.monotonic() - started
            self.state.metrics.on_response(scope["method"], path, request_log.status, seconds)
            quiet = path in _PUBLIC or path == "/metrics"
            level = logging.DEBUG if quiet else logging.INFO
            log.log(level, request_log.line(scope["method"], path, seconds))

    def _needs_key(self, scope: Scope) -> bool:
        path = scope["path"]
        if scope["method"] == "OPTIONS" or path in _PUBLIC or path in _DOCS:
            return False
        return path != "/metrics" or self.state.config.protect_metrics


_UNAUTHORIZED = ApiError(
    401,
    "Missing or wrong API key; send it as 'Authorization: Bearer KEY'.",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
).response()
