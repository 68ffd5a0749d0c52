"""Stochastic beams: sequences drawn without replacement (Kool et al., 2019, arXiv:1903.06059)."""

import math

from engine.messages import NO_VALID_TOKEN, Request, Token
from engine.rng import derive
from engine.strategies.base import Branch, Plain, View, Wants
from engine.strategies.beam import Score
from engine.types import Sequence


class StochasticBeams(Plain):
    """The `width` hypotheses of largest perturbed logprob; a finished one keeps its place.

    Adding Gumbel noise to the logprob of every sequence and taking the largest draws without
    replacement. The noise is made top down: that of a hypothesis' extensions is drawn so that
    their maximum is its own.
    """

    def __init__(self, request: Request) -> None:
        self.n = request.params.n
        self.width = request.params.beams
        self.seed = request.seed
        self.score = Score(request)
        self.wants = Wants(top=self.width, perturbed=True)
        self.ended: list[float] = []  # perturbed logprobs of finished hypotheses
        self.num_forks = 0

    def advance(self, live: list[Sequence], view: View) -> list[Branch]:
        steps: list[tuple[float, Branch]] = []
        for sequence, candidates in zip(live, view.top, strict=True):
            above = 0.0 if sequence.memory is None else sequence.memory
            if not candidates:
                nothing = Branch(sequence, (Token(NO_VALID_TOKEN, ""),), memory=above)
                steps.append((above, nothing))
            noisy = [sequence.score + candidate.perturbed for candidate in candidates]
            for candidate, own in zip(candidates, noisy, strict=True):
                perturbed = _conditioned(own, noisy[0], above)
                self.num_forks += 1
                branch = Branch(
                    sequence,
                    (candidate.token,),
                    score=sequence.score + candidate.logprob,
                    memory=perturbed,
                    seed=derive(self.seed, self.num_forks),
                )
                steps.append((perturbed, branch))
        steps.sort(key=lambda step: -step[0])
        branches: list[Branch] = []
        for perturbed, branch in steps:
            if sum(one > perturbed for one in self.ended) + len(branches) >= self.width:
                break
            branches.append(branch)
        self.ended += [
            branch.memory for branch in branches if view.ends(branch.parent, branch.tokens[0])
        ]
        return branches

    def rank(self, finished: list[Sequence]) -> list[Sequence]:
        ranked = sorted(finished, key=lambda sequence: -sequence.memory)[: self.n]
        for sequence in ranked:
            sequence.report = {
                "cumulative_logprob": sequence.score,
                "sequence_score": self.score.finished(sequence),
            }
        return ranked


def _conditioned(own: float, largest: float, above: float) -> float:
    """`own` shifted as if the `largest` of its family had been `above`.

    -ln(e^-above - e^-largest + e^-own), in the form that keeps its digits (the paper's appendix B).
    """
    if own >= largest:
        return above
    v = above - own + math.log1p(-math.exp(own - largest))
    return above - max(v, 0.0) - math.log1p(math.exp(-abs(v)))
