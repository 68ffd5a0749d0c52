"""The likeliest tokens of each row: nearly always all that temperature and filters look at."""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import native
from engine.numerics import (
    NEG_INF,
    best,
    count_finite,
    cut_,
    deviation,
    kernels,
    pick,
    rank,
    summarise,
    within,
)

WIDTH = 256
_COLDEST = 1e-4  # below this temperature the likeliest token is taken


class Candidates:
    """Sampled rows on their way through temperature and filters.

    Each row has its best `width` (256) tokens, found when a filter first asks: best first, equal
    ones by lowest id. The others are its tail, which is kept or dropped as one, or cut at a floor.
    A filter that would have to look into the tail makes the row `unsure`; whoever runs the filters
    then runs them again on that row with more candidates, in the end with its whole vocabulary, the
    definition of what is right.

    The distribution is that of everything not dropped yet, the tail included. A shallow copy keeps
    it as it is now: changes put new tensors in the place of old ones, or know which are shared.
    """

    def __init__(
        self, logits: Tensor, width: int | None = None, index: Tensor | None = None
    ) -> None:
        """logits [R, V] float32, not written to; with an `index` [r] those rows of them.

        Every row needs a finite entry.
        """
        if index is not None and kernels(logits) is None:
            logits, index = pick(logits, index), None  # once, not for each reduction
        self._source, self._index = logits, index
        self._owns_raw = False  # may `raw` be changed in place?
        self.vocab_size = logits.shape[1]
        self.width = min(WIDTH if width is None else width, self.vocab_size)
        count, device = len(logits if index is None else index), logits.device
        self.temperature = torch.ones(count, device=device)
        self.tail = torch.full((count,), self.width < self.vocab_size, device=device)
        self.unsure = torch.zeros(count, dtype=torch.bool, device=device)
        self.num_draws: Tensor | None = None  # [R]: the likeliest of so many draws is taken
        self.redrawn: Tensor | None = None  # [R] bool: the second draw counts, without the first
        self.whole = ~self.unsure  # [R] bool: nothing dropped that is in `raw`
        self._logits: Tensor | None = None
        self._cold: Tensor | None = None  # [R] bool: where a temperature near 0 was asked for
        self._cut: Tensor | None = None  # [R] bool: not as given
        # `_summary` of whole rows, and the temperature for which it was computed.
        self._everything: Tensor | None = None
        self._known_at = self.temperature

    def __copy__(self) -> "Candidates":
        # What may be changed in place is each one's own, or changed by neither.
        self._owns_raw = False
        other = object.__new__(Candidates)
        other.__dict__.update(self.__dict__)
        if self._everything is not None:
            other._everything, other._known_at = self._everything.clone(), self._known_at.clone()
        return other

    def wider(self, rows: Tensor, times: int) -> "Candidates":
        """Some rows [r] as they were at first, with more candidates."""
        index = rows if self._index is None else self._index[rows]
        other = Candidates(self._source, self.width * times, index)
        if self._everything is not None:
            other._everything, other._known_at = self._everything[:, rows], self._known_at[rows]
            if self._cut is not None:
                other._known_at = other._known_at.masked_fill(self._cut[rows], 0.0)
        return other

    @cached_property
    def raw(self) -> Tensor:
        """Without what was dropped, in rows whose tails stay: [R, V]."""
        return pick(self._source, self._index)

    def raw_rows(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Some rows [r] of `raw`, as a tensor that has them and an index for it; None: all of it.

        Nothing is copied for that.
        """
        if self._index is None or "raw" in self.__dict__:
            return self.raw, rows
        return self._source, self._index if rows is None else self._index[rows]

    @cached_property
    def _best(self) -> tuple[Tensor, Tensor]:
        return best(self._source, self.width, self._index)

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

    @cached_property
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

    @cached_property
    def probs(self) -> Tensor:
        """Of each candidate, [R, K] float32.

        Rounded to float32 only here: sums that are exactly a limit must compare equal to it.
        """
        if "_best" not in self.__dict__ and self._everything is None:
            # Both at once, while a row is at hand.
            its = self._source, self.width, self.temperature, self._index
            self._best, self._everything = rank(*its)
            self._known_at = self.temperature
        total = self.total  # of all rows as they are, if asked before anything is ranked
        if (library := kernels(self.logits)) is not None:
            return library.probs(self.logits, total)
        return (self.logits.double() - total).exp_().float()

    def probs_of(self, tokens: Tensor) -> Tensor:
        """Of one token of each row, [R] int64; 0 where it was dropped: [R, 1] float32."""
        tokens = tokens.unsqueeze(1)
        is_it = self.ids == tokens
        own = torch.where(is_it, self.probs, 0.0).sum(1, keepdim=True)
        scaled = _scaled(_entries(*self.raw_rows(), tokens), self.temperature.unsqueeze(1))
        outside = self.tail.unsqueeze(1) & ~is_it.any(1, keepdim=True)
        return torch.where(outside, (scaled.double() - self.total).exp_().float(), own)

    @property
    def count(self) -> Tensor:
        """How many tokens are left, [R, 1] int64."""
        return self._by_row(
            lambda: self.alive.sum(1, keepdim=True), lambda: count_finite(*self.raw_rows())
        )

    def deviation(self, where: Tensor) -> Tensor:
        """The population standard deviation of the logits of some rows [R, 1] bool; [R, 1]."""

        def whole() -> Tensor:
            return self._of_raw(
                where.squeeze(1) & self.whole,
                lambda raw, temperature, index: deviation(raw, index) / temperature.unsqueeze(1),
                torch.ones_like(where, dtype=torch.float32),
            )

        return self._by_row(lambda: deviation(self.logits), whole)

    @cached_property
    def _summary(self) -> tuple[Tensor, Tensor]:
        raw, index = self.raw_rows()
        if (library := kernels(raw)) is not None:
            if self._everything is None:
                self._known_at = torch.zeros_like(self.temperature)  # which no temperature is
                self._everything = torch.empty(2, len(self.temperature), 1, dtype=torch.float64)
            elif self._known_at is self.temperature:
                self._known_at = self._known_at.clone()  # to be kept up in place
            known = self._known_at, self._everything
            its = self.temperature, self.whole, self._logits
            total, entropy = library.update_summaries(raw, index, *its, known)
            return total, entropy
        total, entropy = self._by_row(
            lambda: summarise(self.logits, torch.ones_like(self.temperature)),
            self._of_everything,
        )
        return total, entropy

    def _by_row(self, own: Callable[[], Tensor], whole: Callable[[], Tensor]) -> Tensor:
        """A number of each row, [..., R, 1], from its candidates or from `raw`, if it is whole."""
        if not self.ranked:
            return whole()
        # Asking a GPU would mean waiting for it.
        if self.temperature.is_cpu:
            count = int(self.whole.sum())
            if count in (0, len(self.temperature)):
                return whole() if count else own()
        return torch.where(self.whole.unsqueeze(1), whole(), own())

    def _of_everything(self) -> Tensor:
        """`_summary` of whole rows, computed once for a temperature; of others, anything."""
        if self._everything is None:
            raw, index = self.raw_rows()
            self._everything = summarise(raw, self.temperature, index)
            self._known_at = self.temperature
        if self._known_at is self.temperature:
            return self._everything
        its = (self._known_at != self.temperature) & self.whole
        self._everything = self._of_raw(its, summarise, self._everything)
        self._known_at = torch.where(its, self.temperature, self._known_at)
        return self._everything

    def _of_raw(
        self,
        where: Tensor,
        compute: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        known: Tensor,
    ) -> Tensor:
        """Numbers of each row, [..., R, 1]: in the rows `where` [R] of `raw` and temperature."""
        # Asking a GPU would mean waiting for it.
        needed = where.nonzero().squeeze(1) if where.is_cpu else None
        if needed is None or len(needed) == len(where):
            raw, index = self.raw_rows()
            return compute(raw, self.temperature, index)
        if not len(needed):
            return known
        raw, index = self.raw_rows(needed)
        new = compute(raw, self.temperature[needed], index)
        return known.index_copy(-2, needed, new)

    # -- changes

    def divide(self, temperature: Tensor) -> None:
        """Divide all logits by a temperature, [R, 1].

        All of them together below 0.0001 mean that the likeliest token is taken, by `settle`.
        """
        temperature = temperature.squeeze(1)
        cold = self.temperature * temperature < _COLDEST
        self._cold = cold if self._cold is None else self._cold | cold
        self.temperature = self.temperature * temperature.clamp(min=_COLDEST)
        if self._logits is not None:
            # From the beginning, so that candidates and tail are rounded alike.
            scaled = _scaled(self._best[0], self.temperature.unsqueeze(1))
            self._logits = torch.where(self.alive, scaled, NEG_INF)
        self._forget()

    def settle(self) -> None:
        """After the last filter: only the likeliest token stays where the temperature is near 0."""
        if self._cold is not None and bool(self._cold.any()):
            one = torch.ones_like(self._cold, dtype=torch.int64).unsqueeze(1)
            self.keep_first(one, active=self._cold.unsqueeze(1))

    def keep(self, mask: Tensor, active: Tensor, inside: Tensor) -> None:
        """Drop candidates outside `mask` [R, K], and the tail, in the rows `active` [R, 1].

        `inside` [R, 1]: the mask was decided without the tail, nothing of which is to be kept.
        """
        if (library := kernels(self.logits)) is not None:
            self._become(library.keep(self._before(active), mask.contiguous(), inside.contiguous()))
            return
        inactive = ~active
        self.unsure = self.unsure | ((active > inside).squeeze(1) & self.tail)
        self._leave(mask | inactive)
        inactive = inactive.squeeze(1)
        self.tail = self.tail & inactive
        self.whole = self.whole & inactive

    def keep_first(self, count: Tensor, active: Tensor) -> None:
        """Keep the `count` [R, 1] int64 likeliest tokens, in the rows `active` [R, 1]."""
        if (library := kernels(self.logits)) is not None:
            self._become(library.keep_first(self._before(active), count.contiguous()))
            return
        rank = self.alive.cumsum(1)
        self.keep(rank <= count, active, inside=rank[:, -1:] >= count)

    def keep_mass(self, limit: Tensor, active: Tensor) -> None:
        """Keep the tokens above which no more than a mass of `limit` [R, 1] is ranked.

        In the rows `active` [R, 1].
        """
        probs = self.probs
        if (library := kernels(probs)) is not None:
            self._become(library.keep_mass(self._before(active), probs, limit.contiguous()))
            return
        mass = probs.cumsum(1)
        keep = F.pad(mass[:, :-1], (1, 0)) <= limit
        self.keep(keep, active, inside=mass[:, -1:] > limit)

    def keep_above(self, floor: Tensor, active: Tensor) -> None:
        """Keep what is not below `floor` [R, 1], in the rows `active` [R, 1]."""
        if (library := kernels(self.logits)) is not None:
            after, cut = library.keep_above(
                self._before(active), floor.contiguous(), self._best[0], self.temperature
            )
            if cut is not None:
                self._cut_tail(floor, cut)
            self._become(after)
            return
        all_stay = self.least >= floor
        self._cut_tail(floor, (active & all_stay).squeeze(1) & self.tail)
        self.keep(self.logits >= floor, active & ~all_stay, inside=torch.ones_like(all_stay))

    def _before(self, active: Tensor) -> native.Before:
        return self.logits, self.unsure, self.tail, self.whole, active.contiguous()

    def _become(self, after: native.After) -> None:
        self._logits, self.unsure, self.tail, self.whole = after
        self._forget()

    def _cut_tail(self, floor: Tensor, where: Tensor) -> None:
        """Drop of the tails of some rows [R] what is below `floor`, as no candidate is."""
        if self._changes_raw(where):
            its = torch.where(where, floor.squeeze(1), NEG_INF)
            cut_(self.raw, self.temperature, its)

    def drop(self, mask: Tensor, sure: Tensor) -> None:
        """Drop some candidates [R, K] and nothing of the tail, if that is `sure` [R, 1]."""
        self.unsure = self.unsure | (self.tail & ~sure.squeeze(1))
        touched = mask.any(1)
        where = touched & self.tail
        self._leave(~mask)
        self.whole = self.whole & (~touched | self.tail)
        if self._changes_raw(where):
            gone = self.tail.unsqueeze(1) & ~self.alive
            self.raw.scatter_(1, self.ids, self._best[0].masked_fill(gone, NEG_INF))

    def _changes_raw(self, where: Tensor) -> bool:
        """Something is about to be dropped from `raw` in some rows [R], so that they stay whole.

        Returns whether there are any.
        """
        # Asking a GPU would mean waiting for it.
        if self.temperature.is_cpu and not bool(where.any()):
            return False
        if not self._owns_raw:
            copied = self._index is not None and "raw" not in self.__dict__
            self.raw = self.raw if copied else self.raw.clone()
            self._owns_raw = True
        self._cut = where if self._cut is None else self._cut | where
        self._known_at = self._known_at.masked_fill(where, 0.0)
        self._forget()
        return True

    def _leave(self, mask: Tensor) -> None:
        self._logits = torch.where(mask, self.logits, NEG_INF)
        self._forget()

    def draw_often(self, count: Tensor, again: Tensor) -> None:
        """Take the likeliest of `count` [R, 1] draws; `again` [R, 1]: not the first drawn token."""
        self.num_draws, self.redrawn = count.squeeze(1), again.squeeze(1)

    def force(self, where: Tensor, token_ids: Tensor) -> None:
        """Leave only one token [R, 1] in some rows [R, 1], unless it has been banned."""
        known = token_ids.clamp(min=0)
        where = where & (_entries(self._source, self._index, known) > NEG_INF)
        logits = self.logits.masked_fill(where, NEG_INF)
        values, ids = self._best
        # A token that is no candidate takes the place of the first one.
        is_it = ids == known
        is_it[:, 0] |= ~is_it.any(1)
        is_it &= where
        self.__dict__["_best"] = values, torch.where(is_it, known, ids)
        self._logits = logits.masked_fill(is_it, 0.0)
        others = ~where.squeeze(1)
        self.tail = self.tail & others
        self.whole = self.whole & others
        self.unsure = self.unsure & others
        self._forget()

    def _forget(self) -> None:
        for name in ("alive", "probs", "_summary"):
            self.__dict__.pop(name, None)

    # -- all tokens again

    def dense(self) -> Tensor:
        """The logits of the whole vocabulary, -inf where dropped: [R, V] float32."""
        if self.ranked and self.tail.is_cpu and not bool(self.tail.any()):
            nothing = torch.full((len(self.tail), self.vocab_size), NEG_INF)
            return nothing.scatter_(1, self.ids, self.logits)
        whole = _scaled(self.raw, self.temperature.unsqueeze(1))
        if not self.ranked:
            return whole
        whole = torch.where(self.tail.unsqueeze(1), whole, NEG_INF)
        return whole.scatter_(1, self.ids, self.logits)


def _entries(logits: Tensor, index: Tensor | None, tokens: Tensor) -> Tensor:
    """The logits of one token [R, 1] of each row, [R, 1]; with an index [R] of some of the rows."""
    return logits.gather(1, tokens) if index is None else logits[index.unsqueeze(1), tokens]


def _scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits / temperature, finite where that would be too large for float32, or too low."""
    return within(logits / temperature).masked_fill_(logits == NEG_INF, NEG_INF)
