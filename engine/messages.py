"""The messages that cross between threads, and between processes.

They cannot be changed, and pickle. What every row of every step has is a tuple, which takes a third
of the time of a frozen dataclass to make. Nothing here needs torch: a process that only reads
requests does not load it.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar, overload

from engine.params import SamplingParams

Pair = TypeVar("Pair")

NO_VALID_TOKEN = -1  # instead of a token id: every token was banned
NOT_A_NUMBER = -2  # the model's row held a NaN


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


# -- messages to the engine


@dataclass(frozen=True, slots=True)
class TraceWish:
    """How much of a trace is wanted: so many tokens in its lists, and the lens on these layers."""

    top: int = 10
    layers: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """What tracing a token costs, in rows of logits.

        Its stages run again, and each layer has a row of its own.
        """
        return 4 + len(self.layers)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it; every default is resolved."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    logprobs: int | None = None  # candidates listed with each token; None: no logprobs at all
    prompt_logprobs: int | None = None
    trace: TraceWish | None = None
    explained: tuple[int, ...] = ()  # positions of the prompt whose tokens are traced, ascending
    forced_len: int = 0  # so many tokens at the prompt's end count as output
    hidden_ids: tuple[int, ...] = ()  # behind the prompt, seen by the model alone: pause tokens
    num_thoughts: int = 0  # latent ones, behind those
    end_ids: tuple[int, ...] = ()  # behind the thoughts, hidden too
    early_layers: tuple[int, ...] = ()  # to contrast the last one with
    companion_ids: tuple[int, ...] = ()  # the companion's prompt, where parameters need one
    question_ids: tuple[int, ...] = ()  # self-evaluation: what is asked behind a try
    verdict_ids: tuple[int, ...] = ()  # and the tokens for yes and no
    eos_token_ids: frozenset[int] = frozenset()
    stop_tokens: Mapping[int, int | str] = field(default_factory=dict)  # id -> its stop_reason
    stop_strings: tuple[str, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    dry_breaker_ids: tuple[tuple[int, ...], ...] = ()
    clarify_token: int | None = None
    skip_special_tokens: bool = True
    stream: bool = False  # deliver as text appears, not once at the end
    priority: int = 0  # lower is sooner
    cache_salt: str = ""  # only requests with the same salt share cached blocks
    arrival_s: float = 0.0  # time.monotonic() when it came in
    ends: frozenset[int] = field(init=False)  # the tokens that end a sequence
    possible_ends: frozenset[int] = field(init=False)  # the same, whether or not eos is ignored

    def __post_init__(self) -> None:
        # Asked for every token, and there may be as many as the vocabulary has.
        possible = self.eos_token_ids | self.stop_tokens.keys()
        ends = frozenset(self.stop_tokens) if self.params.ignore_eos else possible
        object.__setattr__(self, "possible_ends", possible)
        object.__setattr__(self, "ends", ends)

    @property
    def trace_rows(self) -> int:
        """What tracing a token costs, in rows of logits."""
        return 0 if self.trace is None else self.trace.num_rows

    @property
    def probes(self) -> bool:
        """Does it want to look into the model?"""
        return self.params.reads_layers or bool(self.trace and self.trace.layers)

    @property
    def looks_beside(self) -> bool:
        """Do its rows see anything besides their own logits?"""
        return bool(self.companion_ids or self.early_layers or self.params.reads_attention)

    @property
    def num_prompt(self) -> int:
        """Tokens before the first that is generated, hidden ones included."""
        return len(self.prompt_ids) + len(self.hidden_ids) + self.num_thoughts + len(self.end_ids)


# -- messages from the engine


class Probability(NamedTuple):
    """A token and its probability."""

    token_id: int
    prob: float


class Listed(Seq[Pair]):
    """Tokens and a number each, likeliest first, in a twentieth of the memory of their tuples.

    There may be millions of them in the answers that wait to be sent.
    """

    __slots__ = ("_ids", "_make", "_values")

    def __init__(self, make: Callable[[int, float], Pair], ids: bytes, values: bytes) -> None:
        """`ids` are int32; `values` float32, or float64 if there are twice as many bytes."""
        self._make = make
        self._ids = array("i", ids)
        self._values = array("d" if len(values) > len(ids) else "f", values)

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Pair]:
        return map(self._make, self._ids, self._values)

    @overload
    def __getitem__(self, place: int) -> Pair: ...
    @overload
    def __getitem__(self, place: slice) -> "Listed[Pair]": ...
    def __getitem__(self, place: int | slice) -> "Pair | Listed[Pair]":
        if isinstance(place, slice):
            some = self._ids[place].tobytes(), self._values[place].tobytes()
            return Listed(self._make, *some)
        return self._make(self._ids[place], self._values[place])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seq) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


def pair(token_id: int, value: float) -> tuple[int, float]:
    """What most lists are of."""
    return token_id, value


@dataclass(frozen=True, slots=True)
class StageTrace:
    """What a stage that acted left: how many tokens, without how much of the mass before it."""

    stage: str
    candidates: int
    removed: float


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """What a layer alone would say next, likeliest first. Layer 0 is the embedding."""

    layer: int
    top: Seq[Probability]


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """A row's way through the pipeline. Entropy is in nats, both lists are likeliest first."""

    entropy: float  # of the model's own distribution
    varentropy: float
    temperature: float  # all that the logits were divided by; 0: the likeliest token was taken
    stages: tuple[StageTrace, ...]
    before: Seq[Probability]
    after: Seq[Probability]
    rank: int  # the chosen token's place in the model's own distribution, from 1
    prob_before: float
    prob_after: float
    uniform: float | None
    layers: tuple[LayerTrace, ...] = ()


class Token(NamedTuple):
    """A generated or prompt token as the client sees it."""

    id: int
    text: str  # what it adds to the text; a special token's own string
    logprob: float | None = None
    top: Seq[tuple[int, float]] = ()  # the likeliest (token id, logprob), best first
    rank: int | None = None  # 1 for the likeliest; filled for prompt tokens
    trace: TokenTrace | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could come next, and its logprob after penalties and bans, at temperature 1."""

    token: Token
    logprob: float
    perturbed: float = 0.0  # the logprob with Gumbel noise, where a strategy wants that


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one choice of one request."""

    request_id: str
    index: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    prompt: tuple[Token, ...] = ()  # the first delta of a choice, if prompt logprobs were asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    explained: tuple[tuple[int, Token], ...] = ()  # with their positions; whole, at the end
    report: Mapping[str, Any] = field(default_factory=dict)  # of the strategy; at the end


@dataclass(frozen=True, slots=True)
class Finished:
    """The last message about a request that succeeded. Times are of `time.monotonic()`."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int  # of all choices, and of those best_of left out
    longest_tokens: int  # of the longest of these
    finish_reasons: tuple[FinishReason, ...]
    arrival_s: float
    scheduled_s: float
    first_token_s: float
    finished_s: float
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The last message about a request that did not succeed."""

    request_id: str
    error: Exception


@dataclass(frozen=True, slots=True)
class StepStats:
    """The engine's state after a step, and what the step did."""

    num_running: int = 0  # sequences
    num_waiting: int = 0  # sequences
    kv_usage: float = 0.0  # referenced blocks over all blocks
    num_tokens: int = 0  # computed in this step
    cache_queries: int = 0  # prompt tokens looked up in the prefix cache, and found
    cache_hits: int = 0
    num_preemptions: int = 0
    token_gaps_s: tuple[float, ...] = ()  # since each sequence's token before this step's
