"""Min-p: Nguyen et al., 2024, arXiv:2407.01082."""

import math

import torch

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.numerics import NEG_INF
from engine.types import Rows


class MinP(Filter):
    """Drop tokens less than `min_p` times as likely as the likeliest one."""

    fields = ("min_p",)

    def __init__(self, lanes: Lanes) -> None:
        self.log_min_p = lanes.column(torch.float32, neutral=NEG_INF)

    def admit(self, lane: int, request: Request) -> bool:
        min_p = request.params.min_p
        self.log_min_p.values[lane] = math.log(min_p) if min_p > 0.0 else NEG_INF
        return min_p > 0.0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        # p >= min_p * p_max  <=>  logit >= logit_max + log(min_p), so no softmax is needed.
        log_min_p = self.log_min_p.at(rows)
        candidates.keep_above(candidates.top + log_min_p, active=log_min_p > NEG_INF)
