"""Self-evaluation decoding: Luo et al., 2024, arXiv:2405.16552.

The authors' code is not public. Where the paper leaves something open, this is our reading: a try
goes on greedily to its end, a forced text asks whether it is right, and the verdict is the
probability of one token of two.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.messages import NO_VALID_TOKEN, Candidate, Request, Token
from engine.strategies.base import Branch, Plain, View, Wants
from engine.types import Sequence


@dataclass(slots=True)
class _Try:
    """One candidate at a chaotic point."""

    candidate: Candidate
    ids: list[int] = field(default_factory=list)
    verdict: float = 0.0
    asked: bool = False  # the question has been put behind it
    judged: bool = False

    @property
    def prob(self) -> float:
        return math.exp(self.candidate.logprob)


class SelfEvaluation(Plain):
    """Ordinary choices, until a point is chaotic: then candidates are tried and judged.

    The sequence itself sleeps meanwhile. It goes on with the candidate of the highest
    α · p(right) + (1 - α) · p(candidate).
    """

    streams = True

    def __init__(self, request: Request) -> None:
        assert request.params.sed is not None
        self.params = request.params.sed
        self.width = self.params.k
        self.wants = Wants(top=self.params.k, logits=True)
        self.question = tuple(Token(token_id, "") for token_id in request.question_ids)
        self.verdicts = list(request.verdict_ids)
        self.main: Sequence | None = None  # while it sleeps
        self.tries: list[_Try] = []
        self.points: list[dict[str, Any]] = []

    def advance(self, live: list[Sequence], view: View) -> list[Branch]:
        if self.main is None:
            return self._go_on(live[0], view)
        drafts: list[Branch] = []
        for index, sequence in enumerate(live):
            drafts += self._try_on(self.tries[sequence.memory], sequence, index, view)
        return drafts or [self._decide()]

    def _go_on(self, sequence: Sequence, view: View) -> list[Branch]:
        """The ordinary choice, or the tries that a chaotic point asks for."""
        point = self._point(view)
        if point is None:
            return [Branch(sequence, (view.tokens[0],))]
        self.points.append({"position": sequence.num_generated, **point})
        self.main = sequence
        self.tries = [_Try(candidate) for candidate in view.top[0]]
        drafts = [
            self._draft(one, number, sequence, one.candidate.token, view)
            for number, one in enumerate(self.tries)
        ]
        return [*drafts, Branch(sequence, asleep=True)]

    def _point(self, view: View) -> dict[str, float] | None:
        """What makes this point chaotic, if it is, and there may be one more."""
        candidates = view.top[0]
        if len(self.points) >= self.params.max_points or len(candidates) < 2:
            return None
        assert view.logits is not None
        probs = view.logits[0].double().softmax(0)
        entropy = float(torch.special.entr(probs).sum())
        ratio = math.exp(candidates[1].logprob - candidates[0].logprob)
        limit = self.params.delta_e
        by_ratio = self.params.detector != "entropy" and ratio > self.params.delta_r
        by_entropy = self.params.detector != "ratio" and limit is not None and entropy > limit
        return {"ratio": ratio, "entropy": entropy} if by_ratio or by_entropy else None

    def _try_on(self, one: _Try, sequence: Sequence, index: int, view: View) -> list[Branch]:
        """The next step of a try; nothing once it has been judged."""
        if one.judged:
            return []
        if one.asked:
            assert view.raw is not None
            right = view.raw[index, self.verdicts].double().softmax(0)[0]
            one.verdict, one.judged = float(right), True
            return []
        # Greedily, whatever the sequence itself is drawn by; where nothing may follow, it ends.
        token = view.top[index][0].token if view.top[index] else view.tokens[index]
        return [self._draft(one, sequence.memory, sequence, token, view)]

    def _draft(
        self, one: _Try, number: int, sequence: Sequence, token: Token, view: View
    ) -> Branch:
        """One more token of a try, and behind its last one the question."""
        ends = view.ends(sequence, token)
        one.ids += [token.id] if token.id != NO_VALID_TOKEN else []
        one.asked = ends or len(one.ids) >= self.params.rollout_tokens
        # What ends the text is left out: the question goes on from what was said.
        said = () if ends else (token,)
        tokens = (*said, *self.question) if one.asked else said
        return Branch(sequence, tokens, draft=True, settle=False, memory=number)

    def _decide(self) -> Branch:
        assert self.main is not None
        alpha = self.params.alpha
        worth = [alpha * one.verdict + (1.0 - alpha) * one.prob for one in self.tries]
        best = max(range(len(worth)), key=lambda index: worth[index])
        self.points[-1] |= {
            "chosen": best,
            "candidates": [
                {
                    "token_id": one.candidate.token.id,
                    "p_gen": one.prob,
                    "p_se": one.verdict,
                    "propensity": own,
                    "rollout_token_ids": one.ids,
                }
                for one, own in zip(self.tries, worth, strict=True)
            ],
        }
        main, self.main = self.main, None
        return Branch(main, (self.tries[best].candidate.token,))

    def rank(self, finished: list[Sequence]) -> list[Sequence]:
        for sequence in finished:
            sequence.report = {"sed": self.points}
        return finished
