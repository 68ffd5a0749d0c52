"""The messages that cross between threads, and the two records the scheduler keeps.

Messages are frozen and pickle. `Sequence` and `Group` are mutable and have one writer, the
scheduler, on the engine thread.

Letters in shapes, here and everywhere: T tokens of a step, S sequences of a step, R logits rows,
V vocabulary, L lanes, B blocks per sequence, C context length, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.params import SamplingParams

if TYPE_CHECKING:
    from engine.strategies.base import Strategy
    from engine.text import TextStream


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

    @property
    def probes(self) -> bool:
        """Does it want to look into the model?"""
        return self.params.reads_attention or bool(self.trace and self.trace.layers)


# -- messages from the engine


@dataclass(frozen=True, slots=True)
class Probability:
    """A token and its probability."""

    token_id: int
    prob: float


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
    top: tuple[Probability, ...]


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """A row's way through the pipeline. Entropy is in nats, both lists are likeliest first."""

    entropy: float  # of the model's own distribution
    varentropy: float
    temperature: float  # all that the logits were divided by; 0: the likeliest token was taken
    stages: tuple[StageTrace, ...]
    before: tuple[Probability, ...]
    after: tuple[Probability, ...]
    rank: int  # the chosen token's place in the model's own distribution, from 1
    prob_before: float
    prob_after: float
    uniform: float | None
    layers: tuple[LayerTrace, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """A generated or prompt token as the client sees it."""

    id: int
    text: str  # what it adds to the text; a special token's own string
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest (token id, logprob), best first
    rank: int | None = None  # 1 for the likeliest; filled for prompt tokens
    trace: TokenTrace | None = None


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


@dataclass(frozen=True, slots=True)
class Finished:
    """The last message about a request that succeeded. Times are of `time.monotonic()`."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int  # of all sequences, also those best_of left out
    longest_tokens: int  # of the longest sequence
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


# -- the scheduler's records


@dataclass(slots=True, eq=False)
class Sequence:
    """A list of token ids and how many of them have keys and values in the cache."""

    index: int
    seed: int
    token_ids: list[int]
    prompt_len: int
    stream: "TextStream"
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    lane: int = -1
    state: list[float] = field(default_factory=list)  # of stages, while there is no lane
    cumulative_logprob: float = 0.0
    last_token_s: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def mean_logprob(self) -> float:
        return self.cumulative_logprob / max(self.num_generated, 1)


@dataclass(slots=True, eq=False)
class Group:
    """A request and its sequences."""

    request: Request
    strategy: "Strategy"
    live: list[Sequence]
    finished: list[Sequence] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    explained: dict[int, Token] = field(default_factory=dict)  # by position
    cached_tokens: int = 0
    num_preemptions: int = 0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def to_compute(self) -> list[Sequence]:
        """The live sequences to run: copies of the bare prompt are computed once, by the first."""
        if len(self.live) > 1 and all(seq.num_generated == 0 for seq in self.live):
            return self.live[:1]
        return self.live


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a sequence, to be computed this step."""

    group: Group
    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step computes. `copies` are (from, to) block ids, done before the forward pass."""

    chunks: list[Chunk]
    copies: list[tuple[int, int]]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


# -- tensors of a step


@dataclass(frozen=True, slots=True)
class Signals:
    """What some filters want to know of the rows besides their logits.

    entropy and varentropy [R, 1] are of the model's own distribution, in bits. attention [R, 4] is
    of the last layer's newest query: see `engine.core`. Rows that want none hold zeros.
    """

    entropy: Tensor
    varentropy: Tensor
    attention: Tensor

    def select(self, index: Tensor) -> "Signals":
        return Signals(self.entropy[index], self.varentropy[index], self.attention[index])


@dataclass(frozen=True, slots=True)
class Rows:
    """The logits rows of a step: the lane that wants each, and how far its sequence has come.

    A row's position is the index of the last token already in its sequence: the draw of output t
    after a prompt of length n has position n + t - 1.
    """

    host_lanes: list[int]
    host_positions: list[int]
    max_len: int  # of the longest sequence
    lanes: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    signals: Signals | None = None

    @classmethod
    def build(cls, lanes: list[int], positions: list[int], device: str) -> "Rows":
        both = torch.tensor([lanes, positions], dtype=torch.int64, device=device)
        return cls(lanes, positions, max(positions, default=-1) + 1, both[0], both[1])

    def __len__(self) -> int:
        return len(self.host_lanes)

    def select(self, subset: list[int], index: Tensor) -> "Rows":
        """Only the given rows; `index` is `subset` on the device."""
        return Rows(
            [self.host_lanes[row] for row in subset],
            [self.host_positions[row] for row in subset],
            self.max_len,
            self.lanes[index],
            self.positions[index],
            None if self.signals is None else self.signals.select(index),
        )
