"""POST /v1/chat/completions."""

from typing import Any

from fastapi import APIRouter, Response

from server.answers import ChatChoices, Envelope
from server.body import JSONRequest, JSONRoute
from server.schemas import ChatCompletion, ChatCompletionRequest
from server.serving import collect, stream, submit
from server.state import state_of
from server.whole import Each, written

router = APIRouter(route_class=JSONRoute)


@router.post(
    "/v1/chat/completions", response_model=None, responses={200: {"model": ChatCompletion}}
)
async def chat_completions(request: JSONRequest, body: ChatCompletionRequest) -> Response:
    """Answer a conversation."""
    state, requests = state_of(request), request.found.requests
    tokenizer, _ = state.model()
    choices = ChatChoices(body, requests, tokenizer)
    envelope = Envelope(
        f"chatcmpl-{request.state.log.request_id}", *state.names(), "chat.completion"
    )
    more: dict[str, Any] = {}
    if body.return_token_ids:
        more["prompt_token_ids"] = list(requests[0].prompt_ids)
    generation = submit(state, requests)
    if body.stream:
        envelope.object = "chat.completion.chunk"
        envelope.first = more
        return stream(request, generation, envelope, choices, choices.format_chunk)
    deltas, tally = await collect(request, generation)
    more["usage"] = tally.usage()
    if body.prompt_logprobs is not None:
        more["prompt_logprobs"] = choices.prompt_logprobs(deltas[0].prompt)
    formatted = Each(lambda: map(choices.format, sorted(deltas, key=choices.index)))
    return await written(envelope.around(formatted, **more))
