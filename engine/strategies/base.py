"""What a decoding strategy is: it answers each step with branches."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload

from torch import Tensor

from engine.messages import Candidate, Token
from engine.types import Sequence


@dataclass(frozen=True, slots=True)
class Wants:
    """What a strategy needs to see of each row besides the token chosen for it."""

    top: int = 0  # that many of the likeliest tokens, after penalties and bans
    going: int = 0  # and that many of the likeliest that do not end the sequence, if others do
    perturbed: bool = False  # the likeliest after Gumbel noise has been added, instead
    hidden: bool = False  # the newest token's final hidden state
    logits: bool = False  # the whole rows, before and after penalties and bans
    coverage: bool = False  # how its attention is spread over the prompt


class Ranked(Seq[Candidate]):
    """The likeliest tokens of a row, best first.

    A candidate is made when somebody asks for it: of many beams' candidates few are ever chosen.
    """

    def __init__(
        self,
        ids: list[int],
        scores: list[float],
        perturbed: list[float],
        token: Callable[[int], Token],
    ) -> None:
        """`token` makes the token at a place in these lists."""
        self.ids = ids
        self.scores = scores  # logprobs
        self.perturbed = perturbed
        self.token = token

    def with_tokens(self, token: Callable[[int], Token]) -> "Ranked":
        """The same, made in another way."""
        return Ranked(self.ids, self.scores, self.perturbed, token)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, place: int) -> Candidate: ...
    @overload
    def __getitem__(self, place: slice) -> list[Candidate]: ...
    def __getitem__(self, place: int | slice) -> Candidate | list[Candidate]:
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        place = range(len(self))[place]  # Raises IndexError, which ends an iteration
        return Candidate(self.token(place), self.scores[place], self.perturbed[place])


class View(NamedTuple):
    """What a strategy sees of a step; entry i belongs to live sequence i.

    Where it wants them: `raw` and `logits` [m, V], the model's own and those after penalties and
    bans; hidden [m, H]; a coverage [prompt length], which sums to 1.
    """

    tokens: list[Token]  # what the sampler chose, with its logprobs
    top: Seq[Ranked] = ()
    raw: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None
    coverage: Seq[Tensor] = ()
    # Would this token be the last of the sequence?
    ends: Callable[[Sequence, Token], bool] = lambda _sequence, _token: False


class Branch(NamedTuple):
    """A parent and the tokens to append to it.

    A parent with one branch continues, with several it is forked, with none it is dropped. The
    tokens of a draft are pending: nobody hears of them and nothing ends by them until a later
    branch settles them. A branch that sleeps is not computed until a later branch of it does not;
    one that is asleep already and has no branch sleeps on, until one drops it or the group ends.
    """

    parent: Sequence
    tokens: tuple[Token, ...] = ()
    score: float | None = None
    memory: Any = None  # None: what the parent has
    draft: bool = False
    settle: bool = True  # do the parent's pending tokens count from now on?
    asleep: bool = False
    dropped: bool = False
    seed: int | None = None  # for draws of its own


class Strategy(Protocol):
    """Decides which sequences a group has.

    It sees its arguments and its own fields, never blocks or lanes.
    """

    width: int  # lanes reserved at admission: the most live sequences at any time
    copies: int  # of the prompt, to begin with
    streams: bool  # may text leave before the whole group is done?
    settles: bool  # if not: may what all its sequences begin with?
    wants: Wants

    def advance(self, live: list[Sequence], view: View) -> list[Branch]:
        """The branches that go on, from the sequences whose last token was just computed."""
        ...

    def rank(self, finished: list[Sequence]) -> list[Sequence]:
        """The choices to return, in the order of their index."""
        ...

    def remember(self, start: int, hidden: Tensor) -> None:
        """See the final hidden states [T, H] of the prompt's tokens from `start` on.

        Called only if it wants hidden states, and again for some after a preemption.
        """
        ...


class Plain:
    """What most strategies have in common: one copy of the prompt, and nothing leaves early."""

    copies = 1
    streams = False
    settles = False
    wants = Wants()

    def remember(self, start: int, hidden: Tensor) -> None:
        """Not called: nothing is wanted."""
