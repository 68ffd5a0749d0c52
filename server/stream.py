"""Server-sent events: an answer's chunks on their way to a client that may leave."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from engine.client import Generation
from engine.messages import Delta, Finished
from server.answers import is_long
from server.config import ServerConfig
from server.errors import to_api_error
from server.unanswered import deadline_exceeded
from server.whole import parts_of

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


# Made once: making it takes longer than to write a token with it.
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def event(data: Any) -> bytes:
    """One event holding one line of JSON."""
    return b"data: " + _JSON.encode(data).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Streams what a generation gives, each message made into chunks by `chunks`.

    However it ends, the generation is closed, which aborts what has not finished. An error after
    the headers becomes an event. While nothing comes, comment lines keep the connection alive.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        chunks: Callable[[Delta | Finished], list[Any]],
        end: Callable[[], list[Any]],
        on_error: Callable[[BaseException], None],
        on_gone: Callable[[], None],
        *,
        config: ServerConfig,
    ) -> None:
        super().__init__(self._events(), headers=_HEADERS)
        self._generation = generation
        self._chunks = chunks
        self._end = end
        self._on_error = on_error
        self._on_gone = on_gone
        self._config = config
        self._complete = False
        self._late = False  # --request-timeout is over
        self._silence: asyncio.Timeout | None = None  # while a message is awaited

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for message in self._with_pauses():
                if message is None:
                    yield _KEEP_ALIVE
                    continue
                for chunk in self._chunks(message):
                    if isinstance(message, Delta) and is_long(message.prompt, message.tokens):
                        for part in (b"data: ", *await parts_of(chunk), b"\n\n"):
                            yield part
                    else:
                        yield event(chunk)
            for chunk in self._end():
                yield event(chunk)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client must be told
            self._on_error(error)
            yield event(to_api_error(error).body)
        self._complete = True
        yield _DONE

    async def _with_pauses(self) -> AsyncIterator[Delta | Finished | None]:
        """The generation's messages, and None after each stretch of silence.

        Raises ApiError when there is no more time.
        """
        messages = aiter(self._generation)
        while not self._late:
            message = None
            try:
                async with asyncio.timeout(self._config.sse_keepalive) as self._silence:
                    message = await anext(messages)
            except TimeoutError:
                pass
            except StopAsyncIteration:
                if not self._late:
                    return
            finally:
                self._silence = None
            if not self._late:
                yield message
        raise deadline_exceeded(self._config.request_timeout)

    def _break_silence(self) -> None:
        """Let the next comment line leave now, unless a message is on its way anyhow."""
        if self._silence is not None and not self._silence.expired():
            self._silence.reschedule(0.0)

    def _run_out_of_time(self) -> None:
        self._late = True
        self._generation.close()  # now, however long the client takes to read what came before
        self._break_silence()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        state.get("probes", []).append(self._break_silence)
        deadline, timer = state.get("deadline"), None
        if deadline is not None:
            timer = asyncio.get_running_loop().call_at(deadline, self._run_out_of_time)
        try:
            await super().__call__(scope, receive, send)
        finally:
            if timer is not None:
                timer.cancel()
            if not self._complete:
                self._on_gone()
            self._generation.close()
