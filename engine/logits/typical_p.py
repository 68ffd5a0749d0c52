"""Locally typical sampling: Meister et al., 2022, arXiv:2202.00666."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Stage
from engine.numerics import NEG_INF, entropy, log_softmax
from engine.ranking import Ranking
from engine.types import Request, Rows


class TypicalP(Stage):
    """Keep the tokens whose surprise is nearest the entropy, until they have mass `typical_p`.

    The likeliest token may go; of equally near tokens the lowest ids stay.
    """

    fields = ("typical_p",)
    sampling_only = True

    def __init__(self, lanes: Lanes) -> None:
        self.typical_p = lanes.column(torch.float32, neutral=1.0)

    def admit(self, lane: int, request: Request) -> bool:
        self.typical_p[lane] = request.params.typical_p
        return request.params.typical_p < 1.0

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        typical_p = self.typical_p.at(rows)
        logprobs = log_softmax(logits)
        # Largest first, so that nearest is best; dropped entries stay last.
        nearness = (logprobs + entropy(logprobs)).abs_().neg_()

        def rule(
            values: Tensor, ids: Tensor, take: Callable[[Tensor], Tensor]
        ) -> tuple[Tensor, Tensor]:
            p = take(typical_p)
            mass = take(logprobs).gather(1, ids).exp_().cumsum(1)
            keep = (F.pad(mass[:, :-1], (1, 0)) < p) & (values > NEG_INF)
            return keep, mass[:, -1] >= p[:, 0]

        return Ranking().cut(nearness, typical_p < 1.0, rule, target=logits)
