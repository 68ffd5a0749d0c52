"""Entropy-based dynamic temperature: Zhang et al., 2024, arXiv:2403.14541."""

import torch

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.types import Rows


class EntropyTemperature(Filter):
    """Colder where the model is sure: T = T0 · N^(θ / H), H the entropy in nats.

    T0, the `temperature`, is divided by elsewhere; T comes near to it where H is large.
    """

    fields = ("edt_theta", "edt_base")

    def __init__(self, lanes: Lanes) -> None:
        self.theta = lanes.column(torch.float32, neutral=0.0)
        self.base = lanes.column(torch.float32, neutral=1.0)

    def admit(self, lane: int, request: Request) -> bool:
        theta = request.params.edt_theta
        self.theta[lane] = theta or 0.0
        self.base[lane] = request.params.edt_base
        return theta is not None

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        theta = self.theta.at(rows)
        factor = self.base.at(rows).pow(theta / candidates.entropy.float())
        candidates.divide(torch.where(theta > 0.0, factor, 1.0))
