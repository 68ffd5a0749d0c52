"""Beam search, as transformers does it, with the scores of GNMT and the groups of diverse beams.

Length and coverage: Wu et al., 2016, arXiv:1609.08144. Groups: Vijayakumar et al., 2016,
arXiv:1610.02424.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.messages import NO_VALID_TOKEN, Candidate, Request, Token
from engine.strategies.base import Branch, Plain, Ranked, View, Wants
from engine.types import Sequence

FloatArray = NDArray[np.floating[Any]]

_LEAST_COVERAGE = 1e-10
_LARGE = 1e30  # beyond this all penalties are alike
_LARGEST = 1e300  # and its inverse: what absurd length penalties come to


class Score:
    """What a hypothesis is worth, from the sum of its logprobs."""

    def __init__(self, request: Request) -> None:
        self.penalty = request.params.length_penalty
        self.kind = request.params.length_penalty_type
        self.coverage_penalty = min(request.params.coverage_penalty, _LARGE)
        self.ends = request.ends

    def __call__(self, total: float, sequence: Sequence, length: int, last: int) -> float:
        """Of a sequence with `length` output tokens, the `last` of which has this id."""
        return total / self.divisor(sequence, length, last)

    def divisor(self, sequence: Sequence, length: int, last: int = NO_VALID_TOKEN) -> float:
        """What the sum is divided by."""
        match self.kind:
            case "gnmt":
                counted = (5 + length) / 6
            case "vllm":
                counted = float(sequence.prompt_len + length - (last in self.ends))
            case _:
                counted = float(length)
        try:
            divisor = float(counted**self.penalty)
        except OverflowError:
            return _LARGEST
        return max(divisor, 1 / _LARGEST)

    def coverage(self, coverage: Tensor | None) -> float:
        """The reward, never above 0, for the prompt's tokens that have been attended to."""
        if coverage is None:
            return 0.0
        return self.coverage_penalty * float(coverage.clamp(_LEAST_COVERAGE, 1.0).log().sum())

    def finished(self, sequence: Sequence) -> float:
        """Of a sequence whose `score` is the sum."""
        last = sequence.token_ids[-1]
        return self(sequence.score, sequence, max(sequence.num_generated, 1), last)


@dataclass(frozen=True, slots=True)
class _Memory:
    """What a beam knows besides its sequence."""

    group: int
    total: float = 0.0  # Σ logprob, less what its group's diversity has cost
    coverage: Tensor | None = None  # [prompt length]: attention received so far


@dataclass(slots=True)
class _Step:
    """A beam, and which of its candidates would extend it."""

    parent: Sequence
    candidates: Ranked
    place: int
    memory: _Memory
    ends: bool = False

    @property
    def candidate(self) -> Candidate:
        return self.candidates[self.place] if self.candidates else _NOTHING

    @property
    def token_id(self) -> int:
        return self.candidates.ids[self.place] if self.candidates else NO_VALID_TOKEN


class _Group:
    """Beams that compete with one another, and the scores of their best finished hypotheses."""

    def __init__(self, index: int, size: int, request: Request) -> None:
        self.index = index
        self.size = size
        self.max_tokens = request.max_tokens
        self.stopping = request.params.early_stopping
        self.prune = request.params.beam_prune
        self.score = Score(request)
        self.finished: list[float] = []  # best first, `size` at the most
        self.done = False

    def choose(self, steps: list[_Step]) -> list[_Step]:
        """The steps to take, of the best ones; those that end count if they are among the first.

        As in transformers: `size` of those that go on, and of the first `size` those that end.
        """
        going = [step for step in steps if not step.ends][: self.size]
        ending = [step for step in steps[: self.size] if step.ends]
        length = steps[0].parent.num_generated + 1
        scored = [(self._score(step, length), step) for step in ending]
        own = sorted([*self.finished, *(score for score, _ in scored)], reverse=True)[: self.size]
        if self.prune is not None and own:
            own = [score for score in own if score >= own[0] - self.prune]
        worst = own[-1] if own else -np.inf
        self.finished = own
        self.done = not going or not self._may_improve(going[0], length)
        kept = [step for score, step in scored if score >= worst]
        return kept if self.done else [*going, *kept]

    def _score(self, step: _Step, length: int) -> float:
        last = step.token_id
        own = self.score(step.memory.total, step.parent, length, last)
        return own + self.score.coverage(step.memory.coverage)

    def _may_improve(self, best: _Step, length: int) -> bool:
        """Can a hypothesis that is still open become one of the best?"""
        if len(self.finished) < self.size:
            return True
        if self.stopping is True:
            return False
        favours_length = self.stopping == "never" and self.score.penalty > 0.0
        reached = self.max_tokens if favours_length else length
        possible = best.memory.total / self.score.divisor(best.parent, reached)
        return possible > self.finished[-1]


class Beam(Plain):
    """Keeps the likeliest hypotheses of each length until no better result is to be expected."""

    def __init__(self, request: Request) -> None:
        params = request.params
        self.n = params.n
        self.width = params.beams
        self.prune = params.beam_prune
        # Pruning may leave fewer results than choices: none of them may begin before the end.
        self.settles = self.prune is None or self.n == 1
        self.diversity = min(params.diversity_penalty, _LARGE)
        num_groups = params.num_beam_groups
        size = self.width // num_groups
        self.groups = [_Group(index, size, request) for index in range(num_groups)]
        self.score = self.groups[0].score
        # Other groups may push down as many tokens as they have beams.
        others = self.width if num_groups > 1 else 0
        self.wants = Wants(
            top=2 * size + others,
            # One token that ends leaves enough of those.
            going=size + others if len(request.ends) > 1 else 0,
            coverage=params.coverage_penalty > 0.0,
        )

    def advance(self, live: list[Sequence], view: View) -> list[Branch]:
        branches: list[Branch] = []
        chosen: Counter[int] = Counter()  # tokens of the groups before
        for group in self.groups:
            if group.done:
                continue
            for step in group.choose(self._steps(live, view, group, chosen)):
                candidate = step.candidate
                chosen[step.token_id] += not step.ends
                # In float32, as transformers adds them up, near ties come out alike.
                score = float(np.float32(step.parent.score) + np.float32(candidate.logprob))
                branches.append(
                    Branch(step.parent, (candidate.token,), score=score, memory=step.memory)
                )
        return branches

    def _steps(
        self, live: list[Sequence], view: View, group: _Group, chosen: Counter[int]
    ) -> list[_Step]:
        """The best ways to extend a group's beams; of equals the first beam's lowest id.

        Down to the last that matters: of those that end the first `size`, and `size` that go on.
        """
        beams: list[tuple[int, Sequence, _Memory]] = []
        columns: list[tuple[FloatArray, FloatArray]] = []
        for index, (sequence, candidates) in enumerate(zip(live, view.top, strict=True)):
            memory = sequence.memory or _Memory(group.index)
            if memory.group != group.index:
                continue
            if view.coverage:
                seen, before = view.coverage[index], memory.coverage
                coverage = seen if before is None else before + seen
                memory = replace(memory, coverage=coverage)
            beams.append((index, sequence, memory))
            logprobs = np.array(candidates.scores or [_NOTHING.logprob])
            costs = np.zeros(len(logprobs))
            if chosen:
                costs[: len(candidates)] = [chosen[token_id] for token_id in candidates.ids]
            scores = logprobs.astype(np.float32) - (self.diversity * costs).astype(np.float32)
            columns.append((logprobs, np.float32(memory.total) + scores))
        totals = np.concatenate([total for _, total in columns])
        order = np.argsort(-totals, kind="stable")
        if self.prune is not None:
            logprobs = np.concatenate([logprob for logprob, _ in columns])
            order = order[logprobs[order] >= logprobs.max() - self.prune]
        sizes = [len(total) for _, total in columns]
        places = np.concatenate([np.arange(size) for size in sizes])
        beam_of = np.repeat(np.arange(len(beams)), sizes)
        steps: list[_Step] = []
        num_going = 0
        last = live[0].num_generated + 1 >= group.max_tokens  # where none goes on
        for at in order.tolist():
            index, sequence, memory = beams[beam_of[at]]
            step = _Step(sequence, view.top[index], int(places[at]), memory)
            if view.ends(sequence, Token(step.token_id, "")):
                if len(steps) >= group.size:
                    continue
                step.ends = True
            step.memory = replace(memory, total=float(totals[at]))
            steps.append(step)
            num_going += not step.ends
            if len(steps) >= group.size and (num_going >= group.size or last):
                break
        return steps

    def rank(self, finished: list[Sequence]) -> list[Sequence]:
        """The best, of each group no more than it has beams.

        A group's own are ranked as it saw them, those of all groups without what diversity cost.
        """
        results: list[Sequence] = []
        for group in self.groups:
            its = [one for one in finished if one.memory.group == group.index]
            its.sort(key=lambda one: -self._worth(one, one.memory.total))
            results += its[: group.size]
        for sequence in results:
            own = self._worth(sequence, sequence.score)
            sequence.report = {"cumulative_logprob": sequence.score, "sequence_score": own}
        ranked = sorted(results, key=lambda one: -one.report["sequence_score"])[: self.n]
        if self.prune is not None:
            least = ranked[0].report["sequence_score"] - self.prune
            ranked = [one for one in ranked if one.report["sequence_score"] >= least]
        return ranked

    def _worth(self, sequence: Sequence, total: float) -> float:
        """The score of a finished sequence with this sum."""
        length, last = max(sequence.num_generated, 1), sequence.token_ids[-1]
        own = self.score(total, sequence, length, last)
        return own + self.score.coverage(sequence.memory.coverage)


_NOTHING = Candidate(Token(NO_VALID_TOKEN, ""), 0.0)  # where every token is banned
