"""Best-first and A* beam search: Meister et al., 2020, arXiv:2007.03909.

One search with replaceable parts: which hypothesis is taken up next, when to stop, how many of a
length may be taken up, and what a hypothesis can still become. Beam search is one setting of them
(`BREADTH`); the strategy that serves `beam_strategy: "breadth"` is `Beam`, which computes all
hypotheses of a length in one step and ends as transformers does.
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from engine.messages import NO_VALID_TOKEN, Request, Token
from engine.params import max_waiting
from engine.strategies.base import Branch, Plain, View, Wants
from engine.strategies.beam import Score
from engine.types import Sequence

_FEW = 64  # forgotten hypotheses that are not worth clearing away


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


@dataclass(order=True, slots=True)
class _Entry:
    key: tuple[float, ...]
    number: int  # of equals, the first that was found
    hypothesis: Hypothesis = field(compare=False)
    waits: bool = field(default=True, compare=False)


class _Waiting:
    """Hypotheses that wait to be taken up: of each length no more than can still be.

    A step costs what it adds, however many wait: those that are forgotten stay in the heap until
    they are half of it.
    """

    def __init__(self, width: int | None) -> None:
        self.width = width  # of a length, how many are ever taken up
        self.taken: Counter[int] = Counter()  # by length
        self.heap: list[_Entry] = []
        self.lengths: dict[int, list[_Entry]] = {}  # sorted
        self.of_parent: Counter[Sequence] = Counter()
        self.left: set[Sequence] = set()  # parents of whom the last has been forgotten
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def push(self, entry: _Entry) -> None:
        length, parent = entry.hypothesis.length, entry.hypothesis.parent
        its = self.lengths.setdefault(length, [])
        insort(its, entry)
        heapq.heappush(self.heap, entry)
        self.count += 1
        self.of_parent[parent] += 1
        self.left.discard(parent)
        if self.width is not None and len(its) > self.width - self.taken[length]:
            self._remove(its[-1])

    def pop(self) -> _Entry:
        """The first in order. Raises IndexError if none waits."""
        while not (entry := heapq.heappop(self.heap)).waits:
            pass
        self.taken[entry.hypothesis.length] += 1
        self._remove(entry)
        return entry

    def shrink(self, most: int) -> None:
        """Forget the last of the shortest until no more than so many wait."""
        while self.count > most:
            self._remove(self.lengths[min(self.lengths)][-1])

    def _remove(self, entry: _Entry) -> None:
        length, parent = entry.hypothesis.length, entry.hypothesis.parent
        its = self.lengths[length]
        del its[bisect_left(its, entry)]
        if not its:
            del self.lengths[length]
        entry.waits = False
        self.count -= 1
        self.of_parent[parent] -= 1
        if not self.of_parent[parent]:
            del self.of_parent[parent]
            self.left.add(parent)
        if len(self.heap) > 2 * self.count + _FEW:
            self.heap = [one for one in self.heap if one.waits]
            heapq.heapify(self.heap)


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
        self.memory = params.beam_memory or max_waiting(request.max_tokens)
        self.score = Score(request)
        # What ends may be worth less than what is less likely, but goes on.
        self.wants = Wants(top=self.size, going=self.size if request.ends else 0)
        self.waiting = _Waiting(self.size if parts.limited else None)
        self.num_entries = 0
        self.num_results = 0
        self.num_expansions = 0

    def advance(self, live: list[Sequence], view: View) -> list[Branch]:
        (expanded,) = live
        self.num_expansions += 1
        for candidate in view.top[0]:
            total = expanded.score + candidate.logprob
            self._push(self._hypothesis(expanded, candidate.token, total, view))
        self.waiting.shrink(self.memory)
        branches: list[Branch] = []
        while self.waiting and not self.parts.enough(self.num_results, self.n):
            entry = self.waiting.pop()
            one = entry.hypothesis
            if one.ended and one.length < self.max_tokens:
                self._push(replace(one, length=one.length + 1), entry.number)
                continue
            branches.append(Branch(one.parent, (one.token,), score=one.total))
            if not one.ended:
                return branches + self._rest(expanded, branches)
            self.num_results += 1
        if branches or self.num_results:
            return branches
        return [Branch(expanded, (Token(NO_VALID_TOKEN, ""),))]

    def _rest(self, expanded: Sequence, branches: list[Branch]) -> list[Branch]:
        """What becomes of parents: those whose extensions may still be taken up sleep."""
        seen = [expanded, *(branch.parent for branch in branches)]
        left, self.waiting.left = self.waiting.left.difference(seen), set()
        sleepers = [one for one in dict.fromkeys(seen) if one in self.waiting.of_parent]
        return [
            *(Branch(one, asleep=True) for one in sleepers),
            *(Branch(one, dropped=True) for one in left),
        ]

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
        self.waiting.push(_Entry(self.parts.order(one), number, one))

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
