"""POST /v1/completions."""

from fastapi import APIRouter, Response

from server.answers import CompletionChoices, Envelope
from server.body import JSONRequest, JSONRoute
from server.schemas import Completion, CompletionRequest
from server.serving import collect, stream, submit
from server.state import state_of
from server.whole import Each, written

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/completions", response_model=None, responses={200: {"model": Completion}})
async def completions(request: JSONRequest, body: CompletionRequest) -> Response:
    """Continue text, or score it."""
    state, requests = state_of(request), request.found.requests
    tokenizer, _ = state.model()
    choices = CompletionChoices(body, requests, tokenizer)
    envelope = Envelope(f"cmpl-{request.state.log.request_id}", *state.names(), "text_completion")
    generation = submit(state, requests)
    if body.stream:
        return stream(request, generation, envelope, choices, choices.format_chunk)
    deltas, tally = await collect(request, generation)
    formatted = Each(lambda: map(choices.format, sorted(deltas, key=choices.index)))
    return await written(envelope.around(formatted, usage=tally.usage()))
