"""What a stage of the logits pipeline is."""

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from engine.lanes import Lanes
from engine.messages import Request
from engine.types import Rows

if TYPE_CHECKING:
    from engine.logits.candidates import Candidates


class Stage:
    """One method, applied over the whole batch with each row's own parameters.

    A stage keeps its parameters in columns of `lanes`. What it needs of the past it reads from the
    token history, or keeps beside it and finds again after a preemption, so forks and preemption
    need no bookkeeping here. It is a `Transform` or a `Filter`.
    """

    fields: ClassVar[tuple[str, ...]]  # the SamplingParams fields it reads

    def __init__(self, lanes: Lanes) -> None:
        """Take the columns this stage needs."""
        raise NotImplementedError

    def admit(self, lane: int, request: Request) -> bool:
        """Write *all* values of a lane, which was someone else's before.

        Returns whether the stage will ever change this request's rows; it is run for them only
        if so.
        """
        raise NotImplementedError


class Transform(Stage):
    """Changes logits: biases, penalties, bans. Runs for greedy rows too."""

    soft_ban: ClassVar[bool] = False  # lifted where it would leave a row without any token

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        """Transform logits [R, V] float32, in place or not, and return them.

        Rows at the neutral value come out bit for bit as they went in, and a row's result does
        not depend on the others.
        """
        raise NotImplementedError


class Filter(Stage):
    """Shapes what is drawn from: temperature and truncation. Not for greedy rows."""

    widening: ClassVar[int] = 8  # times as many candidates, where those were not enough

    def apply(self, candidates: "Candidates", rows: Rows) -> None:
        """Scale or drop candidates. Neutral rows stay as they are, rows do not depend on others."""
        raise NotImplementedError

    def observe(self, candidates: "Candidates", rows: Rows, tokens: Tensor) -> None:
        """See the tokens [R] drawn from candidates that all filters have been through."""
