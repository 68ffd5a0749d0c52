"""Top-k: Fan et al., 2018, arXiv:1805.04833."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Stage
from engine.numerics import NEG_INF
from engine.types import Request, Rows


class TopK(Stage):
    """Keep exactly the k likeliest tokens, of equal ones those with the lowest ids."""

    fields = ("top_k",)
    sampling_only = True

    def __init__(self, lanes: Lanes) -> None:
        self.top_k = lanes.column(torch.int64, neutral=0)

    def admit(self, lane: int, request: Request) -> bool:
        self.top_k[lane] = max(request.params.top_k, 0)
        return request.params.top_k > 0

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        top_k = self.top_k.at(rows)

        def rule(
            values: Tensor,
            ids: Tensor,  # noqa: ARG001
            take: Callable[[Tensor], Tensor],
        ) -> tuple[Tensor, Tensor]:
            k = take(top_k)
            rank = (values > NEG_INF).cumsum(1)
            return rank <= k, rank[:, -1] >= k[:, 0]

        return rows.ranking.cut(logits, top_k > 0, rule, target=logits)
