"""POST /v1/completions."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from engine.prepare import Output
from server.answers import CompletionChoices, Envelope, fingerprint
from server.body import JSONRoute
from server.errors import ApiError
from server.middleware import RequestLog
from server.schemas import Completion, CompletionRequest
from server.serving import (
    ClientGone,
    build_requests,
    check_fields,
    check_logprobs,
    collect,
    gone,
    in_thread_if_long,
    require_prompt,
    sampling_params,
    stream,
    submit,
)
from server.state import ServerState, state_of

router = APIRouter(route_class=JSONRoute)

_DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions", response_model=None, responses={200: {"model": Completion}})
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue text, or score it."""
    state = state_of(request)
    headers = check_fields(body, state)
    if body.suffix:
        raise ApiError(
            400,
            "suffix is not supported: the model has no fill-in-the-middle tokens",
            param="suffix",
            code="unsupported_parameter",
        )
    tokenizer, info = state.model()
    logprobs = check_logprobs(body.logprobs, "logprobs", state, info.vocab_size)
    asked = check_logprobs(body.prompt_logprobs, "prompt_logprobs", state, info.vocab_size)
    echoed = logprobs if body.echo else None
    params = sampling_params(body, state.defaults(info))
    prompts = await _encode(body, state)
    log: RequestLog = request.state.log
    if body.request_id is not None and "x-request-id" not in request.headers:
        log.request_id = body.request_id
    requests = build_requests(
        state,
        body,
        prompts,
        Output(
            logprobs=logprobs,
            prompt_logprobs=max((n for n in (asked, echoed) if n is not None), default=None),
            skip_special_tokens=body.skip_special_tokens,
            stream=body.stream,
            trace=None if body.trace is None else body.trace.wish,
        ),
        params,
        label=log.request_id,
        salt=request.state.salt,
        prompt_param="prompt",
        default_max_tokens=_DEFAULT_MAX_TOKENS,
    )
    choices = CompletionChoices(body, requests, tokenizer)
    name = state.model_names[0]
    envelope = Envelope(f"cmpl-{log.request_id}", name, fingerprint(name, info), "text_completion")
    generation = submit(state, requests)
    if body.stream:
        events = stream(state, body, generation, log, envelope, choices, choices.format_chunk)
        events.headers.update(headers)
        return events
    try:
        deltas, tally = await collect(request, generation, log)
    except ClientGone:
        return gone()
    answer: dict[str, Any] = envelope.around(
        [choices.format(delta) for delta in sorted(deltas, key=choices.index)],
        usage=tally.usage(),
    )
    return JSONResponse(answer, headers=headers)


async def _encode(body: CompletionRequest, state: ServerState) -> list[list[int]]:
    """Every prompt as token ids. Raises ApiError or InvalidRequest."""
    if len(body.prompt) > state.config.max_prompts:
        raise ApiError(
            400,
            f"prompt must hold at most {state.config.max_prompts} prompts, got {len(body.prompt)}",
            param="prompt",
            code="invalid_value",
        )
    tokenizer, _ = state.model()
    prompts: list[list[int]] = []
    for prompt in body.prompt:
        ids: list[int] = (
            await in_thread_if_long(len(prompt), tokenizer.encode, prompt, body.add_special_tokens)
            if isinstance(prompt, str)
            else prompt
        )
        require_prompt(ids, "prompt" in body.model_fields_set)
        prompts.append(ids)
    return prompts
