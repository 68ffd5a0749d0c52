"""POST /v1/explain: what the pipeline does at given positions of a text, without generating."""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Response

from engine.messages import Delta
from engine.tokenizer import Tokenizer
from server.answers import Envelope, trace_body
from server.body import JSONRequest, JSONRoute
from server.schemas import ExplainedPosition, ExplainRequest, Explanation
from server.serving import collect, submit
from server.state import state_of
from server.whole import Each, written

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/explain", response_model=None, responses={200: {"model": Explanation}})
async def explain(request: JSONRequest, _body: ExplainRequest) -> Response:
    """Trace the tokens of a text as if they had been drawn one after the other."""
    state, (one,) = state_of(request), request.found.requests
    tokenizer, _ = state.model()
    envelope = Envelope(f"explain-{request.state.log.request_id}", *state.names(), "explanation")
    (delta,), tally = await collect(request, submit(state, [one]))
    answer: dict[str, Any] = envelope.around([], token_ids=list(one.prompt_ids))
    del answer["choices"]
    end = len(one.prompt_ids)
    answer["positions"] = Each(lambda: _explained(delta, end, tokenizer))
    return await written(answer | {"usage": tally.usage()})


def _explained(delta: Delta, end: int, tokenizer: Tokenizer) -> Iterator[ExplainedPosition]:
    """What is told of each position; the one at the `end` was drawn."""
    for position, token in delta.explained:
        if token.trace is not None:
            yield {
                "position": position,
                "forced": position < end,
                "trace": trace_body(token, token.trace, tokenizer),
            }
