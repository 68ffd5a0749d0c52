"""Top-a: a floor scaled by the squared peak (text-generation-webui, KoboldAI)."""

import torch

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.types import Rows


class TopA(Filter):
    """Drop tokens less likely than `top_a` times the square of the best one's probability."""

    fields = ("top_a",)

    def __init__(self, lanes: Lanes) -> None:
        self.top_a = lanes.column(torch.float32, neutral=0.0)

    def admit(self, lane: int, request: Request) -> bool:
        self.top_a[lane] = request.params.top_a
        return request.params.top_a > 0.0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        # ln p >= ln a + 2 ln p_max, with ln p = z - total.
        top_a, top = self.top_a.at(rows), candidates.top
        floor = (top_a.log() + 2.0 * top.double() - candidates.total).float()
        candidates.keep_above(floor.minimum(top), active=top_a > 0.0)
