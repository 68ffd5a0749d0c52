"""What both generating routes do: submit, collect or stream."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from engine.client import Generation
from engine.errors import Overloaded
from engine.messages import Delta, Finished
from engine.messages import Request as EngineRequest
from server.answers import Choices, Envelope, Tally, merge
from server.errors import to_api_error
from server.middleware import CLIENT_GONE, RequestLog
from server.state import ServerState, state_of
from server.stream import EventStream

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


def submit(state: ServerState, requests: list[EngineRequest]) -> Generation:
    """Hand requests to the engine. Raises Overloaded."""
    try:
        return state.engine.generate(requests)
    except Overloaded as error:
        state.metrics.on_rejection(error.code)
        raise


async def collect(request: Request, generation: Generation) -> tuple[list[Delta], Tally]:
    """Every choice as one delta, and the usage. Raises ClientGone if nobody waits any more."""
    log: RequestLog = request.state.log

    async def read() -> tuple[list[Delta], Tally]:
        parts: dict[tuple[str, int], list[Delta]] = {}
        tally = Tally()
        async for message in generation:
            if isinstance(message, Finished):
                tally.add(message)
                log.finished.append(message)
            else:
                parts.setdefault((message.request_id, message.index), []).append(message)
        return [merge(deltas) for deltas in parts.values()], tally

    try:
        return await while_connected(request, read())
    except ClientGone:
        raise
    except Exception as error:
        log.error = to_api_error(error).code
        raise
    finally:
        generation.close()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, unless the client goes away before."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, listener}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for pending in (task, listener):
            pending.cancel()
        await asyncio.gather(task, listener, return_exceptions=True)


def stream(
    request: Request,
    generation: Generation,
    envelope: Envelope,
    choices: Choices,
    format_chunk: Callable[[Delta], list[Any]],
) -> EventStream:
    """An answer in events. `format_chunk` gives the choices that a delta becomes."""
    state, log = state_of(request), request.state.log
    tally = Tally()
    running: dict[int, Tally] = {}
    options = choices.body.options

    def chunks(message: Delta | Finished) -> list[dict[str, Any]]:
        if isinstance(message, Finished):
            tally.add(message)
            log.finished.append(message)
            return []
        usage: dict[str, Any] = {"usage": None} if options.include_usage else {}
        if options.continuous_usage_stats:
            index = choices.index(message)
            own = running.setdefault(index, Tally(len(choices.prompt_of(message))))
            own.completion_tokens += len(message.tokens)
            usage = {"usage": own.usage()}
        return [envelope.around([choice], **usage) for choice in format_chunk(message)]

    def end() -> list[dict[str, Any]]:
        return [envelope.around([], usage=tally.usage())] if options.include_usage else []

    def on_error(error: BaseException) -> None:
        log.error = to_api_error(error).code

    def on_gone() -> None:
        log.status = CLIENT_GONE

    return EventStream(
        generation,
        chunks,
        end,
        on_error,
        on_gone,
        config=state.config,
    )
