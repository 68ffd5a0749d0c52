"""The served models and their tokenizer."""

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.client import EngineState
from server.body import JSONRequest, JSONRoute
from server.errors import ApiError
from server.inputs import TOKENIZER_INFO, Incoming
from server.schemas import DetokenizeRequest, TokenizeRequest
from server.state import ServerState, state_of

router = APIRouter(route_class=JSONRoute)


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The names the model is served under."""
    state = state_of(request)
    return {"object": "list", "data": [_entry(state, name) for name in state.model_names]}


@router.get("/v1/models/{model:path}")
async def retrieve_model(request: Request, model: str) -> dict[str, Any]:
    """One of them."""
    state = state_of(request)
    if model not in state.model_names:
        raise ApiError(
            404,
            f"The model {model[:100]!r} does not exist; this server has "
            f"{', '.join(state.model_names)}.",
            param="model",
            code="model_not_found",
        )
    return _entry(state, model)


def _entry(state: ServerState, name: str) -> dict[str, Any]:
    info = state.engine.info if state.engine.state is EngineState.SERVING else None
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "logitmill",
        "root": state.model_names[0],
        "parent": None,
        "max_model_len": info.context_len if info is not None else None,
    }


@router.post("/tokenize")
@router.post("/v1/tokenize")
async def tokenize(request: JSONRequest, _body: TokenizeRequest) -> Response:
    """Text or messages to token ids."""
    return Response(request.found.answer, media_type="application/json")


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(request: JSONRequest, _body: DetokenizeRequest) -> Response:
    """Token ids to text, special tokens included."""
    return Response(request.found.answer, media_type="application/json")


@router.get(TOKENIZER_INFO)
async def tokenizer_info(request: Request) -> Response:
    """What a client needs to know to use the tokenizer from afar."""
    state, log = state_of(request), request.state.log
    asked = Incoming(TOKENIZER_INFO, b"{}", log.request_id, state.next_number(), time.monotonic())
    found = await state.read(asked)
    return Response(found.answer, media_type="application/json")
