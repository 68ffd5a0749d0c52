"""KL-guided temperature: Chang et al., 2023, arXiv:2306.01286."""

import torch

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.types import Rows

_LEAST = 1e-30


class KlTemperature(Filter):
    """Colder where the reference prompt would be continued otherwise: T = T0 · 2^(-KL / h).

    T0, the `temperature`, is divided by elsewhere. The divergence is of the model's own
    distributions.
    """

    fields = ("kl_bandwidth", "kl_reference_prompt")

    def __init__(self, lanes: Lanes) -> None:
        self.bandwidth = lanes.column(torch.float32, neutral=0.0)

    def admit(self, lane: int, request: Request) -> bool:
        bandwidth = request.params.kl_bandwidth
        # One that float32 rounds to 0 would be none at all.
        self.bandwidth[lane] = max(bandwidth, _LEAST) if bandwidth > 0.0 else 0.0
        return bandwidth > 0.0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        assert rows.signals is not None
        bandwidth = self.bandwidth.at(rows)
        factor = torch.exp2(-rows.signals.divergence / bandwidth)
        candidates.divide(torch.where(bandwidth > 0.0, factor, 1.0))
