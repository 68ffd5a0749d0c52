"""The likeliest tokens of each row: nearly always all that temperature and filters look at."""

from functools import cached_property

import torch
from torch import Tensor

from engine.numerics import NEG_INF, best, deviation, summarise

WIDTH = 256
_COLDEST = 1e-4  # below this temperature the likeliest token is taken


class Candidates:
    """Sampled rows on their way through temperature and filters.

    Each row has its best `width` (256) tokens, found when a filter first asks: best first, equal
    ones by lowest id. The others are its tail, which is kept or dropped as one. A filter that would
    have to look into the tail makes the row `unsure`; whoever runs the filters then runs them again
    on that row with its whole vocabulary as candidates, the definition of what is right.

    The distribution is that of everything not dropped yet, the tail included.
    """

    def __init__(self, raw: Tensor, width: int | None = None) -> None:
        """`raw` [R, V] float32 is only read; every row needs a finite entry."""
        self.raw = raw
        self.width = min(WIDTH if width is None else width, raw.shape[1])
        rows = (len(raw),)
        self.temperature = torch.ones(rows, device=raw.device)
        self.tail = torch.full(rows, self.width < raw.shape[1], device=raw.device)
        self.unsure = torch.zeros(rows, dtype=torch.bool, device=raw.device)
        self.num_draws: Tensor | None = None  # [R]: the likeliest of so many draws is taken
        self.redrawn: Tensor | None = None  # [R] bool: the second draw counts, without the first
        self._logits: Tensor | None = None
        self._whole = torch.ones(rows, dtype=torch.bool, device=raw.device)  # nothing dropped yet
        self._cold: Tensor | None = None  # [R] bool: where a temperature near 0 was asked for

    @cached_property
    def _best(self) -> tuple[Tensor, Tensor]:
        return best(self.raw, self.width)

    @property
    def ranked(self) -> bool:
        """Has any filter looked?"""
        return self._logits is not None

    @property
    def ids(self) -> Tensor:
        """Token ids, [R, K] int64."""
        return self._best[1]

    @property
    def logits(self) -> Tensor:
        """Divided by the temperature so far, -inf where dropped: [R, K] float32."""
        if self._logits is None:
            self._logits = _scaled(self._best[0], self.temperature.unsqueeze(1))
        return self._logits

    @property
    def alive(self) -> Tensor:
        """Which candidates are left, [R, K]."""
        return self.logits > NEG_INF

    @property
    def least(self) -> Tensor:
        """No token of the tail has a larger logit than this, [R, 1]."""
        return _scaled(self._best[0][:, -1:], self.temperature.unsqueeze(1))

    # -- the distribution

    @property
    def top(self) -> Tensor:
        """The largest logit, [R, 1]."""
        return self.logits.amax(1, keepdim=True)

    @property
    def total(self) -> Tensor:
        """ln Σ exp of the logits, [R, 1] float64."""
        return self._summary[0]

    @property
    def entropy(self) -> Tensor:
        """In nats, [R, 1] float64."""
        return self._summary[1]

    @property
    def probs(self) -> Tensor:
        """Of each candidate, [R, K] float32.

        Rounded to float32 only here: sums that are exactly a limit must compare equal to it.
        """
        return (self.logits.double() - self.total).exp_().float()

    @property
    def count(self) -> Tensor:
        """How many tokens are left, [R, 1] int64."""
        own = self.alive.sum(1, keepdim=True)
        if not self._may_be_whole:
            return own
        whole = (self.raw > NEG_INF).sum(1, keepdim=True)
        return torch.where(self._whole.unsqueeze(1), whole, own)

    @property
    def deviation(self) -> Tensor:
        """The population standard deviation of the logits, [R, 1]."""
        own = deviation(self.logits)
        if not self._may_be_whole:
            return own
        whole = deviation(self.raw) / self.temperature.unsqueeze(1)
        return torch.where(self._whole.unsqueeze(1), whole, own)

    @cached_property
    def _summary(self) -> tuple[Tensor, Tensor]:
        # Candidates without the rest of their row do not say what the rest adds.
        self.unsure |= self.tail & ~self._whole
        own = summarise(self.logits, torch.ones_like(self.temperature))
        if not self._may_be_whole:
            return own
        everything = summarise(self.raw, self.temperature)
        whole = self._whole.unsqueeze(1)
        return torch.where(whole, everything[0], own[0]), torch.where(whole, everything[1], own[1])

    @property
    def _may_be_whole(self) -> bool:
        # Asking a GPU would mean waiting for it.
        return not self.raw.is_cpu or bool(self._whole.any())

    # -- changes

    def divide(self, temperature: Tensor) -> None:
        """Divide all logits by a temperature, [R, 1].

        All of them together below 0.0001 mean that the likeliest token is taken, by `settle`.
        """
        cold = self.temperature * temperature.squeeze(1) < _COLDEST
        self._cold = cold if self._cold is None else self._cold | cold
        temperature = temperature.clamp(min=_COLDEST)
        if self._logits is not None:
            self._logits = _scaled(self._logits, temperature)
        self.temperature = self.temperature * temperature.squeeze(1)
        self._forget()

    def settle(self) -> None:
        """After the last filter: only the likeliest token stays where the temperature is near 0."""
        if self._cold is not None and bool(self._cold.any()):
            first = self.alive.cumsum(1) <= 1
            cold = self._cold.unsqueeze(1)
            self.keep(first, active=cold, inside=torch.ones_like(cold))

    def keep(self, mask: Tensor, active: Tensor, inside: Tensor) -> None:
        """Drop candidates outside `mask` [R, K], and the tail, in the rows `active` [R, 1].

        `inside` [R, 1]: the mask was decided without the tail, nothing of which is to be kept.
        """
        active = active.squeeze(1)
        self.unsure |= active & self.tail & ~inside.squeeze(1)
        self.tail &= ~active
        self._whole &= ~active
        self._drop(~mask & active.unsqueeze(1))

    def keep_above(self, floor: Tensor, active: Tensor) -> None:
        """Keep what is not below `floor` [R, 1], in the rows `active` [R, 1]."""
        self.keep(self.logits >= floor, active, inside=self.least < floor)

    def drop(self, mask: Tensor, sure: Tensor) -> None:
        """Drop some candidates [R, K] and nothing of the tail, if that is `sure` [R, 1]."""
        self.unsure |= self.tail & ~sure.squeeze(1)
        self._whole &= ~mask.any(1)
        self._drop(mask)

    def _drop(self, mask: Tensor) -> None:
        self._logits = self.logits.masked_fill(mask, NEG_INF)
        self._forget()

    def draw_often(self, count: Tensor, again: Tensor) -> None:
        """Take the likeliest of `count` [R, 1] draws; `again` [R, 1]: not the first drawn token."""
        self.num_draws, self.redrawn = count.squeeze(1), again.squeeze(1)

    def force(self, where: Tensor, token_ids: Tensor) -> None:
        """Leave only one token [R, 1] in some rows [R, 1], unless it has been banned."""
        known = token_ids.clamp(min=0)
        where = where & (self.raw.gather(1, known) > NEG_INF)
        logits = self.logits.masked_fill(where, NEG_INF)
        values, ids = self._best
        # A token that is no candidate takes the place of the first one.
        is_it = ids == known
        is_it[:, 0] |= ~is_it.any(1)
        is_it &= where
        self.__dict__["_best"] = values, torch.where(is_it, known, ids)
        self._logits = logits.masked_fill(is_it, 0.0)
        forced = where.squeeze(1)
        self.tail &= ~forced
        self._whole &= ~forced
        self.unsure &= ~forced
        self._forget()

    def _forget(self) -> None:
        self.__dict__.pop("_summary", None)

    # -- all tokens again

    def dense(self) -> Tensor:
        """The logits of the whole vocabulary, -inf where dropped: [R, V] float32."""
        whole = _scaled(self.raw, self.temperature.unsqueeze(1))
        if not self.ranked:
            return whole
        whole = torch.where(self.tail.unsqueeze(1), whole, NEG_INF)
        return whole.scatter_(1, self.ids, self.logits)


def _scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits / temperature, finite where it would be too large for float32."""
    return (logits / temperature).clamp_(max=torch.finfo(torch.float32).max)
