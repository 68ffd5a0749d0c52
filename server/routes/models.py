"""The served models and their tokenizer."""

from typing import Any

from fastapi import APIRouter, Request, Response

from engine.client import EngineState
from engine.errors import InvalidRequest
from server.body import JSONRoute
from server.chat import encode_for_tokenize
from server.errors import ApiError
from server.schemas import DetokenizeRequest, TokenizeRequest
from server.serving import check_fields, in_thread_if_long, until_chats_render
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
async def tokenize(request: Request, response: Response, body: TokenizeRequest) -> dict[str, Any]:
    """Text or messages to token ids."""
    state = state_of(request)
    response.headers.update(check_fields(body, state))
    tokenizer, info = state.model()
    if body.messages is not None:
        await until_chats_render(tokenizer)
    size = len(body.prompt or "") + sum(len(str(m.content)) for m in body.messages or ())
    tokens: list[int] = await in_thread_if_long(size, encode_for_tokenize, body, tokenizer)
    strings = [tokenizer.text_of(token_id) for token_id in tokens]
    return {
        "count": len(tokens),
        "max_model_len": info.context_len,
        "tokens": tokens,
        "token_strs": strings if body.return_token_strs else None,
    }


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(
    request: Request, response: Response, body: DetokenizeRequest
) -> dict[str, str]:
    """Token ids to text, special tokens included."""
    state = state_of(request)
    response.headers.update(check_fields(body, state))
    tokenizer, info = state.model()
    for index, token_id in enumerate(body.tokens):
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequest(
                f"tokens[{index}] is {token_id}, which is not a token id: they run from 0 to "
                f"{info.vocab_size - 1}",
                f"tokens[{index}]",
                "invalid_token_id",
            )
    text: str = await in_thread_if_long(len(body.tokens), tokenizer.decode, body.tokens)
    return {"prompt": text}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What a client needs to know to use the tokenizer from afar."""
    tokenizer, info = state_of(request).model()
    await until_chats_render(tokenizer)
    return {
        "tokenizer_class": type(tokenizer.hf).__name__,
        "bos_token": tokenizer.hf.bos_token,
        "eos_token": tokenizer.hf.eos_token,
        "pad_token": tokenizer.hf.pad_token,
        "unk_token": tokenizer.hf.unk_token,
        "chat_template": tokenizer.hf.chat_template,
        "model_max_length": info.context_len,
        "vocab_size": info.vocab_size,
        "add_bos_token": tokenizer.adds_bos,
    }
