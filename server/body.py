"""Request bodies: size, media type, JSON, model, in that order and before any field."""

import json
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from server.errors import ApiError
from server.state import state_of


class JSONRequest(Request):
    """A request whose body is read and checked our way."""

    async def body(self) -> bytes:
        """The whole body. Raises ApiError as soon as it is known to be too large."""
        if not hasattr(self, "_checked_body"):
            self._checked_body = await self._read(state_of(self).config.max_body_bytes)
        return self._checked_body

    async def json(self) -> Any:
        """The parsed body. Raises ApiError."""
        if not hasattr(self, "_checked_json"):
            data = await self.body()
            _check_media_type(self.headers.get("content-type", ""))
            self._checked_json = parse(data)
            _check_model(self._checked_json, state_of(self).model_names)
        return self._checked_json

    async def _read(self, limit: int) -> bytes:
        announced = self.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        size = 0
        async for chunk in self.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            chunks.append(chunk)
        return b"".join(chunks)


class JSONRoute(APIRoute):
    """A route that takes a JSON body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            ours = JSONRequest(request.scope, request.receive)
            if request.method == "POST":
                await ours.json()
            return await handle(ours)

        return checked


def parse(data: bytes) -> Any:
    """Strict JSON: no NaN, no duplicate keys, nothing behind the value. Raises ApiError."""
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # fails on half a surrogate pair
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise ApiError(
            400, f"The body is not valid JSON: {reason[:200]}.", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore
        raise ValueError(f"the key {twice!r} occurs twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_media_type(content_type: str) -> None:
    message = Message()
    message["content-type"] = content_type
    if message.get_content_type() != "application/json":
        raise ApiError(
            415,
            f"Content-Type must be application/json, got {content_type[:100] or 'none'}.",
            code="unsupported_media_type",
        )


def _check_model(value: Any, names: list[str]) -> None:
    model = value.get("model") if isinstance(value, dict) else None
    if isinstance(model, str) and model not in names:
        raise ApiError(
            404,
            f"The model {model[:100]!r} does not exist; this server has {', '.join(names)}.",
            param="model",
            code="model_not_found",
        )


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than the {limit} bytes this server accepts.",
        code="request_too_large",
        headers={"Connection": "close"},
    )
