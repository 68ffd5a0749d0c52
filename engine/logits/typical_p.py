"""Locally typical sampling: Meister et al., 2022, arXiv:2202.00666."""

import torch
import torch.nn.functional as F

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.numerics import best
from engine.types import Request, Rows


class TypicalP(Filter):
    """Keep the tokens whose surprise is nearest the entropy, until they have mass `typical_p`.

    The likeliest token may go; of equally near tokens the lowest ids stay.
    """

    fields = ("typical_p",)

    def __init__(self, lanes: Lanes) -> None:
        self.typical_p = lanes.column(torch.float32, neutral=1.0)

    def admit(self, lane: int, request: Request) -> bool:
        self.typical_p[lane] = request.params.typical_p
        return request.params.typical_p < 1.0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        typical_p = self.typical_p.at(rows)
        total, entropy = candidates.total.float(), candidates.entropy.float()
        # Of equals `best` takes the first, so sorting by id first makes it the one of lowest id.
        _, by_id = best(-candidates.ids.float(), candidates.width)
        distance = (candidates.logits - total + entropy).abs().gather(1, by_id)
        nearness, order = best(-distance, candidates.width)
        order = by_id.gather(1, order)
        mass = candidates.probs.gather(1, order).cumsum(1)
        keep = F.pad(mass[:, :-1], (1, 0)) < typical_p
        keep[:, 0] = True
        # The tail is at least as surprising as its bound. It is farther off than all that is kept
        # if that bound is, on the far side of the entropy.
        bound = total - candidates.least - entropy
        farthest = (-nearness).masked_fill(~keep, 0.0).amax(1, keepdim=True)
        inside = (mass[:, -1:] >= typical_p) & (bound > farthest)
        keep = torch.zeros_like(keep).scatter_(1, order, keep)
        candidates.keep(keep, active=typical_p < 1.0, inside=inside)
