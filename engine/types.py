"""The messages that cross between threads, and the two records the scheduler keeps.

Messages cannot be changed, and pickle. What every row of every step has is a tuple, which takes a
third of the time of a frozen dataclass to make. `Sequence` and `Group` are mutable and have one
writer, the scheduler, on the engine thread.

Letters in shapes, here and everywhere: T tokens of a step, S sequences of a step, R logits rows,
V vocabulary, L lanes, B blocks per sequence, C context length, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from engine.numerics import integers
from engine.params import SamplingParams

if TYPE_CHECKING:
    from engine.strategies.base import Strategy
    from engine.text import Settled, TextStream


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

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a sequence."""
        eos = frozenset() if self.params.ignore_eos else self.eos_token_ids
        return eos | self.stop_tokens.keys()


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


class Token(NamedTuple):
    """A generated or prompt token as the client sees it."""

    id: int
    text: str  # what it adds to the text; a special token's own string
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest (token id, logprob), best first
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


# -- the scheduler's records


@dataclass(slots=True, eq=False)
class Sequence:
    """A list of token ids and how many of them have keys and values in the cache.

    A companion is one that gets the same output tokens after another prompt, or in another model,
    and only lends its logits. Pending tokens are in `token_ids`, but nobody has been told of them.
    The prompt's last `num_hidden` tokens are for the model alone: lanes and stages do not know of
    them.
    """

    index: int
    seed: int
    token_ids: list[int]
    prompt_len: int
    stream: "TextStream"
    num_hidden: int = 0
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    lane: int = -1
    state: list[float] = field(default_factory=list)  # of stages, while there is no lane
    model: int = 0  # which of the engine's models computes it
    companion: "Sequence | None" = None
    pending: list[Token] = field(default_factory=list)
    score: float = 0.0  # what its strategy makes of it
    scores: list[float] = field(default_factory=list)  # one for each branch that led here
    memory: Any = None  # what its strategy keeps with it
    thoughts: dict[int, Tensor] = field(default_factory=dict)  # by position: input embeddings [H]
    report: dict[str, Any] = field(default_factory=dict)  # what its strategy tells the client
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
    def history(self) -> list[int]:
        """Its tokens without the hidden ones."""
        return self.token_ids[: self.prompt_len - self.num_hidden] + self.output

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def position(self) -> int:
        """Of the last token in `history`."""
        return len(self.token_ids) - self.num_hidden - 1

    @property
    def tokens(self) -> list[Token]:
        """The output so far, as far as it has not left."""
        return self.stream.tokens

    @property
    def mean_logprob(self) -> float:
        return self.cumulative_logprob / max(self.num_generated, 1)


@dataclass(slots=True, eq=False)
class Group:
    """A request and its sequences."""

    request: Request
    strategy: "Strategy"
    live: list[Sequence]
    asleep: list[Sequence] = field(default_factory=list)  # not computed until they are woken
    finished: list[Sequence] = field(default_factory=list)
    settled: "Settled | None" = None
    prompt: list[Token] = field(default_factory=list)
    explained: dict[int, Token] = field(default_factory=dict)  # by position
    cached_tokens: int = 0
    num_preemptions: int = 0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    # What the request says, asked in every step.
    probes: bool = field(init=False)
    looks_beside: bool = field(init=False)

    def __post_init__(self) -> None:
        self.probes = self.request.probes
        self.looks_beside = self.request.looks_beside

    @property
    def thinks(self) -> bool:
        """Are there thoughts left to think, before the first token?"""
        return len(self.live[0].thoughts) < self.request.num_thoughts

    @property
    def reads_prompt(self) -> bool:
        """Does it look at the hidden states of its prompt, beside those of the last token?"""
        request = self.request
        return (
            request.prompt_logprobs is not None
            or bool(request.explained)
            or self.strategy.wants.hidden
        )

    @property
    def to_compute(self) -> list[Sequence]:
        """The live sequences to run, and their companions.

        Copies of the bare prompt are computed once, by the first.
        """
        if len(self.live) == 1 and self.live[0].companion is None:
            return self.live
        copies = len(self.live) > 1 and all(seq.num_generated == 0 for seq in self.live)
        running = self.live[:1] if copies else self.live
        companions = [seq.companion for seq in running if seq.companion is not None]
        return [*running, *companions]

    @property
    def sequences(self) -> list[Sequence]:
        """All that may hold blocks: live ones, sleepers, and the companions of both."""
        own = [*self.live, *self.asleep]
        return own + [seq.companion for seq in own if seq.companion is not None]


class Chunk(NamedTuple):
    """Tokens [start, start + length) of a sequence, to be computed this step."""

    group: Group
    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The first tokens of a shared block, for one of those who share it to write behind them."""

    model: int
    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step computes. The copies come before the forward pass."""

    chunks: list[Chunk]
    copies: list[BlockCopy]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def groups(self) -> list[Group]:
        """Whose tokens these are, each once."""
        return list({id(chunk.group): chunk.group for chunk in self.chunks}.values())


# -- tensors of a step


@dataclass(frozen=True, slots=True)
class Signals:
    """What some filters want to know of the rows besides their logits.

    entropy and varentropy [R, 1] are of the model's own distribution, in bits; divergence [R, 1] is
    that distribution's from its companion's, in nats. attention [R, 4] is of the last layer's
    newest query: see `engine.probing`. Rows that want none hold zeros.
    """

    entropy: Tensor
    varentropy: Tensor
    attention: Tensor
    divergence: Tensor

    def select(self, index: Tensor) -> "Signals":
        return Signals(
            self.entropy[index],
            self.varentropy[index],
            self.attention[index],
            self.divergence[index],
        )


@dataclass(frozen=True, slots=True)
class Beside:
    """What the engine knows of some rows besides their logits.

    attention [R, 4] is of the last layer's newest query (see `engine.probing`). companions [c, V]
    are other logits, and `companion_of` [R] int64 says whose, -1 for none; so are early [e, M, V],
    the logits of earlier layers, and `early_of`, of which the first `early_count` [e] count.
    """

    attention: Tensor | None = None
    companions: Tensor | None = None
    companion_of: Tensor | None = None
    early: Tensor | None = None
    early_of: Tensor | None = None
    early_count: Tensor | None = None

    def broken(self) -> Tensor | bool:
        """Which rows have logits beside them that hold a NaN, [R]."""
        found: Tensor | bool = False
        for values, of in ((self.companions, self.companion_of), (self.early, self.early_of)):
            if values is not None and of is not None:
                found = found | ((of >= 0) & values.flatten(1).isnan().any(1)[of])
        return found

    def select(self, index: Tensor) -> "Beside":
        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index]

        return replace(
            self,
            attention=some(self.attention),
            companion_of=some(self.companion_of),
            early_of=some(self.early_of),
        )


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
    beside: Beside | None = None

    @classmethod
    def build(cls, lanes: list[int], positions: list[int], device: str) -> "Rows":
        its_lanes, its_positions = integers([lanes, positions], device).unbind()
        max_len = max(positions, default=-1) + 1
        return cls(lanes, positions, max_len, its_lanes, its_positions)

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
            None if self.beside is None else self.beside.select(index),
        )


def companions_of(rows: Rows, wanted: list[int]) -> Tensor:
    """The logits of the companions that some rows have, [w, V]."""
    beside = rows.beside
    assert beside is not None
    assert beside.companions is not None
    assert beside.companion_of is not None
    return beside.companions[beside.companion_of[wanted]]
