"""Top-nσ: Tang et al., 2024, arXiv:2411.07641."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Stage
from engine.numerics import NEG_INF, row_max, row_sum
from engine.types import Request, Rows


class TopNSigma(Stage):
    """Drop tokens whose logit is more than n standard deviations below the largest.

    The deviation is the population's, over the entries not dropped yet, as in llama.cpp; the
    authors' own code divides by one less.
    """

    fields = ("top_n_sigma",)
    sampling_only = True

    def __init__(self, lanes: Lanes) -> None:
        self.sigmas = lanes.column(torch.float32, neutral=float("inf"))

    def admit(self, lane: int, request: Request) -> bool:
        wanted = request.params.top_n_sigma > 0
        self.sigmas[lane] = request.params.top_n_sigma if wanted else float("inf")
        return wanted

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        alive = logits > NEG_INF
        count = row_sum(alive.float())
        mean = (row_sum(torch.where(alive, logits, 0.0)) / count).float()
        variance = row_sum(torch.where(alive, logits - mean, 0.0).square_()) / count
        # The largest entry must survive where the deviation is 0 and a row's n infinite.
        reach = torch.nan_to_num(self.sigmas.at(rows) * variance.sqrt().float(), nan=float("inf"))
        return logits.masked_fill_(logits < row_max(logits) - reach, NEG_INF)
