"""The engine's deltas in the words of the API: the same code for streams and whole answers."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

from engine.messages import Delta, Finished, Probability, Request, Token, TokenTrace
from engine.prepare import ModelInfo
from engine.text import Detokenizer
from engine.tokenizer import Tokenizer
from server import __version__
from server.schemas import (
    ChatChoice,
    ChatCompletionRequest,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    GenerationRequest,
    TokenLogprob,
    TokenTraceBody,
    TopLogprob,
    TracedLayer,
    TracedToken,
    Usage,
)
from server.whole import Each

_LOWEST = -9999.0  # JSON has no -infinity
_SHORT = 32  # tokens of a delta that are formatted in one go,
_FEW = 1024  # if no more than so many others are listed with them


@dataclass(slots=True)
class Tally:
    """What a request has used so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, finished: Finished) -> None:
        self.prompt_tokens += finished.prompt_tokens
        self.cached_tokens += finished.cached_tokens
        self.completion_tokens += finished.completion_tokens

    def usage(self) -> Usage:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Envelope:
    """The fields that all chunks of an answer share."""

    id: str
    model: str
    fingerprint: str
    object: str
    created: int = field(default_factory=lambda: int(time.time()))
    first: dict[str, Any] = field(default_factory=dict)  # only in the first chunk

    def around(self, choices: list[Any] | Each, **more: Any) -> dict[str, Any]:
        """A chunk, or the whole answer."""
        more, self.first = more | self.first, {}
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


def merge(deltas: Sequence[Delta]) -> Delta:
    """All deltas of one choice as one."""
    first, last = deltas[0], deltas[-1]
    return replace(
        first,
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        report=last.report,
    )


class Choices:
    """Numbers and formats the choices of all prompts of one request."""

    def __init__(
        self, body: GenerationRequest, requests: Sequence[Request], tokenizer: Tokenizer
    ) -> None:
        self.body = body
        self.tokenizer = tokenizer
        self.requests = {request.request_id: i for i, request in enumerate(requests)}
        self.prompts = [request.prompt_ids for request in requests]
        self.num_choices = len(requests) * body.n
        self._started: set[int] = set()
        self._echoed: tuple[Sequence[int], list[str]] | None = None

    def index(self, delta: Delta) -> int:
        """Where a delta's choice stands among those of all prompts."""
        return self.requests[delta.request_id] * self.body.n + delta.index

    def prompt_of(self, delta: Delta) -> Sequence[int]:
        """The prompt that a delta's choice continues."""
        return self.prompts[self.requests[delta.request_id]]

    def starts(self, index: int) -> bool:
        """Is this the first time that this choice is formatted?"""
        first = index not in self._started
        self._started.add(index)
        return first

    def shown(self, token: Token) -> str:
        if self.body.return_tokens_as_token_ids:
            return f"token_id:{token.id}"
        return token.text

    def name(self, token_id: int) -> str:
        if self.body.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        return self.tokenizer.text_of(token_id)

    def traces(self, tokens: Sequence[Token]) -> Any:
        """Each token's trace."""
        return each(
            tokens,
            lambda: (trace_body(t, t.trace, self.tokenizer) for t in tokens if t.trace is not None),
        )

    def prompt_texts(self, delta: Delta) -> list[str]:
        """What each prompt token adds to the echoed text. All choices of a prompt share it."""
        prompt_ids = self.prompt_of(delta)
        if self._echoed is None or self._echoed[0] is not prompt_ids:
            detokenizer = Detokenizer(self.tokenizer, self.body.skip_special_tokens)
            self._echoed = prompt_ids, [detokenizer.feed(token_id) for token_id in prompt_ids]
        return self._echoed[1]

    def prompt_logprobs(self, tokens: Sequence[Token]) -> Any:
        """vLLM's form: for each prompt token, by token id, the likeliest tokens and itself."""
        return each(tokens, lambda: map(self._prompt_entry, tokens))

    def _prompt_entry(self, token: Token) -> dict[str, Any] | None:
        if token.logprob is None:
            return None
        top = token.top[: self.body.prompt_logprobs]
        ranked = [(i, value, rank) for rank, (i, value) in enumerate(top, start=1)]
        if token.id not in dict(top):
            ranked.append((token.id, token.logprob, token.rank or 0))
        return {
            str(token_id): {
                "logprob": finite(value),
                "rank": rank,
                "decoded_token": self.tokenizer.text_of(token_id),
            }
            for token_id, value, rank in ranked
        }


class CompletionChoices(Choices):
    """Choices of /v1/completions."""

    body: CompletionRequest

    def __init__(
        self, body: CompletionRequest, requests: Sequence[Request], tokenizer: Tokenizer
    ) -> None:
        super().__init__(body, requests, tokenizer)
        self._offsets: dict[int, int] = {}

    def format_chunk(self, delta: Delta) -> list[CompletionChoice]:
        """What is new of a choice, if anything can be seen of it."""
        choice = self.format(delta)
        tokens = choice["logprobs"] or choice.get("token_ids") or choice.get("trace")
        news = choice["text"] or choice["finish_reason"] or (tokens and delta.tokens)
        return [choice] if news else []

    def format(self, delta: Delta) -> CompletionChoice:
        """A choice, or what is new of it."""
        index = self.index(delta)
        starts = self.starts(index)
        text, tokens = delta.text, list(delta.tokens)
        if starts and self.body.echo:
            pieces = self.prompt_texts(delta)
            text = "".join(pieces) + text
            if self.body.logprobs is not None:
                echoed = zip(delta.prompt, pieces, strict=True)
                tokens = [token._replace(text=self._own(token, piece)) for token, piece in echoed]
                tokens += delta.tokens
            else:
                self._offsets[index] = len(text)
        choice: CompletionChoice = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
        }
        if self.body.logprobs is not None:
            choice["logprobs"] = self._logprobs(index, tokens)
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = [token.id for token in delta.tokens]
            if starts:
                choice["prompt_token_ids"] = list(self.prompt_of(delta))
        if starts and self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self.prompt_logprobs(delta.prompt)
        if self.body.trace is not None:
            choice["trace"] = self.traces(delta.tokens)
        # The engine knows no TypedDicts; which keys a strategy reports is in the choice's schema.
        choice.update(delta.report)  # type: ignore[typeddict-item]
        return choice

    def _own(self, token: Token, piece: str) -> str:
        """A special token shows its own string, also where the text leaves it out."""
        return self.tokenizer.special.get(token.id, piece)

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> CompletionLogprobs:
        widths = [self._width(token) for token in tokens]
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(widths)
        all_of = partial(each, tokens)
        return {
            "tokens": all_of(lambda: map(self.shown, tokens)),
            "token_logprobs": all_of(lambda: map(_logprob, tokens)),
            "top_logprobs": all_of(lambda: map(self._top, tokens)),
            "text_offset": list(accumulate(widths[:-1], initial=offset)) if widths else [],
        }

    def _width(self, token: Token) -> int:
        """How many characters of the text are a token's."""
        hidden = self.body.skip_special_tokens and token.id in self.tokenizer.special
        return 0 if hidden else len(token.text)

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens and the reported one, best first; equal strings keep the larger."""
        if token.logprob is None:
            return None
        listed = (self.body.logprobs or 0) if (self.body.logprobs or 0) >= 0 else len(token.top)
        ranked = [(self.name(i), value) for i, value in token.top[:listed] if i != token.id]
        ranked.append((self.shown(token), token.logprob))
        top: dict[str, float] = {}
        for name, value in sorted(ranked, key=lambda pair: -pair[1]):
            top.setdefault(name, finite(value))
        return top


class ChatChoices(Choices):
    """Choices of /v1/chat/completions."""

    body: ChatCompletionRequest

    def format(self, delta: Delta) -> ChatChoice:
        """A whole choice."""
        choice = self._around(delta)
        choice["message"] = {"role": "assistant", "content": delta.text, "refusal": None}
        return choice

    def format_chunk(self, delta: Delta) -> list[ChatChoice]:
        """What is new of a choice: at its start the role, then text, at its end the reason."""
        chunks: list[ChatChoice] = []
        index = self.index(delta)
        if self.starts(index):
            role: ChatChoice = {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            chunks.append(role)
        listed = self.body.logprobs or self.body.return_token_ids or self.body.trace
        if delta.text or (delta.tokens and listed):
            text = self._around(replace(delta, finish_reason=None))
            text["delta"] = {"content": delta.text}
            chunks.append(text)
        if delta.finish_reason is not None:
            end = self._around(replace(delta, tokens=()))
            end["delta"] = {}
            end["logprobs"] = None
            chunks.append(end)
        return chunks

    def _around(self, delta: Delta) -> ChatChoice:
        choice: ChatChoice = {
            "index": self.index(delta),
            "logprobs": self._logprobs(delta.tokens) if self.body.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = [token.id for token in delta.tokens]
        if self.body.trace is not None:
            choice["trace"] = self.traces(delta.tokens)
        if delta.finish_reason is not None:  # what ends has two chunks, of which the last tells
            choice.update(delta.report)  # type: ignore[typeddict-item]
        return choice

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs:
        return {"content": each(tokens, lambda: map(self._listed, tokens)), "refusal": None}

    def _listed(self, token: Token) -> TokenLogprob:
        top = token.top[: self.body.top_logprobs]
        own = self._entry(token.id, token.logprob or 0.0)
        return {**own, "top_logprobs": [self._entry(token_id, value) for token_id, value in top]}

    def _entry(self, token_id: int, logprob: float) -> TopLogprob:
        special = token_id in self.tokenizer.special
        return {
            "token": self.name(token_id),
            "logprob": finite(logprob),
            "bytes": None if special else list(self.tokenizer.bytes_of(token_id)),
        }


def is_long(*lists: Sequence[Token]) -> bool:
    """Is there so much to be told of these tokens that it is written a little at a time?"""
    if sum(map(len, lists)) > _SHORT:
        return True
    return sum(_num_listed(token) for tokens in lists for token in tokens) > _FEW


def each(tokens: Sequence[Token], entries: Callable[[], Iterable[Any]]) -> Any:
    """What is made of some tokens: a list, or entries that are made as they are written."""
    return Each(entries) if is_long(tokens) else list(entries())


def _num_listed(token: Token) -> int:
    trace = token.trace
    if trace is None:
        return len(token.top)
    tops = (trace.before, trace.after, *(layer.top for layer in trace.layers))
    return len(token.top) + sum(map(len, tops))


def _logprob(token: Token) -> float | None:
    return None if token.logprob is None else finite(token.logprob)


def trace_body(token: Token, trace: TokenTrace, tokenizer: Tokenizer) -> TokenTraceBody:
    """A token's trace in the API's words."""

    def named(top: Sequence[Probability]) -> list[TracedToken]:
        return [
            {"token_id": one.token_id, "token": tokenizer.text_of(one.token_id), "prob": one.prob}
            for one in top
        ]

    def layers() -> Iterator[TracedLayer]:
        return ({"layer": one.layer, "top": named(one.top)} for one in trace.layers)

    body: TokenTraceBody = {
        "token_id": token.id,
        "token": tokenizer.text_of(token.id),
        "rank": trace.rank,
        "prob_before": trace.prob_before,
        "prob_after": trace.prob_after,
        "entropy": trace.entropy,
        "varentropy": trace.varentropy,
        "temperature": trace.temperature,
        "uniform": trace.uniform,
        "stages": [
            {"stage": s.stage, "candidates": s.candidates, "removed": s.removed}
            for s in trace.stages
        ],
        "top_before": named(trace.before),
        "top_after": named(trace.after),
    }
    if trace.layers:
        body["layers"] = each([token], layers)
    return body


def finite(value: float) -> float:
    """A logprob that JSON can hold."""
    return max(value, _LOWEST)


def fingerprint(model: str, info: ModelInfo) -> str:
    """Changes with everything that can change the output."""
    identity = f"{__version__}|{model}|{info.identity}"
    return "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:10]
