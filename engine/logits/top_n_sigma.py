"""Top-nσ: Tang et al., 2024, arXiv:2411.07641."""

import torch

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.types import Rows


class TopNSigma(Filter):
    """Drop tokens whose logit is more than n standard deviations below the largest.

    The deviation is the population's, over the entries not dropped yet, as in llama.cpp; the
    authors' own code divides by one less.
    """

    fields = ("top_n_sigma",)

    def __init__(self, lanes: Lanes) -> None:
        self.sigmas = lanes.column(torch.float32, neutral=0.0)

    def admit(self, lane: int, request: Request) -> bool:
        self.sigmas[lane] = max(request.params.top_n_sigma, 0.0)
        return request.params.top_n_sigma > 0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        sigmas = self.sigmas.at(rows)
        active = sigmas > 0
        reach = sigmas * candidates.deviation(active)
        # Logits near the end of float32 have no deviation that fits into it: nothing is dropped.
        reach = torch.where(reach.isnan(), float("inf"), reach)
        candidates.keep_above(candidates.top - reach, active)
