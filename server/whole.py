"""Answers that are sent whole, written a little at a time.

An answer may list millions of tokens. Making JSON of all of them in one go would hold up whatever
else the event loop has to do, and the engine, which needs the interpreter between two operations.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_AT_ONCE_S = 0.001  # so long it may take before others have their turn
_PAUSE_S = 0.001
_SOME = 1024  # numbers or strings of a list
_PART_BYTES = 1 << 16

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Each(Iterable[Any]):
    """A list whose entries are made as they are written; it may be gone through again."""

    def __init__(self, entries: Callable[[], Iterable[Any]]) -> None:
        self._entries = entries

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries())


class WholeAnswer(Response):
    """A JSON answer whose parts have been written already."""

    media_type = "application/json"

    def __init__(self, parts: Sequence[bytes]) -> None:
        super().__init__()
        self._parts = parts
        self.headers["content-length"] = str(sum(map(len, parts)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})


async def written(value: Mapping[str, Any]) -> WholeAnswer:
    """An answer in JSON. Raises ValueError for what JSON cannot hold."""
    return WholeAnswer(await parts_of(value))


async def parts_of(value: Mapping[str, Any]) -> list[bytes]:
    """The JSON of a value, made while others have their turns."""
    parts: list[bytes] = []
    pending: list[str] = []
    size = 0
    until = time.monotonic() + _AT_ONCE_S
    for piece in pieces(value):
        pending.append(piece)
        size += len(piece)
        if size >= _PART_BYTES:
            parts.append("".join(pending).encode())
            pending, size = [], 0
        if time.monotonic() > until:
            await asyncio.sleep(_PAUSE_S)
            until = time.monotonic() + _AT_ONCE_S
    return [*parts, "".join(pending).encode()]


def pieces(value: Any) -> Iterator[str]:
    """The JSON of a value, none of it long to make."""
    match value:
        case dict() if any(isinstance(one, _CONTAINERS) for one in value.values()):
            lead = "{"
            for key, one in value.items():
                yield f"{lead}{_JSON.encode(key)}:"
                yield from pieces(one)
                lead = ","
            yield "}"
        case list() if not any(isinstance(one, _CONTAINERS) for one in value[:1]):
            yield "["
            for start in range(0, len(value), _SOME):
                yield "," * (start > 0) + _JSON.encode(value[start : start + _SOME])[1:-1]
            yield "]"
        case list() | Each():
            lead = "["
            for one in value:
                yield lead
                yield from pieces(one)
                lead = ","
            yield "[]" if lead == "[" else "]"
        case _:
            yield _JSON.encode(value)


_CONTAINERS = (dict, list, Each)
