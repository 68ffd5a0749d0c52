"""The records the scheduler keeps, and the tensors of a step.

`Sequence` and `Group` are mutable and have one writer, the scheduler, on the engine thread.

Letters in shapes, here and everywhere: T tokens of a step, S sequences of a step, R logits rows,
V vocabulary, L lanes, B blocks per sequence, C context length, H hidden size.
"""

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from engine.messages import FinishReason, Request, Token
from engine.numerics import integers

if TYPE_CHECKING:
    from engine.strategies.base import Strategy
    from engine.text import Ahead, Settled, TextStream


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
    ahead: "Ahead | None" = None  # where its pending tokens lead, as far as anybody has asked
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
    asleep: dict[Sequence, None] = field(default_factory=dict)  # not computed until they are woken
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

        Of several, the first computes the prompt for all.
        """
        if len(self.live) == 1 and self.live[0].companion is None:
            return self.live
        return with_companions(self.live[:1] if self.shares_prompt else self.live)

    @property
    def shares_prompt(self) -> bool:
        """Is there a prompt left to compute that several sequences will share?"""
        if len(self.live) == 1:
            return False
        first = self.live[0]
        if first.num_generated == 0:  # the others are copies of it
            return True
        return any(one.num_computed < one.prompt_len for one in with_companions([first]))

    @property
    def sequences(self) -> list[Sequence]:
        """All that may hold blocks: live ones, sleepers, and the companions of both."""
        return with_companions([*self.live, *self.asleep])

    def cost(self, length: int, start: int) -> int:
        """What `length` tokens of the prompt from `start` on cost, in tokens that nobody looks at.

        Each token that is scored is a row of logits too, and one that is traced several.
        """
        request, end = self.request, start + length
        scored = 0
        if request.prompt_logprobs is not None:
            scored = max(min(end, len(request.prompt_ids)) - start, 0)
        return length + scored + request.trace_rows * self._num_traced(start, end)

    def affordable(self, start: int, most: int, budget: int) -> int:
        """How many tokens from `start` on the budget allows: one at least, `most` at most."""
        if self.request.prompt_logprobs is None and not self.request.explained:
            return min(most, budget)
        return max(
            bisect_right(range(most + 1), budget, key=partial(self.cost, start=start)) - 1, 1
        )

    def _num_traced(self, start: int, end: int) -> int:
        """How many tokens in (start, end] are explained: each by what its predecessor predicts."""
        explained = self.request.explained
        return bisect_right(explained, end) - bisect_right(explained, start)


def with_companions(sequences: list[Sequence]) -> list[Sequence]:
    """These, and the companions they have."""
    return sequences + [one.companion for one in sequences if one.companion is not None]


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
    failed: list[tuple[Group, Exception]] = field(
        default_factory=list
    )  # that could not be admitted

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
