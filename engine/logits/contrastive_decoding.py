"""Contrastive decoding: Li et al., 2022, arXiv:2210.15097; O'Brien and Lewis, arXiv:2309.09117."""

import math

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Transform
from engine.messages import Request
from engine.numerics import NEG_INF, finite, log_softmax, scan
from engine.types import Rows, companions_of


class ContrastiveDecoding(Transform):
    """What the model says and a smaller one, the amateur, does not.

    Of the tokens at least `cd_alpha` as likely as the likeliest: ln p - ln p' with the amateur at
    temperature τ, or with a β the later form, (1 + β) · z - β · z'. All others are dropped.
    """

    fields = ("cd_amateur", "cd_alpha", "cd_beta", "cd_temperature")

    def __init__(self, lanes: Lanes) -> None:
        self.margin = lanes.column(torch.float32, neutral=0.0)
        self.beta = lanes.column(torch.float32, neutral=-1.0)  # below 0: the first form
        self.later = lanes.flags()
        self.temperature = lanes.column(torch.float32, neutral=1.0)
        self.wanted = lanes.flags()

    def admit(self, lane: int, request: Request) -> bool:
        params = request.params
        self.margin[lane] = -math.log(params.cd_alpha)
        self.beta[lane] = -1.0 if params.cd_beta is None else params.cd_beta
        self.temperature[lane] = max(params.cd_temperature, 1e-30)
        self.later[lane] = params.cd_beta is not None
        self.wanted[lane] = params.cd_amateur is not None
        return params.cd_amateur is not None

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        wanted = self.wanted[rows.host_lanes].nonzero()[0].tolist()
        if not wanted:
            return logits
        own, other = logits[wanted], finite(companions_of(rows, wanted))
        colder = finite(other.double() / self.temperature.at(rows)[wanted])
        scores = log_softmax(own).double() - finite(log_softmax(colder))
        if self.later[rows.host_lanes].any():
            beta = self.beta.at(rows)[wanted].double()
            scores = torch.where(beta >= 0.0, (1.0 + beta) * own - beta * other, scores)
        scores = finite(scores)
        least = scan(own)[0].unsqueeze(1) - self.margin.at(rows)[wanted]
        logits[wanted] = torch.where((own >= least) & (own > NEG_INF), scores, NEG_INF)
        return logits
