"""From parameters as the client gave them to a request with every default resolved.

Everything that can be wrong with a request for this model is found here, before the engine sees
it.
"""

import secrets
import time
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InvalidRequest
from engine.messages import Request, TraceWish
from engine.params import Method, SamplingParams, SedParams, max_waiting
from engine.tokenizer import Tokenizer

_SHALLOW = 40  # models of more layers take DoLa's buckets from the first and the last 20
_SHOWN = 100  # characters of a value in an error

# Tokens of all bad words together: each is compared with the end of the text at every step.
MAX_BAD_WORD_TOKENS = 32_768

_LATENT = ("<|start-latent|>", "<|end-latent|>")  # around thoughts, in models made for them


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
    batch_tokens: int = 1 << 30  # most that a step computes
    tied: bool = False  # does one matrix embed and read?
    amateur: str | None = None  # the name of the model that contrastive decoding can use
    amateur_context_len: int = 0
    max_beam_width: int = 1 << 30
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
    arrival_s: float | None = None,
) -> Request:
    """Check a request against the model and resolve what it left open.

    `prompt_param` is the field to blame for a bad prompt; the request came at `arrival_s`, or just
    now. Raises InvalidRequest.
    """
    check_ids(prompt_ids, info, prompt_param)
    check_ids(params.stop_token_ids, info, "stop_token_ids")
    check_ids(params.allowed_token_ids or (), info, "allowed_token_ids")
    check_ids(params.logit_bias, info, "logit_bias")
    if output.trace is not None:
        _check_layers(output.trace.layers, info, "trace.layers", info.num_layers)
    parts = _Parts(prompt_ids, params, info, tokenizer)
    early = _early_layers(params, info)
    _check_length(parts, prompt_param, default_max_tokens, clamp_max_tokens)
    _check_width(params, info, _rows_per_sequence(parts, output, early))
    max_tokens = _max_tokens(parts, prompt_param, default_max_tokens)
    if params.max_tokens is None and params.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens, here {max_tokens}, got {params.min_tokens}",
            "min_tokens",
        )
    _check_memory(params.beam_memory, max_tokens)
    stop_tokens: dict[int, int | str] = {token_id: token_id for token_id in params.stop_token_ids}
    stop_texts = set(params.stop)
    for token_id, text in tokenizer.special.items():
        # One that the model has no row for is never generated.
        if text in stop_texts and token_id < info.vocab_size:
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
        hidden_ids=parts.hidden_ids,
        num_thoughts=params.num_latent_thoughts,
        end_ids=parts.end_ids,
        companion_ids=parts.companion_ids,
        question_ids=parts.question_ids,
        verdict_ids=parts.verdict_ids,
        early_layers=early,
        eos_token_ids=info.eos_token_ids,
        stop_tokens=stop_tokens,
        stop_strings=tuple(params.stop),
        trace=output.trace,
        explained=output.explained,
        forced_len=output.forced_len,
        clarify_token=_clarify_token(params, info, tokenizer),
        dry_breaker_ids=_breaker_ids(params, info, tokenizer),
        bad_word_ids=_bad_word_ids(
            params.bad_words, info, tokenizer, ends, max(max_tokens, output.forced_len + 1)
        ),
        skip_special_tokens=output.skip_special_tokens,
        stream=output.stream,
        priority=priority,
        cache_salt=cache_salt,
        arrival_s=time.monotonic() if arrival_s is None else arrival_s,
    )


def random_seed() -> int:
    """A seed for a request that brought none."""
    return secrets.randbits(63)


def check_ids(token_ids: Iterable[int], info: ModelInfo, param: str) -> None:
    """Raise InvalidRequest for what is no id of a token."""
    for token_id in token_ids:
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequest(
                f"{param} holds {token_id}, which is not a token id: they run from 0 to "
                f"{info.vocab_size - 1}",
                param,
                "invalid_token_id",
            )


def encode(
    text: str, param: str, info: ModelInfo, tokenizer: Tokenizer, *, special: bool = False
) -> list[int]:
    """A text of a request as ids of tokens that the model has. Raises InvalidRequest.

    One that cannot fit into the context, whatever its tokens are, is not encoded at all.
    """
    least = tokenizer.least_tokens(text)
    if least > info.context_len:
        raise InvalidRequest(
            f"This model's maximum context length is {info.context_len} tokens. However, {param} "
            f"has {len(text)} characters, which are {least} tokens at least. Please reduce its "
            "length.",
            param,
            "context_length_exceeded",
        )
    ids = tokenizer.encode(text, special)
    check_ids(ids, info, param)
    return ids


def _check_layers(layers: Iterable[int], info: ModelInfo, param: str, last: int) -> None:
    for layer in layers:
        if not 0 <= layer <= last:
            raise InvalidRequest(
                f"{param} holds {layer}; of this model's layers it may name those from 0, the "
                f"embedding, to {last}",
                param,
            )
    if layers and not info.has_lens:
        raise InvalidRequest(
            f"{param}: the layers of a {info.model_type} model cannot be read one by one",
            param,
            "unsupported_parameter",
        )


def _early_layers(params: SamplingParams, info: ModelInfo) -> tuple[int, ...]:
    """The layers that DoLa contrasts the last one with."""
    if params.dola_layers is None:
        return ()
    layers = early_layers(params.dola_layers, info.num_layers, info.tied)
    _check_layers(layers, info, "dola_layers", info.num_layers - 1)
    return layers


def early_layers(chosen: str | Sequence[int], num_layers: int, tied: bool) -> tuple[int, ...]:
    """The layers that `dola_layers` names: itself a list, or "low" or "high", as transformers has.

    Layer 0 is the embedding, which says nothing in models that embed and read with one matrix.
    """
    if not isinstance(chosen, str):
        return tuple(chosen)
    start = min(2, num_layers - 1) if tied else 0
    shallow, half = num_layers <= _SHALLOW, num_layers // 2
    if chosen == "low":
        return tuple(range(start, half if shallow else 20, 2)) or (start,)
    return tuple(range(half if shallow else num_layers - 20, num_layers, 2))


def _rows_per_sequence(parts: "_Parts", output: Output, early: Sequence[int]) -> int:
    """How many rows of logits a step computes for each sequence, those of what is beside it too."""
    traced = 0 if output.trace is None else output.trace.num_rows
    return 1 + bool(parts.companion_ids) + len(early) + traced


class _Parts:
    """The tokens that a request brings besides its prompt, and what all of it needs."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        info: ModelInfo,
        tokenizer: Tokenizer,
    ) -> None:
        """Raises InvalidRequest."""
        self.params = params
        self.info = info
        self.hidden_ids: tuple[int, ...] = ()
        self.end_ids: tuple[int, ...] = ()
        self.question_ids: tuple[int, ...] = ()
        self.verdict_ids: tuple[int, ...] = ()
        if params.num_pause_tokens:
            assert params.pause_token is not None
            pause = _one_token(params.pause_token, "pause_token", info, tokenizer)
            self.hidden_ids = (pause,) * params.num_pause_tokens
        if params.num_latent_thoughts:
            start, end = (_special(text, info, tokenizer) for text in _LATENT)
            self.hidden_ids = start if start != tuple(prompt_ids[-1:]) else ()
            self.end_ids = end
        self.companion_ids = _companion_ids(prompt_ids, params, info, tokenizer)
        if params.sed is not None:
            self.question_ids, self.verdict_ids = _question(params.sed, info, tokenizer)
        self.num_prompt = len(prompt_ids) + len(self.hidden_ids) + len(self.end_ids)
        self.num_prompt += params.num_latent_thoughts

    @property
    def room(self) -> int:
        """How many tokens can be generated before some sequence is as long as the context."""
        room = self.info.context_len - self.num_prompt
        if self.companion_ids:
            longest = self.info.context_len
            if self.params.cd_amateur is not None:
                longest = min(longest, self.info.amateur_context_len)
            room = min(room, longest - len(self.companion_ids))
        return room - len(self.question_ids)

    def num_blocks(self, max_tokens: int, width: int | None = None) -> int:
        """Blocks of the cache that all sequences need together, at the most.

        They share the blocks that their prompt fills.
        """
        width = self.params.num_sequences if width is None else width
        output = max_tokens + len(self.question_ids)
        needed = self._blocks(self.num_prompt, output, width)
        if self.companion_ids:
            companions = self._blocks(len(self.companion_ids), output, width)
            # An amateur's blocks are its own, as many as the model has.
            beside = self.params.cd_amateur is not None
            needed = max(needed, companions) if beside else needed + companions
        return needed

    def _blocks(self, num_prompt: int, num_output: int, width: int) -> int:
        shared = num_prompt // self.info.block_size
        return shared + width * (self.info.blocks_for(num_prompt + num_output) - shared)


def _companion_ids(
    prompt_ids: Sequence[int], params: SamplingParams, info: ModelInfo, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """The prompt of the sequences that run beside the request's own."""
    if params.cd_amateur is not None:
        if info.amateur != params.cd_amateur:
            there = "none; --amateur-model loads one" if info.amateur is None else info.amateur
            raise InvalidRequest(
                f"cd_amateur is {params.cd_amateur!r}, but the amateur of this server is {there}",
                "cd_amateur",
            )
        return tuple(prompt_ids)
    if params.guidance_scale != 1.0:
        given, param = params.negative_prompt, "negative_prompt"
        if given is None:
            return tuple(prompt_ids[-1:])
    elif params.kl_bandwidth > 0.0:
        given, param = params.kl_reference_prompt, "kl_reference_prompt"
    else:
        return ()
    if isinstance(given, str):
        ids = encode(given, param, info, tokenizer, special=True)
    else:
        ids = given or []
        check_ids(ids, info, param)
    if not ids:
        raise InvalidRequest(f"{param} must not be empty", param)
    return tuple(ids)


def _check_length(parts: _Parts, prompt_param: str, default: int | None, clamp: bool) -> None:
    """Do the prompt and what is asked for fit into the context? Raises InvalidRequest."""
    room, context_len = parts.room, parts.info.context_len
    prompt_len = context_len - room
    asked = parts.params.max_tokens
    full = room < 0 or (room == 0 and asked != 0)
    if full or (asked is not None and asked > room and not clamp):
        completion = asked if asked is not None else (default or 1)
        raise too_long(context_len, prompt_len, completion, prompt_param)


def too_long(context_len: int, prompt_len: int, completion: int, param: str) -> InvalidRequest:
    """What is told where a prompt and what is to follow it exceed the context."""
    return InvalidRequest(
        f"This model's maximum context length is {context_len} tokens. However, you requested "
        f"{prompt_len + completion} tokens ({prompt_len} in the prompt, {completion} in the "
        "completion). Please reduce the length of the prompt or the completion.",
        param,
        "context_length_exceeded",
    )


def _max_tokens(parts: _Parts, prompt_param: str, default: int | None) -> int:
    """The number of tokens to generate, none beyond the context.

    Raises InvalidRequest if so many do not fit into the cache.
    """
    params, info, room = parts.params, parts.info, parts.room
    asked = params.max_tokens
    # The most that would fit, -1 if not even the prompt does.
    most = bisect_right(range(room + 1), info.num_blocks, key=parts.num_blocks) - 1
    wanted = min(room, default if asked is None and default is not None else room)
    max_tokens = min(wanted if asked is None else asked, room)
    if asked is None and max_tokens > most > 0:
        return most
    if max_tokens > most:
        width = params.num_sequences
        alone = parts.num_blocks(max_tokens, width=1) <= info.num_blocks
        param = params.width_field if alone else "max_tokens" if most > 0 else prompt_param
        raise InvalidRequest(
            f"{param} asks for too much memory: {width} x {max_tokens} tokens behind a prompt of "
            f"{info.context_len - room} need {parts.num_blocks(max_tokens)} blocks of the cache, "
            f"which has {info.num_blocks}",
            param,
        )
    return max_tokens


def _check_width(params: SamplingParams, info: ModelInfo, rows: int) -> None:
    """Can all sequences be computed in one step, with so many rows each? Raises InvalidRequest."""
    name, width = params.width_field, params.num_sequences
    if params.method is Method.BEAM and params.beams > info.max_beam_width:
        raise InvalidRequest(
            f"{name} must be at most {info.max_beam_width}, the widest beam search of this "
            f"server, got {params.beams}",
            name,
        )
    most = max(min(info.num_lanes, info.batch_tokens // rows), 1)
    if width > most:
        each = f" of {rows} rows of logits each" if rows > 1 else ""
        raise InvalidRequest(
            f"{name} must be at most {most}, the number of sequences{each} this server computes "
            f"together, got {width}",
            name,
        )


def _check_memory(beam_memory: int, max_tokens: int) -> None:
    """Raises InvalidRequest."""
    most = max_waiting(max_tokens)
    if beam_memory > most:
        raise InvalidRequest(
            f"beam_memory must be at most {most}, so many hypotheses of up to {max_tokens} tokens "
            f"may wait, got {beam_memory}",
            "beam_memory",
        )


def _one_token(token: int | str, param: str, info: ModelInfo, tokenizer: Tokenizer) -> int:
    """The id of a token given by id or text. Raises InvalidRequest."""
    if isinstance(token, int):
        check_ids([token], info, param)
        return token
    ids = encode(token, param, info, tokenizer)
    if len(ids) != 1:
        raise InvalidRequest(
            f"{param} must be one token, {_shown(token)} is {len(ids)} of them", param
        )
    return ids[0]


def _special(text: str, info: ModelInfo, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special token with this text, if the model has one."""
    found = (i for i, own in tokenizer.special.items() if own == text and i < info.vocab_size)
    return tuple(found)[:1]


def _question(
    sed: SedParams, info: ModelInfo, tokenizer: Tokenizer
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is asked, up to where both verdicts part, and the two tokens that follow there.

    Raises InvalidRequest.
    """
    asked = encode(sed.eval_prompt, "sed.eval_prompt", info, tokenizer)
    verdicts = [encode(text, "sed.verdict_tokens", info, tokenizer) for text in sed.verdict_tokens]
    for right, wrong in zip(*verdicts, strict=False):
        if right != wrong:
            return tuple(asked), (right, wrong)
        asked.append(right)
    one, other = map(_shown, sed.verdict_tokens)
    raise InvalidRequest(
        "sed.verdict_tokens must be two texts of which neither begins with the other, got "
        f"{one} and {other}",
        "sed.verdict_tokens",
    )


def _clarify_token(params: SamplingParams, info: ModelInfo, tokenizer: Tokenizer) -> int | None:
    """The token that entropix puts in where the model is lost; by default " ..."."""
    if params.entropix is None:
        return None
    token = params.entropix.clarify_token
    if token is not None:
        return _one_token(token, "entropix.clarify_token", info, tokenizer)
    ids = tokenizer.encode(" ...", add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] < info.vocab_size else None


def _breaker_ids(
    params: SamplingParams, info: ModelInfo, tokenizer: Tokenizer
) -> tuple[tuple[int, ...], ...]:
    """The tokens of each sequence breaker that can occur."""
    if params.dry_multiplier <= 0.0:
        return ()
    breakers = tokenizer.encode_all(params.dry_sequence_breakers, add_special_tokens=False)
    return tuple(tuple(ids) for ids in breakers if _generable(ids, info))


def _bad_word_ids(
    words: list[str],
    info: ModelInfo,
    tokenizer: Tokenizer,
    ends: Collection[int],
    num_output: int,
) -> tuple[tuple[int, ...], ...]:
    """Each word's tokens, and those behind a space where they are other tokens.

    The spaced form counts only if it has as many tokens and begins with another one: then the
    space is part of its first token. What no output of so many tokens can hold is left out.
    """
    least = sum(map(tokenizer.least_tokens, words))
    if least > MAX_BAD_WORD_TOKENS:
        raise _too_many_bad_words(least)
    bare = tokenizer.encode_all(words, add_special_tokens=False)
    spaced = tokenizer.encode_all([" " + word.lstrip() for word in words], add_special_tokens=False)
    kept: list[tuple[int, ...]] = []
    for index, (own, behind) in enumerate(zip(bare, spaced, strict=True)):
        if not own or (len(own) == 1 and own[0] in ends):
            raise InvalidRequest(
                f"bad_words[{index}] is {_shown(words[index])}, which ends the text; to go on past "
                "the end use ignore_eos or min_tokens",
                f"bad_words[{index}]",
            )
        kept.append(tuple(own))
        if len(behind) == len(own) and behind[0] != own[0]:
            kept.append(tuple(behind))
    found = tuple(ids for ids in kept if len(ids) <= num_output and _generable(ids, info))
    if (total := sum(map(len, found))) > MAX_BAD_WORD_TOKENS:
        raise _too_many_bad_words(total)
    return found


def _too_many_bad_words(count: int) -> InvalidRequest:
    return InvalidRequest(
        f"bad_words must be at most {MAX_BAD_WORD_TOKENS} tokens together, got {count}", "bad_words"
    )


def _generable(ids: Sequence[int], info: ModelInfo) -> bool:
    """Does the model have all of these tokens?"""
    return all(token_id < info.vocab_size for token_id in ids)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
