"""POST /v1/explain: what the pipeline does at given positions of a text, without generating."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from engine.errors import InvalidRequest
from engine.prepare import Output, check_ids, prepare
from engine.tokenizer import Tokenizer
from server.answers import Envelope, fingerprint, trace_body
from server.body import JSONRoute
from server.middleware import RequestLog
from server.schemas import ExplainedPosition, ExplainRequest, Explanation
from server.serving import (
    ClientGone,
    check_fields,
    collect,
    gone,
    in_thread_if_long,
    require_prompt,
    sampling_params,
    submit,
)
from server.state import state_of

router = APIRouter(route_class=JSONRoute)

_NEED_MORE = (
    "use_beam_search",
    "penalty_alpha",
    "cot_branches",
    "sed",
    "guidance_scale",
    "kl_bandwidth",
    "cd_amateur",
    "num_pause_tokens",
    "num_latent_thoughts",
)


@router.post("/v1/explain", response_model=None, responses={200: {"model": Explanation}})
async def explain(request: Request, body: ExplainRequest) -> Response:
    """Trace the tokens of a text as if they had been drawn one after the other."""
    state = state_of(request)
    headers = check_fields(body, state)
    tokenizer, info = state.model()
    params = sampling_params(body, state.defaults(info))
    prompt_ids = await _ids(body.prompt, tokenizer, body.add_special_tokens)
    require_prompt(prompt_ids, given=True)
    forced_ids = await _ids(body.continuation or [], tokenizer, special=False)
    check_ids(forced_ids, info, "continuation")
    end = len(prompt_ids) + len(forced_ids)
    positions = _positions(body.positions, len(prompt_ids), end)
    log: RequestLog = request.state.log
    if others := [name for name in _NEED_MORE if params.asks(name)]:
        raise InvalidRequest(
            f"{others[0]} needs more sequences than the text itself, so it cannot be explained",
            others[0],
            "unsupported_parameter",
        )
    if body.trace is None:
        raise InvalidRequest("trace must not be false here", "trace")
    one = prepare(
        [*prompt_ids, *forced_ids],
        params.model_copy(update={"max_tokens": 0, "n": 1, "best_of": None}),
        Output(trace=body.trace.wish, explained=positions, forced_len=len(forced_ids)),
        info,
        tokenizer,
        request_id=state.unique_id(log.request_id),
        cache_salt=request.state.salt,
    )
    name = state.model_names[0]
    envelope = Envelope(f"explain-{log.request_id}", name, fingerprint(name, info), "explanation")
    try:
        deltas, tally = await collect(request, submit(state, [one]), log)
    except ClientGone:
        return gone()
    explained: list[ExplainedPosition] = [
        {
            "position": position,
            "forced": position < end,
            "trace": trace_body(token, token.trace, tokenizer),
        }
        for position, token in deltas[0].explained
        if token.trace is not None
    ]
    answer: dict[str, Any] = envelope.around([], token_ids=list(one.prompt_ids))
    del answer["choices"]
    return JSONResponse(answer | {"positions": explained, "usage": tally.usage()}, headers=headers)


async def _ids(value: str | list[int], tokenizer: Tokenizer, special: bool) -> list[int]:
    if not isinstance(value, str):
        return value
    ids: list[int] = await in_thread_if_long(len(value), tokenizer.encode, value, special)
    return ids


def _positions(asked: list[int] | None, prompt_len: int, end: int) -> tuple[int, ...]:
    """The positions to explain, ascending. Raises InvalidRequest for one that has no row."""
    if asked is None:
        return tuple(range(prompt_len, end)) or (end,)
    for index, position in enumerate(asked):
        if not 1 <= position <= end:
            raise InvalidRequest(
                f"positions[{index}] must be between 1 and {end}, the place behind the text, got "
                f"{position}",
                f"positions[{index}]",
            )
    return tuple(sorted(set(asked)))
