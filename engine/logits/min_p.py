"""Min-p: Nguyen et al., 2024, arXiv:2407.01082."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Stage
from engine.numerics import NEG_INF, row_max
from engine.types import Request, Rows


class MinP(Stage):
    """Drop tokens less than `min_p` times as likely as the likeliest one."""

    fields = ("min_p",)
    sampling_only = True

    def __init__(self, lanes: Lanes) -> None:
        self.min_p = lanes.column(torch.float32, neutral=0.0)

    def admit(self, lane: int, request: Request) -> bool:
        self.min_p[lane] = request.params.min_p
        return request.params.min_p > 0.0

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        # p >= min_p * p_max  <=>  logit >= logit_max + log(min_p), so no softmax is needed,
        # and log(0) = -inf leaves neutral rows bit for bit as they were.
        floor = row_max(logits) + self.min_p.at(rows).log()
        return logits.masked_fill_(logits < floor, NEG_INF)
