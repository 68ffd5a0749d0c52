"""Top-k: Fan et al., 2018, arXiv:1805.04833."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.types import Request, Rows


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
        keep_top_k(candidates, top_k, active=top_k > 0)


def keep_top_k(candidates: Candidates, top_k: Tensor, active: Tensor) -> None:
    """Keep the `top_k` [R, 1] likeliest tokens."""
    rank = candidates.alive.cumsum(1)
    candidates.keep(rank <= top_k, active=active, inside=rank[:, -1:] >= top_k)
