"""Best-first and A* beam search: Meister et al., 2020, arXiv:2007.03909.

One search with replaceable parts: which hypothesis is taken up next, when to stop, how many of a
length may be taken up, and what a hypothesis can still become. Beam search is one setting of them
(`BREADTH`); the strategy that serves `beam_strategy: "breadth"` is `Beam`, which computes all
hypotheses of a length in one step and ends as transformers does.
"""

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from engine.messages import NO_VALID_TOKEN, Request, Token
from engine.strategies.base import Branch, Plain, View, Wants
from engine.strategies.beam import Score
from engine.types import Sequence


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A token behind an expanded sequence, not computed yet.

    One that has ended grows all the same, by nothing, until it is as long as any can be: so it
    competes at every length, as it does in the beams of beam search.
    """

    parent: Sequence
    token: Token
    total: float  # Σ logprob
    bound: float  # no extension of it can score more
    length: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Parts:
    """What makes one search of another.

    Hypotheses with the lowest `order` are taken up first, and no more of a length than the beam
    width if `limited`; it is over when `enough` of the results wanted are there.
    """

    order: Callable[[Hypothesis], tuple[float, ...]]
    limited: bool = True
    enough: Callable[[int, int], bool] = lambda found, wanted: found >= wanted


BREADTH = Parts(lambda one: (one.length, -one.total))
BEST_FIRST = Parts(lambda one: (-one.total,))
A_STAR = Parts(lambda one: (-one.bound,))


@dataclass(order=True, frozen=True, slots=True)
class _Entry:
    key: tuple[float, ...]
    number: int  # of equals, the first that was found
    hypothesis: Hypothesis = field(compare=False)


class Search(Plain):
    """Takes up one hypothesis a step; expanded sequences sleep while extensions of them wait.

    The results are those of beam search, in best-first order with no more expansions than it
    needs, if no hypothesis can gain by growing.
    """

    width = 1

    def __init__(self, request: Request, parts: Parts) -> None:
        params = request.params
        self.parts = parts
        self.n = params.n
        self.size = params.beams
        self.max_tokens = request.max_tokens
        self.memory = params.beam_memory
        self.score = Score(request)
        # What ends may be worth less than what is less likely, but goes on.
        self.wants = Wants(top=self.size, going=self.size if request.ends else 0)
        self.queue: list[_Entry] = []
        self.taken: Counter[int] = Counter()  # by length
        self.num_entries = 0
        self.num_results = 0
        self.num_expansions = 0

    def advance(self, live: list[Sequence], view: View) -> list[Branch]:
        (expanded,) = live
        self.num_expansions += 1
        for candidate in view.top[0]:
            total = expanded.score + candidate.logprob
            self._push(self._hypothesis(expanded, candidate.token, total, view))
        self._forget()
        branches: list[Branch] = []
        while self.queue and not self.parts.enough(self.num_results, self.n):
            entry = heapq.heappop(self.queue)
            one = entry.hypothesis
            if self.parts.limited and self.taken[one.length] >= self.size:
                continue
            self.taken[one.length] += 1
            if one.ended and one.length < self.max_tokens:
                self._push(replace(one, length=one.length + 1), entry.number)
                continue
            branches.append(Branch(one.parent, (one.token,), score=one.total))
            if not one.ended:
                return branches + self._waiting()
            self.num_results += 1
        if branches or self.num_results:
            return branches
        return [Branch(expanded, (Token(NO_VALID_TOKEN, ""),))]

    def _waiting(self) -> list[Branch]:
        """Those whose extensions may still be taken up sleep."""
        parents = {id(entry.hypothesis.parent): entry.hypothesis.parent for entry in self.queue}
        return [Branch(parent, asleep=True) for parent in parents.values()]

    def _hypothesis(self, parent: Sequence, token: Token, total: float, view: View) -> Hypothesis:
        length = parent.num_generated + 1
        ended = view.ends(parent, token)
        # The sum only falls, so dividing it by more is the most that growing can do.
        longest = not ended and self.score.penalty > 0.0
        bound = self.score(total, parent, self.max_tokens if longest else length, token.id)
        return Hypothesis(parent, token, total, bound, length, ended)

    def _push(self, one: Hypothesis, number: int | None = None) -> None:
        self.num_entries += 1
        number = self.num_entries if number is None else number
        heapq.heappush(self.queue, _Entry(self.parts.order(one), number, one))

    def _forget(self) -> None:
        """Drop what can no longer be taken up, and what there is no memory for."""
        kept = sorted(self.queue)
        if self.parts.limited:
            places = {one: self.size - count for one, count in self.taken.items()}
            within: list[_Entry] = []
            for entry in kept:
                length = entry.hypothesis.length
                left = places.get(length, self.size)
                places[length] = left - 1
                if left > 0:
                    within.append(entry)
            kept = within
        while self.memory and len(kept) > self.memory:
            shortest = min(entry.hypothesis.length for entry in kept)
            kept.remove(max(entry for entry in kept if entry.hypothesis.length == shortest))
        self.queue = kept  # sorted, so it is a heap

    def rank(self, finished: list[Sequence]) -> list[Sequence]:
        for sequence in finished:
            sequence.report = {
                "cumulative_logprob": sequence.score,
                "sequence_score": self.score.finished(sequence),
                "num_expansions": self.num_expansions,
            }
        by_score = self.parts is A_STAR
        key = "sequence_score" if by_score else "cumulative_logprob"
        return sorted(finished, key=lambda one: -one.report[key])[: self.n]
