"""Tail-free sampling (Phénix and Egan, 2019), as in text-generation-webui."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.types import Request, Rows


class TailFree(Filter):
    """Cut where the curve of sorted probabilities has done most of its bending.

    The absolute second differences of the curve, as parts of their sum, are added up from the
    likeliest token on. Tokens behind the place where they pass `tfs` go, and the least likely one
    goes in any case. A curve of fewer than three tokens, or a straight one, stays as it is.
    """

    fields = ("tfs",)

    def __init__(self, lanes: Lanes) -> None:
        self.tfs = lanes.column(torch.float32, neutral=1.0)

    def admit(self, lane: int, request: Request) -> bool:
        self.tfs[lane] = request.params.tfs
        return request.params.tfs < 1.0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        if candidates.raw.shape[1] < 3:
            return
        tfs = self.tfs.at(rows)
        if candidates.width < 3:  # too few to see anything bend
            nothing = torch.zeros_like(tfs, dtype=torch.bool)
            candidates.keep(candidates.alive, active=tfs < 1.0, inside=nothing)
            return
        alive, probs = candidates.alive, candidates.probs
        count = alive.sum(1, keepdim=True)
        # Asking a GPU would mean waiting for it.
        holes = not alive.is_cpu or bool((alive[:, 1:] > alive[:, :-1]).any())
        if holes:  # what was dropped goes to the end
            place = torch.where(alive, alive.cumsum(1), count + (~alive).cumsum(1)) - 1
            probs = torch.zeros_like(probs).scatter_(1, place, probs)
        rank = torch.arange(candidates.width, device=probs.device)
        bends = probs.diff(dim=1).diff(dim=1).abs()
        passed = torch.where(rank[:-2] + 2 < count, bends, 0.0).double().cumsum(1)
        total = passed[:, -1:]
        # The first differences fall to nothing from the last two candidates on; the second ones,
        # their changes, add no more than twice their sum.
        has_tail = candidates.tail.unsqueeze(1)
        added = probs[:, -2:].double().sum(1, keepdim=True)
        most = total + torch.where(has_tail, added, 0.0)
        keep = _before(passed, total, tfs)
        inside = (keep == _before(passed, most, tfs)).all(1, keepdim=True) & ~keep[:, -1:]
        keep &= has_tail | (rank < count - 1)
        keep[:, 0] = True
        curved = (count >= 3) & (total > 0.0)
        keep = keep.gather(1, place) if holes else keep
        candidates.keep(keep, active=(tfs < 1.0) & (curved | has_tail), inside=inside & curved)


def _before(passed: Tensor, total: Tensor, tfs: Tensor) -> Tensor:
    """Which ranks stay, [R, K]: rank r + 1 and all behind it go where `passed` at r is too much."""
    stay = (passed / total).float() <= tfs
    # Rank 0 stays; the last rank goes with the one before it.
    return torch.cat((torch.ones_like(stay[:, :1]), stay, stay[:, -1:]), dim=1)
