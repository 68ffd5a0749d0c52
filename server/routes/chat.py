"""POST /v1/chat/completions."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from engine.prepare import Output
from server.answers import ChatChoices, Envelope, fingerprint
from server.body import JSONRoute
from server.chat import encode_chat
from server.middleware import RequestLog
from server.schemas import ChatCompletion, ChatCompletionRequest
from server.serving import (
    ClientGone,
    build_requests,
    check_fields,
    check_logprobs,
    collect,
    gone,
    in_thread_if_long,
    sampling_params,
    stream,
    submit,
    until_chats_render,
)
from server.state import state_of

router = APIRouter(route_class=JSONRoute)


@router.post(
    "/v1/chat/completions", response_model=None, responses={200: {"model": ChatCompletion}}
)
async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    headers = check_fields(body, state)
    tokenizer, info = state.model()
    top = check_logprobs(body.top_logprobs, "top_logprobs", state, info.vocab_size)
    asked = check_logprobs(body.prompt_logprobs, "prompt_logprobs", state, info.vocab_size)
    params = sampling_params(body, state.defaults(info))
    size = sum(len(str(message.content)) for message in body.messages)
    await until_chats_render(tokenizer)
    prompt_ids: list[int] = await in_thread_if_long(
        size, encode_chat, body, tokenizer, state.config.trust_request_templates
    )
    log: RequestLog = request.state.log
    if body.request_id is not None and "x-request-id" not in request.headers:
        log.request_id = body.request_id
    requests = build_requests(
        state,
        body,
        [prompt_ids],
        Output(
            logprobs=top if body.logprobs else None,
            prompt_logprobs=asked,
            skip_special_tokens=body.skip_special_tokens,
            stream=body.stream,
            trace=None if body.trace is None else body.trace.wish,
        ),
        params,
        label=log.request_id,
        salt=request.state.salt,
        prompt_param="messages",
        default_max_tokens=None,
    )
    choices = ChatChoices(body, requests, tokenizer)
    name = state.model_names[0]
    envelope = Envelope(
        f"chatcmpl-{log.request_id}", name, fingerprint(name, info), "chat.completion"
    )
    generation = submit(state, requests)
    if body.stream:
        envelope.object = "chat.completion.chunk"
        if body.return_token_ids:
            envelope.first = {"prompt_token_ids": prompt_ids}
        events = stream(state, body, generation, log, envelope, choices, choices.format_chunk)
        events.headers.update(headers)
        return events
    try:
        deltas, tally = await collect(request, generation, log)
    except ClientGone:
        return gone()
    more: dict[str, Any] = {"usage": tally.usage()}
    if body.return_token_ids:
        more["prompt_token_ids"] = prompt_ids
    if body.prompt_logprobs is not None:
        more["prompt_logprobs"] = choices.prompt_logprobs(deltas[0].prompt)
    formatted = [choices.format(delta) for delta in sorted(deltas, key=choices.index)]
    return JSONResponse(envelope.around(formatted, **more), headers=headers)
