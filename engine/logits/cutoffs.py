"""Epsilon and eta sampling: Hewitt et al., 2022, arXiv:2210.15191."""

import torch

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.types import Rows


class EpsilonCutoff(Filter):
    """Drop tokens less likely than ε; the likeliest stays in any case."""

    fields = ("epsilon_cutoff",)

    def __init__(self, lanes: Lanes) -> None:
        self.epsilon = lanes.column(torch.float32, neutral=0.0)

    def admit(self, lane: int, request: Request) -> bool:
        self.epsilon[lane] = request.params.epsilon_cutoff
        return request.params.epsilon_cutoff > 0.0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        epsilon = self.epsilon.at(rows)
        floor = candidates.total.float() + epsilon.log()
        candidates.keep_above(floor.minimum(candidates.top), active=epsilon > 0.0)


class EtaCutoff(Filter):
    """Drop tokens less likely than min(ε, √ε · exp(-entropy)); the likeliest stays."""

    fields = ("eta_cutoff",)

    def __init__(self, lanes: Lanes) -> None:
        self.epsilon = lanes.column(torch.float32, neutral=0.0)

    def admit(self, lane: int, request: Request) -> bool:
        self.epsilon[lane] = request.params.eta_cutoff
        return request.params.eta_cutoff > 0.0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        epsilon = self.epsilon.at(rows)
        bound = epsilon.log().minimum(epsilon.log() / 2 - candidates.entropy.float())
        floor = candidates.total.float() + bound
        candidates.keep_above(floor.minimum(candidates.top), active=epsilon > 0.0)
