"""Independent sequences: greedy, sampled, n copies, the best of several."""

from engine.strategies.base import Branch, Plain, View
from engine.types import Sequence


class Sampling(Plain):
    """Each sequence appends the token chosen for it.

    With `width` above `n`, the `n` of highest mean logprob are returned, best first.
    """

    def __init__(self, width: int, n: int) -> None:
        self.width = self.copies = width
        self.n = n
        self.streams = width == n

    def advance(self, live: list[Sequence], view: View) -> list[Branch]:
        return [
            Branch(sequence, (token,)) for sequence, token in zip(live, view.tokens, strict=True)
        ]

    def rank(self, finished: list[Sequence]) -> list[Sequence]:
        # Sorting is stable: of equals, the one with the lower index comes first.
        in_order = sorted(finished, key=lambda sequence: sequence.index)
        if self.streams:
            return in_order
        return sorted(in_order, key=lambda sequence: -sequence.mean_logprob)[: self.n]
