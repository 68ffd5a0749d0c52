"""Nucleus sampling: Holtzman et al., 2019, arXiv:1904.09751."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Stage
from engine.numerics import NEG_INF, log_sum_exp
from engine.types import Request, Rows


class TopP(Stage):
    """Keep the fewest likeliest tokens whose probabilities add up to `top_p`.

    A token stays if the mass ranked above it is below `top_p` (`strict`), or not above it
    (`inclusive`, as in Llama 3's reference code). The best token always stays.
    """

    fields = ("top_p", "top_p_rule")
    sampling_only = True

    def __init__(self, lanes: Lanes) -> None:
        self.top_p = lanes.column(torch.float32, neutral=1.0)
        self.inclusive = lanes.column(torch.bool, neutral=False)

    def admit(self, lane: int, request: Request) -> bool:
        self.top_p[lane] = request.params.top_p
        self.inclusive[lane] = request.params.top_p_rule == "inclusive"
        return request.params.top_p < 1.0

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        top_p, inclusive = self.top_p.at(rows), self.inclusive.at(rows)
        total = log_sum_exp(logits)

        def rule(
            values: Tensor,
            ids: Tensor,  # noqa: ARG001
            take: Callable[[Tensor], Tensor],
        ) -> tuple[Tensor, Tensor]:
            p, touching = take(top_p), take(inclusive)
            # Rounded to float32 only here: a prefix of exactly p must compare equal to it.
            probs = (values.double() - take(total)).exp().float()
            mass = probs.cumsum(1)
            above = F.pad(mass[:, :-1], (1, 0))
            keep = (above < p) | (touching & (above <= p))
            keep |= (values > NEG_INF).cumsum(1) <= 1
            mass = mass[:, -1:]
            return keep, ((mass > p) | (~touching & (mass >= p)))[:, 0]

        return rows.ranking.cut(logits, top_p < 1.0, rule, target=logits)
