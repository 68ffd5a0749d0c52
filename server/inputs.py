"""From a body to what the engine is to do: the part of a request's way that takes processor time.

Nothing here knows of the event loop. What may take long is read in a process of its own
(`server.worker`), by the same functions.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import jiter
from pydantic import BaseModel

from engine.errors import InvalidRequest
from engine.messages import Request
from engine.params import SamplingParams, StrictModel, combinable
from engine.prepare import ModelInfo, Output, check_ids, encode, prepare, too_long
from engine.tokenizer import Tokenizer
from server.config import ServerConfig
from server.errors import ApiError
from server.schemas import (
    UNSUPPORTED,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ExplainRequest,
    GenerationRequest,
    TokenizeRequest,
)

QUICK_BYTES = 4096  # of a body that is read on the event loop
MAX_LISTED = 1 << 22  # tokens in the lists of a request's answer
_DEFAULT_MAX_TOKENS = 16
_SHOWN_FIELDS = 20

# What answers are made by; the rest of a body has done its work once the requests are made.
_ANSWER_FIELDS = (
    *("n", "stream", "stream_options", "request_id", "skip_special_tokens", "trace"),
    *("echo", "logprobs", "top_logprobs", "prompt_logprobs"),
    *("return_token_ids", "return_tokens_as_token_ids"),
)

# What cannot be explained: it needs more sequences than the text itself.
NEED_MORE = (
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

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Reader:
    """What has to be known to read a body: options, the loaded model, its tokenizer. Pickles."""

    config: ServerConfig
    model_names: list[str]
    defaults: dict[str, Any]  # sampling parameters that apply where a request gives none
    info: ModelInfo
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Incoming:
    """A body as it came, and what else is known of its request."""

    path: str
    data: bytes
    label: str  # what it is called in logs
    number: int  # tells it from others of the same label
    arrival_s: float  # time.monotonic()
    salt: str = ""  # of the prefix cache
    named: bool = False  # was the label given in a header, which goes before the body?


@dataclass(frozen=True, slots=True)
class Input:
    """A body that has been read.

    Either `requests` are to be submitted, and `body` says how to answer, or the `answer` is there.
    """

    headers: dict[str, str]
    num_ignored: int = 0
    body: Any = None
    requests: list[Request] = field(default_factory=list)
    answer: bytes = b""


def defaults_of(config: ServerConfig, info: ModelInfo, sampling: dict[str, Any]) -> dict[str, Any]:
    """The model's recommendations, if they are to be followed, under the configuration's own."""
    recommended = info.sampling_defaults if config.generation_config else {}
    return combinable(recommended, SamplingParams.model_validate(sampling)) | sampling


def read(incoming: Incoming, reader: Reader, value: dict[str, Any] | None = None) -> Input:
    """Read a body, or what it holds if that is known.

    Raises ApiError, InvalidRequest or pydantic's ValidationError.
    """
    given = parse(incoming.data) if value is None else value
    _check_model(given, reader.model_names)
    return _READERS[incoming.path](incoming, given, reader)


def quick(incoming: Incoming) -> dict[str, Any] | None:
    """What a body holds, if it is small and simple enough to be read in no time; else None.

    Templates and patterns are programs, of which the shortest may take longest. Raises ApiError.
    """
    if len(incoming.data) > QUICK_BYTES or incoming.path in _RENDERING:
        return None
    value = parse(incoming.data)
    prompts = value.get("prompt")
    # What is to be found of a request, be it short, is found for each of its prompts.
    are_many = isinstance(prompts, list) and any(not isinstance(one, int) for one in prompts[1:])
    return None if are_many or value.keys() & _PROGRAMS else value


def parse(data: bytes) -> dict[str, Any]:
    """Strict JSON: no NaN, no duplicate keys, nothing behind the value. Raises ApiError."""
    try:
        value = jiter.from_json(data, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        reason = str(error).replace("recursion limit exceeded", "it is nested too deeply")
        raise ApiError(
            400, f"The body is not valid JSON: {reason[:200]}.", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return value


def _check_model(value: Mapping[str, Any], names: Sequence[str]) -> None:
    model = value.get("model")
    if isinstance(model, str) and model not in names:
        raise ApiError(
            404,
            f"The model {model[:100]!r} does not exist; this server has {', '.join(names)}.",
            param="model",
            code="model_not_found",
        )


# -- what all routes check


def _validated(model: type[Body], value: dict[str, Any], reader: Reader) -> Body:
    """The body as its schema has it, after lists that are too long have been refused unread."""
    context_len, vocab_size = reader.info.context_len, reader.info.vocab_size
    limits = {
        "stop_token_ids": vocab_size,
        "allowed_token_ids": vocab_size,
        "logit_bias": vocab_size,
        "negative_prompt": context_len,
        "kl_reference_prompt": context_len,
        "continuation": context_len,
        "messages": context_len,
        "documents": context_len,
        "positions": context_len + 1,
    }
    for name, most in limits.items():
        its = value.get(name)
        if isinstance(its, list | dict) and len(its) > most:
            raise InvalidRequest(f"{name} must hold at most {most} entries, got {len(its)}", name)
    return model.model_validate(value)


def _check_fields(body: StrictModel, reader: Reader) -> tuple[dict[str, str], int]:
    """Refuse what cannot be honoured.

    Returns the headers that report what has no effect, and how many fields are ignored.
    """
    headers: dict[str, str] = {}
    if isinstance(body, SamplingParams) and (idle := body.without_effect):
        verb = "has" if len(idle) == 1 else "have"
        headers["Warning"] = f'199 - "{", ".join(idle)} {verb} no effect with {body.method}"'
    ignored = list(_unknown(body))
    if ignored and reader.config.strict_params:
        name = ignored[0][:100]
        raise InvalidRequest(f"{name} is unknown", name, "unknown_parameter")
    if ignored:
        shown = [quote(name[:100], safe="") for name in sorted(ignored)[:_SHOWN_FIELDS]]
        headers["X-Ignored-Fields"] = ", ".join(shown)
    return headers, len(ignored)


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


def _check_logprobs(count: int | None, param: str, reader: Reader) -> int | None:
    """How many candidates the engine should list; -1 is all of them, if the server allows it."""
    cap, vocab_size = reader.config.max_logprobs, reader.info.vocab_size
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


def _prompt_ids(
    prompt: str | list[int], param: str, reader: Reader, special: bool, keep: int | None = None
) -> list[int]:
    """A prompt's tokens. One that cannot fit is not encoded, unless so much of it is to be kept."""
    if not isinstance(prompt, str):
        return prompt
    if keep is not None:
        return reader.tokenizer.encode(prompt, special)
    return encode(prompt, param, reader.info, reader.tokenizer, special=special)


def _require_prompt(prompt_ids: list[int], given: bool) -> None:
    """Refuse an empty prompt where the tokenizer puts nothing before it."""
    if prompt_ids:
        return
    if not given:
        raise ApiError(400, "prompt is required", param="prompt", code="missing_required_parameter")
    raise InvalidRequest("prompt must not be empty: this model has no begin token", "prompt")


# -- both generating routes


def _generation(
    incoming: Incoming,
    body: GenerationRequest,
    prompts: Sequence[list[int]],
    output: Output,
    reader: Reader,
    checked: tuple[dict[str, str], int],
) -> Input:
    """A request of the engine for each prompt."""
    is_chat = isinstance(body, ChatCompletionRequest)
    param = "messages" if is_chat else "prompt"
    params = sampling_params(body, reader.defaults)
    name = incoming.label if incoming.named else body.request_id or incoming.label
    label = f"{name}-{incoming.number}"
    several = len(prompts) > 1
    tokenizer = reader.tokenizer.remembering() if several else reader.tokenizer
    requests = [
        prepare(
            _truncated(prompt_ids, body, reader.info.context_len),
            params,
            output,
            reader.info,
            tokenizer,
            request_id=f"{label}.{number}" if several else label,
            prompt_param=f"{param}[{number}]" if several else param,
            default_max_tokens=None if is_chat else _DEFAULT_MAX_TOKENS,
            clamp_max_tokens=reader.config.clamp_max_tokens,
            priority=body.priority,
            cache_salt=incoming.salt + body.cache_salt,
            arrival_s=incoming.arrival_s,
        )
        for number, prompt_ids in enumerate(prompts)
    ]
    _check_listed(requests)
    headers, num_ignored = checked
    fields = {name: getattr(body, name) for name in _ANSWER_FIELDS if hasattr(body, name)}
    return Input(headers, num_ignored, type(body).model_construct(set(), **fields), requests)


def _truncated(prompt_ids: list[int], body: GenerationRequest, context_len: int) -> list[int]:
    """The part of a prompt that truncate_prompt_tokens leaves."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return prompt_ids
    keep = context_len - 1 if keep == -1 else keep
    return prompt_ids[-keep:] if body.truncation_side == "left" else prompt_ids[:keep]


def _check_listed(requests: Sequence[Request]) -> None:
    """Would the answer's lists of tokens fit into memory? Raises InvalidRequest."""
    total = 0
    for request in requests:
        output = request.max_tokens * request.params.num_sequences
        traced = 0 if request.trace is None else request.trace.top * (2 + len(request.trace.layers))
        total += output * ((request.logprobs or 0) + traced)
        total += len(request.prompt_ids) * (request.prompt_logprobs or 0)
        total += len(request.explained) * traced
    if total > MAX_LISTED:
        raise InvalidRequest(
            f"logprobs and traces of all tokens would list {total} tokens, more than the "
            f"{MAX_LISTED} of one answer; ask for fewer of each, or for less output",
            "max_tokens",
        )


def _read_completion(incoming: Incoming, value: dict[str, Any], reader: Reader) -> Input:
    _shorten_ids(value, reader)
    body = _validated(CompletionRequest, value, reader)
    checked = _check_fields(body, reader)
    if body.suffix:
        raise ApiError(
            400,
            "suffix is not supported: the model has no fill-in-the-middle tokens",
            param="suffix",
            code="unsupported_parameter",
        )
    logprobs = _check_logprobs(body.logprobs, "logprobs", reader)
    asked = _check_logprobs(body.prompt_logprobs, "prompt_logprobs", reader)
    echoed = logprobs if body.echo else None
    prompts: list[list[int]] = []
    for number, prompt in enumerate(body.prompt):
        param = f"prompt[{number}]" if len(body.prompt) > 1 else "prompt"
        keep = body.truncate_prompt_tokens
        ids = _prompt_ids(prompt, param, reader, body.add_special_tokens, keep)
        _require_prompt(ids, "prompt" in body.model_fields_set)
        prompts.append(ids)
    output = Output(
        logprobs=logprobs,
        prompt_logprobs=max((n for n in (asked, echoed) if n is not None), default=None),
        skip_special_tokens=body.skip_special_tokens,
        stream=body.stream,
        trace=None if body.trace is None else body.trace.wish,
    )
    return _generation(incoming, body, prompts, output, reader, checked)


def _shorten_ids(value: dict[str, Any], reader: Reader) -> None:
    """Refuse too many prompts, and prompts of too many ids, before any id is looked at.

    Of those that are truncated anyway, what is not kept is dropped here.
    """
    prompt, most = value.get("prompt"), reader.info.context_len
    if not isinstance(prompt, list) or not prompt:
        return
    several = isinstance(prompt[0], list | str)
    if several and len(prompt) > reader.config.max_prompts:
        raise InvalidRequest(
            f"prompt must hold at most {reader.config.max_prompts} prompts, got {len(prompt)}",
            "prompt",
        )
    keep = value.get("truncate_prompt_tokens", value.get("truncate"))
    right = value.get("truncation_side") == "right"
    kept: list[Any] = []
    for number, ids in enumerate(prompt if several else [prompt]):
        if isinstance(ids, list) and len(ids) > most:
            if keep is None:
                param = f"prompt[{number}]" if several and len(prompt) > 1 else "prompt"
                asked = value.get("max_tokens")
                completion = asked if type(asked) is int else _DEFAULT_MAX_TOKENS
                raise too_long(most, len(ids), completion, param)
            # One more than the context: what is to be kept may still be too long.
            ids = ids[: most + 1] if right else ids[-most - 1 :]
        kept.append(ids)
    value["prompt"] = kept if several else kept[0]


def _read_chat(incoming: Incoming, value: dict[str, Any], reader: Reader) -> Input:
    body = _validated(ChatCompletionRequest, value, reader)
    checked = _check_fields(body, reader)
    top = _check_logprobs(body.top_logprobs, "top_logprobs", reader)
    asked = _check_logprobs(body.prompt_logprobs, "prompt_logprobs", reader)
    output = Output(
        logprobs=top if body.logprobs else None,
        prompt_logprobs=asked,
        skip_special_tokens=body.skip_special_tokens,
        stream=body.stream,
        trace=None if body.trace is None else body.trace.wish,
    )
    text = _rendered(body, reader)
    keep = body.truncate_prompt_tokens
    prompt_ids = _prompt_ids(text, "messages", reader, body.add_special_tokens, keep)
    return _generation(incoming, body, [prompt_ids], output, reader, checked)


def _rendered(body: ChatCompletionRequest, reader: Reader) -> str:
    """The messages as text. Raises InvalidRequest naming the field to blame."""
    if body.chat_template is not None and not reader.config.trust_request_templates:
        raise InvalidRequest(
            "chat_template is only accepted with --trust-request-templates",
            "chat_template",
            "unsupported_parameter",
        )
    if body.tools:
        raise InvalidRequest("tools are not supported", "tools", "unsupported_parameter")
    if body.tool_choice not in (None, "none"):
        raise InvalidRequest(
            "tool_choice is not supported, except as none", "tool_choice", "unsupported_parameter"
        )
    return reader.tokenizer.render_chat(
        [message.for_template() for message in body.messages],
        body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        **({"documents": body.documents} if body.documents is not None else {}),
        **({"chat_template": body.chat_template} if body.chat_template else {}),
    )


# -- the other routes


def _read_explain(incoming: Incoming, value: dict[str, Any], reader: Reader) -> Input:
    _shorten_ids(value, reader)
    body = _validated(ExplainRequest, value, reader)
    headers, num_ignored = _check_fields(body, reader)
    params = sampling_params(body, reader.defaults)
    prompt_ids = _prompt_ids(body.prompt, "prompt", reader, body.add_special_tokens)
    _require_prompt(prompt_ids, given=True)
    forced_ids = _prompt_ids(body.continuation or [], "continuation", reader, special=False)
    check_ids(forced_ids, reader.info, "continuation")
    end = len(prompt_ids) + len(forced_ids)
    positions = _positions(body.positions, len(prompt_ids), end)
    if others := [name for name in NEED_MORE if params.asks(name)]:
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
        reader.info,
        reader.tokenizer,
        request_id=f"{incoming.label}-{incoming.number}",
        cache_salt=incoming.salt,
        arrival_s=incoming.arrival_s,
    )
    _check_listed([one])
    return Input(headers, num_ignored, requests=[one])


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


def _read_tokenize(_incoming: Incoming, value: dict[str, Any], reader: Reader) -> Input:
    body = _validated(TokenizeRequest, value, reader)
    headers, num_ignored = _check_fields(body, reader)
    tokenizer = reader.tokenizer
    if body.messages is None:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        tokens = tokenizer.encode(body.prompt or "", add_special_tokens=special)
    else:
        text = tokenizer.render_chat(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
        )
        tokens = tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))
    strings = list(map(tokenizer.text_of, tokens)) if body.return_token_strs else None
    answer = {
        "count": len(tokens),
        "max_model_len": reader.info.context_len,
        "tokens": tokens,
        "token_strs": strings,
    }
    return Input(headers, num_ignored, answer=as_json(answer))


def _read_detokenize(_incoming: Incoming, value: dict[str, Any], reader: Reader) -> Input:
    body = _validated(DetokenizeRequest, value, reader)
    headers, num_ignored = _check_fields(body, reader)
    vocab_size = reader.info.vocab_size
    for index, token_id in enumerate(body.tokens):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"tokens[{index}] is {token_id}, which is not a token id: they run from 0 to "
                f"{vocab_size - 1}",
                f"tokens[{index}]",
                "invalid_token_id",
            )
    text = reader.tokenizer.decode(body.tokens)
    return Input(headers, num_ignored, answer=as_json({"prompt": text}))


def _read_tokenizer_info(_incoming: Incoming, _value: dict[str, Any], reader: Reader) -> Input:
    hf = reader.tokenizer.hf
    answer = {
        "tokenizer_class": type(hf).__name__,
        "bos_token": hf.bos_token,
        "eos_token": hf.eos_token,
        "pad_token": hf.pad_token,
        "unk_token": hf.unk_token,
        "chat_template": hf.chat_template,
        "model_max_length": reader.info.context_len,
        "vocab_size": reader.info.vocab_size,
        "add_bos_token": reader.tokenizer.adds_bos,
    }
    return Input({}, answer=as_json(answer))


CHAT = "/v1/chat/completions"
TOKENIZER_INFO = "/tokenizer_info"  # the one without a body

_RENDERING = (CHAT, TOKENIZER_INFO)
_PROGRAMS = {"messages", "cot_pattern"}

_READERS: dict[str, Callable[[Incoming, dict[str, Any], Reader], Input]] = {
    "/v1/completions": _read_completion,
    CHAT: _read_chat,
    "/v1/explain": _read_explain,
    "/tokenize": _read_tokenize,
    "/v1/tokenize": _read_tokenize,
    "/detokenize": _read_detokenize,
    "/v1/detokenize": _read_detokenize,
    TOKENIZER_INFO: _read_tokenizer_info,
}


def as_json(value: Any) -> bytes:
    """JSON as all answers have it. Raises ValueError for what JSON cannot hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode()
