"""Classifier-free guidance: Sanchez et al., 2023, arXiv:2306.17806."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Transform
from engine.messages import Request
from engine.numerics import NEG_INF, finite, log_softmax
from engine.types import Rows, companions_of


class Guidance(Transform):
    """Away from what would follow the negative prompt: u + γ · (c - u), both logprobs."""

    fields = ("guidance_scale", "negative_prompt")

    def __init__(self, lanes: Lanes) -> None:
        self.scale = lanes.column(torch.float32, neutral=1.0)
        self.wanted = lanes.flags()

    def admit(self, lane: int, request: Request) -> bool:
        wanted = request.params.guidance_scale != 1.0
        self.scale[lane] = request.params.guidance_scale
        self.wanted[lane] = wanted
        return wanted

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        wanted = self.wanted[rows.host_lanes].nonzero()[0].tolist()
        if not wanted:
            return logits
        own = log_softmax(logits[wanted])
        other = finite(log_softmax(companions_of(rows, wanted))).double()
        guided = other + self.scale.at(rows)[wanted] * (own - other)
        logits[wanted] = torch.where(own > NEG_INF, finite(guided), NEG_INF)
        return logits
