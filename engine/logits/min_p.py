"""Min-p: Nguyen et al., 2024, arXiv:2407.01082."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.types import Request, Rows


class MinP(Filter):
    """Drop tokens less than `min_p` times as likely as the likeliest one."""

    fields = ("min_p",)

    def __init__(self, lanes: Lanes) -> None:
        self.min_p = lanes.column(torch.float32, neutral=0.0)

    def admit(self, lane: int, request: Request) -> bool:
        self.min_p[lane] = request.params.min_p
        return request.params.min_p > 0.0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        min_p = self.min_p.at(rows)
        keep_min_p(candidates, min_p, active=min_p > 0.0)


def keep_min_p(candidates: Candidates, min_p: Tensor, active: Tensor) -> None:
    """Drop tokens less than `min_p` [R, 1] times as likely as the likeliest."""
    # p >= min_p * p_max  <=>  logit >= logit_max + log(min_p), so no softmax is needed.
    candidates.keep_above(candidates.top + min_p.log(), active=active)
