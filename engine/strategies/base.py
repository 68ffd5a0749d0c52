"""What a decoding strategy is: it answers each step with branches."""

from dataclasses import dataclass
from typing import Protocol

from engine.types import Sequence, Token


@dataclass(frozen=True, slots=True)
class View:
    """What a strategy sees of a step; entry i belongs to live sequence i."""

    tokens: list[Token]  # what the sampler chose, with its logprobs


@dataclass(frozen=True, slots=True)
class Branch:
    """A parent and the tokens to append to it.

    A parent with one branch continues, with several it is forked, with none it is dropped.
    """

    parent: Sequence
    tokens: tuple[Token, ...]


class Strategy(Protocol):
    """Decides which sequences a group has.

    It sees its arguments and its own fields, never blocks or lanes.
    """

    width: int  # lanes reserved at admission: the most live sequences at any time
    streams: bool  # may text leave before the whole group is done?

    def advance(self, live: list[Sequence], view: View) -> list[Branch]:
        """The branches that go on, from the sequences whose last token was just computed."""
        ...

    def rank(self, finished: list[Sequence]) -> list[Sequence]:
        """The choices to return, in the order of their index."""
        ...
