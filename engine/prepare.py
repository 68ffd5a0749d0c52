"""From parameters as the client gave them to a request with every default resolved.

Everything that can be wrong with a request for this model is found here, before the engine sees
it.
"""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InvalidRequest
from engine.params import SamplingParams
from engine.tokenizer import Tokenizer
from engine.types import Request, TraceWish


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the front end knows of the loaded model and the engine's capacity."""

    vocab_size: int
    context_len: int  # prompt and output together
    num_lanes: int
    num_blocks: int
    block_size: int
    eos_token_ids: frozenset[int]
    dtype: str
    device: str
    model_type: str
    identity: str  # differs where weights, their type or the machine may change the output
    num_layers: int = 0
    has_lens: bool = True  # can its layers be read one by one?
    sampling_defaults: dict[str, Any] = field(default_factory=dict)  # generation_config.json's

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class Output:
    """What a client wants to be told besides the text."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    stream: bool = False
    trace: TraceWish | None = None
    explained: tuple[int, ...] = ()
    forced_len: int = 0


def prepare(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    output: Output,
    info: ModelInfo,
    tokenizer: Tokenizer,
    *,
    request_id: str,
    prompt_param: str = "prompt",
    default_max_tokens: int | None = None,
    clamp_max_tokens: bool = False,
    priority: int = 0,
    cache_salt: str = "",
) -> Request:
    """Check a request against the model and resolve what it left open.

    `prompt_param` is the field to blame for a bad prompt. Raises InvalidRequest.
    """
    _check_ids(prompt_ids, info, prompt_param)
    _check_ids(params.stop_token_ids, info, "stop_token_ids")
    _check_ids(params.allowed_token_ids or (), info, "allowed_token_ids")
    _check_ids(params.logit_bias, info, "logit_bias")
    if output.trace is not None:
        _check_layers(output.trace, info)
    max_tokens = _max_tokens(
        len(prompt_ids), params, info, prompt_param, default_max_tokens, clamp_max_tokens
    )
    if params.max_tokens is None and params.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens, here {max_tokens}, got {params.min_tokens}",
            "min_tokens",
        )
    stop_tokens: dict[int, int | str] = {token_id: token_id for token_id in params.stop_token_ids}
    for token_id, text in tokenizer.special.items():
        if text in params.stop:
            stop_tokens[token_id] = text
    ends = info.eos_token_ids | stop_tokens.keys()
    seed = params.seed
    return Request(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        params=params,
        max_tokens=max_tokens,
        seed=random_seed() if seed is None or seed == -1 else seed,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        eos_token_ids=info.eos_token_ids,
        stop_tokens=stop_tokens,
        stop_strings=tuple(params.stop),
        trace=output.trace,
        explained=output.explained,
        forced_len=output.forced_len,
        clarify_token=_clarify_token(params, info, tokenizer),
        dry_breaker_ids=tuple(_breaker_ids(params, tokenizer)),
        bad_word_ids=tuple(_bad_word_ids(params.bad_words, tokenizer, ends)),
        skip_special_tokens=output.skip_special_tokens,
        stream=output.stream,
        priority=priority,
        cache_salt=cache_salt,
        arrival_s=time.monotonic(),
    )


def random_seed() -> int:
    """A seed for a request that brought none."""
    return secrets.randbits(63)


def _check_ids(token_ids: Iterable[int], info: ModelInfo, param: str) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequest(
                f"{param} holds {token_id}, which is not a token id: they run from 0 to "
                f"{info.vocab_size - 1}",
                param,
                "invalid_token_id",
            )


def _check_layers(trace: TraceWish, info: ModelInfo) -> None:
    for layer in trace.layers:
        if not 0 <= layer <= info.num_layers:
            raise InvalidRequest(
                f"trace.layers holds {layer}; this model's layers run from 0, the embedding, to "
                f"{info.num_layers}",
                "trace.layers",
            )
    if trace.layers and not info.has_lens:
        raise InvalidRequest(
            f"trace.layers: the layers of a {info.model_type} model cannot be read one by one",
            "trace.layers",
            "unsupported_parameter",
        )


def _max_tokens(
    prompt_len: int,
    params: SamplingParams,
    info: ModelInfo,
    prompt_param: str,
    default: int | None,
    clamp: bool,
) -> int:
    """The number of tokens to generate; raises InvalidRequest if that many cannot fit."""
    room = info.context_len - prompt_len
    asked = params.max_tokens
    too_long = room < 0 or (room == 0 and asked != 0)
    if too_long or (asked is not None and asked > room and not clamp):
        completion = asked if asked is not None else (default or 1)
        raise InvalidRequest(
            f"This model's maximum context length is {info.context_len} tokens. However, you "
            f"requested {prompt_len + completion} tokens ({prompt_len} in the prompt, "
            f"{completion} in the completion). Please reduce the length of the prompt or the "
            "completion.",
            prompt_param,
            "context_length_exceeded",
        )
    width = params.num_sequences
    if width > info.num_lanes:
        raise InvalidRequest(
            f"{_width_field(params)} must be at most {info.num_lanes}, the number of sequences "
            f"this server computes together, got {width}",
            _width_field(params),
        )
    blocks_each = info.num_blocks // width
    capacity = blocks_each * info.block_size - prompt_len
    wanted = min(room, default if asked is None and default is not None else room)
    max_tokens = min(wanted if asked is None else asked, room)
    if asked is None and max_tokens > capacity > 0:
        return capacity
    if max_tokens > capacity:
        raise InvalidRequest(
            f"{width} x {prompt_len + max_tokens} tokens do not fit into this server's cache of "
            f"{info.num_blocks * info.block_size} tokens",
            "max_tokens" if capacity > 0 else prompt_param,
        )
    return max_tokens


def _width_field(params: SamplingParams) -> str:
    return "n" if params.best_of is None else "best_of"


def _clarify_token(params: SamplingParams, info: ModelInfo, tokenizer: Tokenizer) -> int | None:
    """The token that entropix puts in where the model is lost; by default " ..."."""
    if params.entropix is None:
        return None
    token = params.entropix.clarify_token
    if isinstance(token, int):
        _check_ids([token], info, "entropix.clarify_token")
        return token
    ids = tokenizer.encode(" ..." if token is None else token, add_special_tokens=False)
    if token is not None and len(ids) != 1:
        raise InvalidRequest(
            f"entropix.clarify_token must be one token, {token!r} is {len(ids)}",
            "entropix.clarify_token",
        )
    return ids[0] if len(ids) == 1 else None


def _breaker_ids(params: SamplingParams, tokenizer: Tokenizer) -> Iterable[tuple[int, ...]]:
    """The tokens of each sequence breaker."""
    if params.dry_multiplier > 0.0:
        for breaker in params.dry_sequence_breakers:
            yield tuple(tokenizer.encode(breaker, add_special_tokens=False))


def _bad_word_ids(
    words: list[str], tokenizer: Tokenizer, ends: Iterable[int]
) -> Iterable[tuple[int, ...]]:
    """Each word's tokens, and those behind a space where they are other tokens.

    The spaced form counts only if it has as many tokens and begins with another one: then the
    space is part of its first token.
    """
    for index, word in enumerate(words):
        bare = tokenizer.encode(word, add_special_tokens=False)
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        if not bare or (len(bare) == 1 and bare[0] in ends):
            raise InvalidRequest(
                f"bad_words[{index}] is {word!r}, which ends the text; to go on past the end "
                "use ignore_eos or min_tokens",
                f"bad_words[{index}]",
            )
        yield tuple(bare)
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            yield tuple(spaced)
