"""Nucleus sampling: Holtzman et al., 2019, arXiv:1904.09751."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.types import Request, Rows


class TopP(Filter):
    """Keep the fewest likeliest tokens whose probabilities add up to `top_p`.

    A token stays if the mass ranked above it is below `top_p` (`strict`), or not above it
    (`inclusive`, as in Llama 3's reference code). The best token always stays.
    """

    fields = ("top_p", "top_p_rule")

    def __init__(self, lanes: Lanes) -> None:
        self.top_p = lanes.column(torch.float32, neutral=1.0)
        self.inclusive = lanes.column(torch.bool, neutral=False)

    def admit(self, lane: int, request: Request) -> bool:
        self.top_p[lane] = request.params.top_p
        self.inclusive[lane] = request.params.top_p_rule == "inclusive"
        return request.params.top_p < 1.0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        top_p = self.top_p.at(rows)
        keep_top_p(candidates, top_p, top_p < 1.0, self.inclusive.at(rows))


def keep_top_p(
    candidates: Candidates, top_p: Tensor, active: Tensor, inclusive: Tensor | None = None
) -> None:
    """Keep the fewest likeliest tokens of mass `top_p` [R, 1]."""
    if inclusive is None:
        inclusive = torch.zeros_like(active)
    mass = candidates.probs.cumsum(1)
    above = F.pad(mass[:, :-1], (1, 0))
    keep = (above < top_p) | (inclusive & (above <= top_p))
    keep |= candidates.alive.cumsum(1) <= 1
    mass = mass[:, -1:]
    inside = (mass > top_p) | (~inclusive & (mass >= top_p))
    candidates.keep(keep, active=active, inside=inside)
