"""What both generating routes do: check, submit, collect or stream."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import Request, Response

from engine.client import Generation
from engine.errors import InvalidRequest, Overloaded
from engine.messages import Delta, Finished
from engine.messages import Request as EngineRequest
from engine.params import SamplingParams, StrictModel, combinable
from engine.prepare import Output, prepare
from engine.tokenizer import Tokenizer
from server.answers import Choices, Envelope, Tally, merge
from server.errors import ApiError, to_api_error
from server.middleware import CLIENT_GONE, RequestLog
from server.schemas import UNSUPPORTED, GenerationRequest
from server.state import ServerState
from server.stream import EventStream

_LONG_TEXT = 20_000  # characters; encoding more would hold up the event loop
_SHOWN_FIELDS = 20

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


def check_fields(body: StrictModel, state: ServerState) -> dict[str, str]:
    """Refuse what cannot be honoured; the headers that report what has no effect."""
    headers: dict[str, str] = {}
    if isinstance(body, SamplingParams) and (idle := body.without_effect):
        verb = "has" if len(idle) == 1 else "have"
        headers["Warning"] = f'199 - "{", ".join(idle)} {verb} no effect with {body.method}"'
    ignored = list(_unknown(body))
    if ignored and state.config.strict_params:
        name = ignored[0][:100]
        raise InvalidRequest(f"{name} is unknown", name, "unknown_parameter")
    if not ignored:
        return headers
    state.metrics.on_ignored(len(ignored))
    shown = [quote(name[:100], safe="") for name in sorted(ignored)[:_SHOWN_FIELDS]]
    return headers | {"X-Ignored-Fields": ", ".join(shown)}


def _unknown(body: StrictModel, prefix: str = "") -> Iterator[str]:
    """The paths of all fields nobody knows. Raises InvalidRequest at one that is known too well."""
    for name, value in (body.model_extra or {}).items():
        if prefix or name not in UNSUPPORTED:
            yield prefix + name
            continue
        neutral = next((one for one in UNSUPPORTED[name] if _asks_no_more(value, one)), None)
        if neutral is None:
            raise InvalidRequest(
                f"{name} is not supported by this server", name, "unsupported_parameter"
            )
        if isinstance(value, dict):
            rest = {key for key, one in value.items() if one is not None} - neutral.keys()
            yield from (f"{name}.{key}" for key in sorted(rest))
    for name in type(body).model_fields:
        nested = getattr(body, name)
        if isinstance(nested, StrictModel):
            yield from _unknown(nested, f"{prefix}{name}.")


def _asks_no_more(value: object, neutral: object) -> bool:
    if isinstance(value, dict) and isinstance(neutral, dict):
        return neutral.items() <= value.items()
    return value == neutral


def check_logprobs(
    count: int | None, param: str, state: ServerState, vocab_size: int
) -> int | None:
    """How many candidates the engine should list; -1 is all of them, if the server allows it."""
    cap = state.config.max_logprobs
    if count is None or (count == 0 and cap == 0):
        return count
    if cap == -1:
        return vocab_size if count == -1 else min(count, vocab_size)
    if not 0 <= count <= cap:
        raise InvalidRequest(f"{param} must be between 0 and {cap}, got {count}", param)
    return min(count, vocab_size)


def sampling_params(body: SamplingParams, defaults: dict[str, Any]) -> SamplingParams:
    """The request's own parameters over the model's defaults."""
    given = {
        name: getattr(body, name)
        for name in SamplingParams.model_fields
        if name in body.model_fields_set
    }
    if body.limit is not None:
        given["max_tokens"] = body.limit
    return SamplingParams.model_validate(combinable(defaults, body) | given)


async def in_thread_if_long(size: int, work: Any, *args: Any) -> Any:
    """Call a function, in a worker thread if the input is long."""
    return await asyncio.to_thread(work, *args) if size > _LONG_TEXT else work(*args)


async def until_chats_render(tokenizer: Tokenizer) -> None:
    """Wait, off the event loop, for the import that chats need; it begins once the server is ready.

    Raises ModelUnavailable.
    """
    if not tokenizer.has_hf:
        await asyncio.to_thread(lambda: tokenizer.hf)


def truncated(prompt_ids: list[int], body: GenerationRequest, context_len: int) -> list[int]:
    """The part of a prompt that truncate_prompt_tokens leaves."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return prompt_ids
    keep = context_len - 1 if keep == -1 else keep
    return prompt_ids[-keep:] if body.truncation_side == "left" else prompt_ids[:keep]


def build_requests(
    state: ServerState,
    body: GenerationRequest,
    prompts: Sequence[list[int]],
    output: Output,
    params: SamplingParams,
    *,
    label: str,
    salt: str,
    prompt_param: str,
    default_max_tokens: int | None,
) -> list[EngineRequest]:
    """A request of the engine for each prompt. Raises InvalidRequest.

    `salt` is what separates the prompts of its API key; its length is the same for all of them, so
    no `cache_salt` behind it can make it another's.
    """
    tokenizer, info = state.model()
    several = len(prompts) > 1
    return [
        prepare(
            truncated(prompt_ids, body, info.context_len),
            params,
            output,
            info,
            tokenizer,
            request_id=state.unique_id(label),
            prompt_param=f"{prompt_param}[{number}]" if several else prompt_param,
            default_max_tokens=default_max_tokens,
            clamp_max_tokens=state.config.clamp_max_tokens,
            priority=body.priority,
            cache_salt=salt + body.cache_salt,
        )
        for number, prompt_ids in enumerate(prompts)
    ]


def submit(state: ServerState, requests: list[EngineRequest]) -> Generation:
    """Hand requests to the engine. Raises Overloaded."""
    try:
        return state.engine.generate(requests)
    except Overloaded as error:
        state.metrics.on_rejection(error.code)
        raise


async def collect(
    request: Request, generation: Generation, log: RequestLog
) -> tuple[list[Delta], Tally]:
    """Every choice as one delta, and the usage. Raises ClientGone if nobody waits any more."""

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
        return await _while_connected(request, read())
    except ClientGone:
        raise
    except Exception as error:
        log.error = to_api_error(error).code
        raise
    finally:
        generation.close()


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
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
    state: ServerState,
    body: GenerationRequest,
    generation: Generation,
    log: RequestLog,
    envelope: Envelope,
    choices: Choices,
    format_chunk: Callable[[Delta], list[Any]],
) -> EventStream:
    """An answer in events. `format_chunk` gives the choices that a delta becomes."""
    tally = Tally()
    running: dict[int, Tally] = {}
    options = body.options

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


def gone() -> Response:
    """The answer nobody reads, for the log."""
    return Response(status_code=CLIENT_GONE)


def require_prompt(prompt_ids: list[int], given: bool) -> None:
    """Refuse an empty prompt where the tokenizer puts nothing before it."""
    if prompt_ids:
        return
    if not given:
        raise ApiError(400, "prompt is required", param="prompt", code="missing_required_parameter")
    raise InvalidRequest("prompt must not be empty: this model has no begin token", "prompt")
