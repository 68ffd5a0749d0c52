"""CoT-decoding: Wang and Zhou, 2024, arXiv:2402.10200."""

import math
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence as Seq

import regex

from engine.errors import InvalidRequest
from engine.messages import Candidate, Request
from engine.strategies.base import Branch, Plain, View, Wants
from engine.types import Sequence

_NUMBER = r"-?\d+(?:[.,]\d+)*"
_PATIENCE_S = 0.03  # for all branches together: all streams wait meanwhile


class CotDecoding(Plain):
    """Greedy to the branch position, then one branch for each of the likeliest tokens.

    Each goes on greedily. A branch's confidence is the mean distance of the two largest
    probabilities over the tokens of its answer, which is the last match of a pattern in its text.
    Where no branch has one, confidences are of the whole texts, and the greedy branch goes first.
    """

    def __init__(self, request: Request) -> None:
        params = request.params
        self.n = params.n
        self.width = params.cot_branches or 1
        self.position = params.cot_branch_position
        self.together = params.cot_aggregate == "sum"
        self.pattern = regex.compile(params.cot_pattern or _NUMBER)
        self.wants = Wants(top=max(self.width, 2))
        self.branched = False

    def advance(self, live: list[Sequence], view: View) -> list[Branch]:
        branches: list[Branch] = []
        branch_now = not self.branched and live[0].num_generated >= self.position
        for sequence, token, candidates in zip(live, view.tokens, view.top, strict=True):
            gap = _gap(candidates)
            if not branch_now or not candidates:
                branches.append(Branch(sequence, (token,), score=gap))
                continue
            for rank, candidate in enumerate(candidates[: self.width]):
                branches.append(Branch(sequence, (candidate.token,), score=gap, memory=rank))
        self.branched |= branch_now
        return branches

    def rank(self, finished: list[Sequence]) -> list[Sequence]:
        """The surest first; of equals the one whose first token was likelier.

        Raises InvalidRequest if the pattern takes too long.
        """
        in_order = sorted(finished, key=lambda sequence: sequence.memory or 0)
        until = time.monotonic() + _PATIENCE_S
        found = [self._answer(sequence, until) for sequence in in_order]
        sums: dict[str | None, float] = {}
        for answer, confidence in found:
            sums[answer] = sums.get(answer, 0.0) + confidence
        reports = [
            {"branch": sequence.memory or 0, "answer": answer, "confidence": confidence}
            for sequence, (answer, confidence) in zip(in_order, found, strict=True)
        ]
        for sequence, report in zip(in_order, reports, strict=True):
            sequence.report = {"cot": report | {"branches": reports}}
        if all(answer is None for answer, _ in found):
            return in_order[: self.n]

        def worth(pair: tuple[Sequence, tuple[str | None, float]]) -> tuple[bool, float, float]:
            answer, confidence = pair[1]
            return answer is None, -sums[answer] if self.together else 0.0, -confidence

        ranked = sorted(zip(in_order, found, strict=True), key=worth)
        return [sequence for sequence, _ in ranked[: self.n]]

    def _answer(self, sequence: Sequence, until: float) -> tuple[str | None, float]:
        """What a branch answers, and how sure of it the model is."""
        ends = sequence.stream.ends
        patience_s = max(until - time.monotonic(), 1e-4)  # 0 would be no limit
        matches = self.pattern.finditer(sequence.stream.text, timeout=patience_s, concurrent=True)
        try:
            last = deque(matches, maxlen=1)
        except TimeoutError:
            raise InvalidRequest(
                f"cot_pattern takes over {_PATIENCE_S:g} s to find its matches in the answers",
                "cot_pattern",
            ) from None
        answer, (start, end) = None, (0, len(ends))
        for match in last:
            answer, (start, end) = match.group().strip(), _tokens_of(ends, *match.span())
        gaps = sequence.scores[start:end]
        return answer, sum(gaps) / len(gaps) if gaps else 0.0


def _gap(candidates: Seq[Candidate]) -> float:
    """How much more probable the likeliest is than the next."""
    probs = [math.exp(candidate.logprob) for candidate in candidates[:2]]
    return probs[0] - sum(probs[1:]) if probs else 0.0


def _tokens_of(ends: list[int], start: int, end: int) -> tuple[int, int]:
    """The tokens [first, last) that characters [start, end) are in, from where each token ends."""
    return bisect_right(ends, start), bisect_left(ends, end) + 1
