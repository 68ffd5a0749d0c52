"""Top-H: Baghaei Potraghloo et al., 2025, arXiv:2509.02510."""

import torch

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.numerics import row_sum
from engine.types import Rows

_CONSIDERED = 100  # tokens, as in transformers


class TopH(Filter):
    """Keep likely tokens while they have no more than a part `top_h` of the entropy.

    Both are those of the 100 likeliest tokens alone. The best one always stays.
    """

    fields = ("top_h",)

    def __init__(self, lanes: Lanes) -> None:
        self.top_h = lanes.column(torch.float32, neutral=1.0)
        self.active = lanes.column(torch.bool, neutral=False)

    def admit(self, lane: int, request: Request) -> bool:
        top_h = request.params.top_h
        self.active[lane] = top_h is not None
        self.top_h[lane] = 1.0 if top_h is None else top_h
        return top_h is not None

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        rank = candidates.alive.cumsum(1)
        considered = rank <= _CONSIDERED
        probs = candidates.probs.masked_fill(~considered, 0.0).double()
        probs = probs / row_sum(probs)
        passed = torch.special.entr(probs).cumsum(1)
        # Rounded to float32 only here: what is exactly the limit must compare equal to it.
        part = (passed / passed[:, -1:]).float()
        keep = ((part <= self.top_h.at(rows)) & considered) | (rank <= 1)
        enough = rank[:, -1:] >= _CONSIDERED
        candidates.keep(keep, active=self.active.at(rows), inside=enough)
