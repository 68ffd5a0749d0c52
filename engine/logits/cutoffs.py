"""Epsilon and eta sampling: Hewitt et al., 2022, arXiv:2210.15191."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Stage
from engine.numerics import NEG_INF, entropy, log_sum_exp, row_max
from engine.types import Request, Rows


class EpsilonCutoff(Stage):
    """Drop tokens less likely than ε; the likeliest stays in any case."""

    fields = ("epsilon_cutoff",)
    sampling_only = True

    def __init__(self, lanes: Lanes) -> None:
        self.epsilon = lanes.column(torch.float32, neutral=0.0)

    def admit(self, lane: int, request: Request) -> bool:
        self.epsilon[lane] = request.params.epsilon_cutoff
        return request.params.epsilon_cutoff > 0.0

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        floor = log_sum_exp(logits).float() + self.epsilon.at(rows).log()
        return logits.masked_fill_(logits < floor.minimum(row_max(logits)), NEG_INF)


class EtaCutoff(Stage):
    """Drop tokens less likely than min(ε, √ε · exp(-entropy)); the likeliest stays."""

    fields = ("eta_cutoff",)
    sampling_only = True

    def __init__(self, lanes: Lanes) -> None:
        self.epsilon = lanes.column(torch.float32, neutral=0.0)

    def admit(self, lane: int, request: Request) -> bool:
        self.epsilon[lane] = request.params.eta_cutoff
        return request.params.eta_cutoff > 0.0

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        log_epsilon = self.epsilon.at(rows).log()
        total = log_sum_exp(logits).float()
        floor = total + log_epsilon.minimum(log_epsilon / 2 - entropy(logits - total))
        return logits.masked_fill_(logits < floor.minimum(row_max(logits)), NEG_INF)
