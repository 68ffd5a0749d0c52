"""Top-k: Fan et al., 2018, arXiv:1805.04833."""

import torch

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.types import Rows


class TopK(Filter):
    """Keep exactly the k likeliest tokens, of equal ones those with the lowest ids."""

    fields = ("top_k",)

    def __init__(self, lanes: Lanes) -> None:
        self.top_k = lanes.column(torch.int64, neutral=0)

    def admit(self, lane: int, request: Request) -> bool:
        self.top_k[lane] = max(request.params.top_k, 0)
        return request.params.top_k > 0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        top_k = self.top_k.at(rows)
        candidates.keep_first(top_k, active=top_k > 0)
