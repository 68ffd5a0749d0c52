"""Nucleus sampling: Holtzman et al., 2019, arXiv:1904.09751."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.types import Rows


class TopP(Filter):
    """Keep the fewest likeliest tokens whose probabilities add up to `top_p`.

    A token stays if the mass ranked above it is below `top_p` (`strict`), or not above it
    (`inclusive`, as in Llama 3's reference code). The best token always stays.
    """

    fields = ("top_p", "top_p_rule")

    def __init__(self, lanes: Lanes) -> None:
        self.limit = lanes.column(torch.float32, neutral=1.0)

    def admit(self, lane: int, request: Request) -> bool:
        top_p, wanted = request.params.top_p, request.params.top_p < 1.0
        strict = wanted and request.params.top_p_rule == "strict"
        self.limit[lane] = float(below(torch.tensor(top_p))) if strict else top_p
        return wanted

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        limit = self.limit.at(rows)
        candidates.keep_mass(limit, active=limit < 1.0)


def below(top_p: Tensor) -> Tensor:
    """The largest mass that is less, but not less than 0: float32."""
    return top_p.nextafter(torch.zeros_like(top_p)).clamp(min=0.0)
