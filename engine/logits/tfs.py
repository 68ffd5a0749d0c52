"""Tail-free sampling (Phénix and Egan, 2019), as in text-generation-webui."""

import numpy as np
import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.numerics import kernels
from engine.types import Rows


class TailFree(Filter):
    """Cut where the curve of sorted probabilities has done most of its bending.

    The absolute second differences of the curve, as parts of their sum, are added up from the
    likeliest token on. Tokens behind the place where they pass `tfs` go, and the least likely one
    goes in any case. A curve of fewer than three tokens, or a straight one, stays as it is.
    """

    fields = ("tfs",)
    widening = 16  # it must see nearly all of the curve

    def __init__(self, lanes: Lanes) -> None:
        self.limit = lanes.column(torch.float64, neutral=1.0)

    def admit(self, lane: int, request: Request) -> bool:
        # A double is at most `tfs` when rounded to float32 if it is at most this.
        tfs = np.float32(request.params.tfs)
        self.limit[lane] = (float(tfs) + float(np.nextafter(tfs, np.float32(1.0)))) / 2
        return request.params.tfs < 1.0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        if candidates.vocab_size < 3:
            return
        limit = self.limit.at(rows)
        active = limit < 1.0
        if candidates.width < 3:  # too few to see anything bend
            candidates.keep(candidates.alive, active, inside=torch.zeros_like(active))
            return
        keep, inside, curved = _bent(candidates, limit)
        has_tail = candidates.tail.unsqueeze(1)
        candidates.keep(keep, active & (curved | has_tail), inside & curved)


def _bent(candidates: Candidates, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which candidates stay where a part `limit` [R, 1] of the bending counts.

    Besides a mask [R, K]: whether it holds also with the tail, and whether the curve bends, [R, 1].
    """
    probs, width = candidates.probs, candidates.width
    if (library := kernels(probs)) is not None:
        return library.bent(candidates.logits, probs, limit, candidates.tail)
    rank = torch.arange(width, device=probs.device)
    # Those that were dropped go to the end.
    alive = candidates.alive
    count = alive.sum(1, keepdim=True)
    place = torch.where(alive, alive.cumsum(1), count + (~alive).cumsum(1)) - 1
    probs = torch.zeros_like(probs).scatter_(1, place, probs)
    bends = probs.diff(dim=1).diff(dim=1).abs()
    bends = torch.where(rank[2:] < count, bends, 0.0)
    passed = bends.cumsum(1, dtype=torch.float64)
    total = passed[:, -1:]
    # The first differences fall to nothing from the last two candidates on; the second ones,
    # their changes, add no more than twice their sum.
    has_tail = candidates.tail.unsqueeze(1)
    most = total + torch.where(
        has_tail, probs[:, -2:].sum(1, keepdim=True, dtype=torch.float64), 0.0
    )
    # Rank r + 1 stays if no more than `tfs` of the bending is done at r.
    last = torch.searchsorted(passed, limit * total, right=True)
    beyond = passed.gather(1, last.clamp(max=width - 3))
    inside = (beyond > limit * most) & (last < width - 2)
    last = torch.where(has_tail, last, last.clamp(max=count - 2))
    keep = (rank <= last).gather(1, place)
    return keep, inside, (total > 0.0) & (count >= 3)
