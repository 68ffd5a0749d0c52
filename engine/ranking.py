"""The best tokens of each row, found once and shared by the filters that need an order."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.numerics import NEG_INF

WIDTH = 256  # candidates ranked before falling back to sorting a whole row

Rule = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]


class Ranking:
    """The ids of each row's `WIDTH` largest entries: descending, equal ones by lowest id.

    Found on first use. Filters only turn entries into -inf and a temperature keeps the order, so
    the ids stay right while a row passes through them; values are read anew each time.
    """

    def __init__(self) -> None:
        self._ids: Tensor | None = None
        self._exhausted: Tensor | None = None

    def cut(self, scores: Tensor, active: Tensor, rule: Rule, target: Tensor) -> Tensor:
        """`target` [R, V] without the tokens that `rule` drops, looking at `scores` in order.

        `rule(values [r, N], ids [r, N], take)` gets the best N tokens of some rows, best first,
        and `take`, which picks those rows from a per-row tensor. It answers which of them to keep
        [r, N], and for which rows everything past the N is dropped too [r]. Rows where it cannot
        say so, although there is more, are sorted whole. Rows not `active` [R, 1] stay as they
        are.
        """
        ids, exhausted = self._of(scores)
        values = scores.gather(1, ids)
        keep, inside = rule(values, ids, lambda per_row: per_row)
        result = _only(target, ids, keep)
        active = active.squeeze(1)
        if not bool(active.all()):
            result = torch.where(active.unsqueeze(1), result, target)
        unsure = (active & ~inside & ~exhausted).nonzero().squeeze(1)
        if len(unsure):
            values, ids = scores[unsure].sort(dim=-1, descending=True, stable=True)
            keep, _ = rule(values, ids, lambda per_row: per_row[unsure])
            result[unsure] = _only(target[unsure], ids, keep)
        return result

    def _of(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if self._ids is None or self._exhausted is None:
            values, self._ids = best(scores, WIDTH)
            whole = values.shape[1] == scores.shape[1]
            self._exhausted = (values[:, -1] == NEG_INF) | whole
        return self._ids, self._exhausted


def best(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest entries of each row and their ids: descending, equal ones by lowest id.

    `torch.topk` promises nothing about equal entries, so the order among them is mended, and a
    row with equals across the border is sorted whole.
    """
    if width >= scores.shape[1]:
        return scores.sort(dim=-1, descending=True, stable=True)
    values, ids = scores.topk(width + 1)
    tied = ((values[:, -1] == values[:, -2]) & (values[:, -1] > NEG_INF)).nonzero().squeeze(1)
    ids, order = ids[:, :width].sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    if len(tied):
        whole, whole_ids = scores[tied].sort(dim=-1, descending=True, stable=True)
        values[tied], ids[tied] = whole[:, :width], whole_ids[:, :width]
    return values, ids


def _only(target: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    """`target` with everything but the kept ids at -inf."""
    kept = target.gather(1, ids).masked_fill_(~keep, NEG_INF)
    return torch.full_like(target, NEG_INF).scatter_(1, ids, kept)
