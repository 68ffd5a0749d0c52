"""Locally typical sampling: Meister et al., 2022, arXiv:2202.00666."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.numerics import best, kernels
from engine.types import Rows


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
        keep, mass, farthest = _typical(candidates, total, entropy, typical_p)
        # The tail is at least as surprising as its bound. It is farther off than all that is kept
        # if that bound is, on the far side of the entropy.
        bound = total - candidates.least - entropy
        inside = (mass >= typical_p) & (bound > farthest)
        candidates.keep(keep, active=typical_p < 1.0, inside=inside)


def _typical(
    candidates: Candidates, total: Tensor, entropy: Tensor, typical_p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Which candidates stay, [R, K].

    Besides, the mass of all of them and the largest distance that is kept, [R, 1] both.
    """
    logits, probs, ids = candidates.logits, candidates.probs, candidates.ids
    if (library := kernels(probs)) is not None:
        return library.typical(logits, probs, ids, total, entropy, typical_p)
    distance = (logits - total + entropy).abs()
    _, kept, nearness, mass = _nearest(distance, probs, typical_p)
    farthest = -nearness.gather(1, kept - 1)
    keep = distance <= farthest
    tied = keep.sum(1, keepdim=True) != kept
    # Asking a GPU would mean waiting for it.
    if not tied.is_cpu or bool(tied.any()):
        by_id = ids.argsort(1)
        order, kept, _, _ = _nearest(distance.gather(1, by_id), probs.gather(1, by_id), typical_p)
        first = torch.arange(candidates.width, device=kept.device) < kept
        its = torch.zeros_like(keep).scatter_(1, by_id.gather(1, order), first)
        keep = torch.where(tied, its, keep)
    return keep, mass, farthest


def _nearest(
    distance: Tensor, probs: Tensor, typical_p: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Candidates [R, K] in the order of their distance, equal ones as they came, and how many stay.

    Returns their order and their -distance, [R, K] both, around the number [R, 1]; last the mass of
    all candidates, [R, 1].
    """
    nearness, order = best(-distance, distance.shape[1])
    mass = probs.gather(1, order).cumsum(1)
    kept = (mass[:, :-1] < typical_p).sum(1, keepdim=True) + 1
    return order, kept, nearness, mass[:, -1:]
