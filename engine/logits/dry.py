"""DRY, "don't repeat yourself": Weidmann et al., 2026, arXiv:2608.22761."""

import numpy as np
import torch
from torch import Tensor

from engine.kernels import native
from engine.lanes import Lanes
from engine.logits.matches import Matches
from engine.logits.stage import Transform
from engine.logits.words import Words
from engine.messages import Request
from engine.numerics import NEG_INF, kernels
from engine.types import Rows

_LARGEST_EXPONENT = 88.72283905206835  # e to this is the largest float32


class Dry(Transform):
    """Make it less likely that a repetition of earlier text goes on.

    A token that would extend a match of m ≥ `dry_allowed_length` tokens between the end of the
    context and an earlier place loses multiplier · base^(m - allowed length); of several matches
    the longest counts. No match crosses a sequence breaker, and a breaker of one token loses
    nothing. A token whose text holds a breaker is one.
    """

    fields = (
        "dry_multiplier",
        "dry_base",
        "dry_allowed_length",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
    )

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.multiplier = lanes.column(torch.float32, neutral=0.0)
        self.base = lanes.column(torch.float32, neutral=1.0)
        self.allowed = lanes.column(torch.int64, neutral=1)
        self.last_n = lanes.column(torch.int64, neutral=-1)
        self.long_breakers = Words(lanes)  # of several tokens
        self.matches = Matches(lanes, self._broken, self._reach)
        self._breakers: Tensor | None = None  # [L, V] bool: those of one token
        self._longest: Tensor | None = None  # [L, V] int32: a place to work in
        self._tables = native.Dry()  # all of these, for the kernels
        lanes.on_fork(self._fork)

    def admit(self, lane: int, request: Request) -> bool:
        params = request.params
        wanted = params.dry_multiplier > 0.0 and params.dry_penalty_last_n != 0
        self.multiplier[lane] = params.dry_multiplier if wanted else 0.0
        self.base[lane] = params.dry_base
        self.allowed[lane] = params.dry_allowed_length
        self.last_n[lane] = params.dry_penalty_last_n
        self.matches.start(lane, wanted=wanted)
        long = [ids for ids in request.dry_breaker_ids if len(ids) > 1] if wanted else []
        self.long_breakers.write(lane, long)
        if wanted:
            holding = self.lanes.vocabulary.holding(tuple(params.dry_sequence_breakers))
            if self._breakers is None:
                self._allocate(len(holding))
            self._breakers[lane] = holding  # type: ignore[index]
        return wanted

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        if self._breakers is None or self._longest is None:
            return logits  # no lane has ever wanted this
        self.matches.catch_up(rows)
        if (library := kernels(logits)) is not None:
            library.penalise_matches(logits, rows.lanes, rows.positions, self._tables)
            return logits
        ids = self.lanes.tokens[rows.lanes, : rows.max_len]
        lengths = (rows.positions + 1).unsqueeze(1)
        index = torch.arange(rows.max_len, device=ids.device)
        last_n, allowed = self.last_n.at(rows), self.allowed.at(rows)
        begin = torch.where(last_n < 0, 0, lengths - last_n).clamp(min=0)
        # A match that ends at i - 1 makes token i a candidate, and reaches back to `begin` at most.
        match = torch.zeros_like(ids)
        match[:, 1:] = self.matches.lengths[rows.lanes, : rows.max_len - 1].minimum(
            index[1:] - begin
        )
        match.masked_fill_((index >= lengths) | (index <= begin), 0)
        # Few places matter, but asking a GPU which would mean waiting for it.
        row, column = few_places(match >= allowed) if ids.is_cpu else all_places(match)
        token_ids, vocab_size = ids[row, column].long(), logits.shape[1]
        # The longest match of each token: of the table only the entries of these are touched.
        entry = row * vocab_size + token_ids
        table = self._longest.view(-1).index_fill_(0, entry, 0)
        longest = table.scatter_reduce_(0, entry, match[row, column], "amax")[entry]
        multiplier, base, allowed = (
            c.at(rows)[row, 0] for c in (self.multiplier, self.base, self.allowed)
        )
        extends = (longest >= allowed) & (multiplier > 0.0)
        extends &= ~self._breakers[rows.lanes[row], token_ids]
        # A power beyond float32 would be infinite; a base of 1 has none.
        exponent = (longest - allowed).float().minimum((_LARGEST_EXPONENT / base.log()).floor())
        scores = logits[row, token_ids]
        # However large, it is no ban: that could leave a row without any token.
        lowered = (scores - multiplier * base.pow(exponent)).clamp(
            min=torch.finfo(torch.float32).min
        )
        lowered = torch.where(extends & (scores > NEG_INF), lowered, scores)
        return logits.index_put_((row, token_ids), lowered)

    def _broken(self, host_lanes: list[int], lanes: Tensor, positions: Tensor) -> Tensor:
        """Where sequence breakers end at these positions [R], [R] bool."""
        assert self._breakers is not None
        new = self.lanes.tokens[lanes, positions].long()
        broken = self._breakers[lanes, new]
        if len(self.long_breakers):
            row, last, there = self.long_breakers.ending(
                host_lanes, positions, torch.zeros_like(positions)
            )
            done = there & (new[row] == last)
            broken.index_fill_(0, row[done], True)
        return broken

    def _reach(self, lane: int, length: int) -> int:
        """How many of a lane's first `length` tokens stand behind the last breaker."""
        assert self._breakers is not None
        tokens = self.lanes.tokens[lane, :length]
        breaks = self._breakers[lane][tokens.long()].cpu().numpy()
        ids = tokens.cpu().numpy()
        for word in self.long_breakers.of(lane):
            ends = np.flatnonzero(ids == word[-1])
            for back, token in enumerate(word[-2::-1], start=1):
                ends = ends[ends >= back]
                ends = ends[ids[ends - back] == token]
            breaks[ends] = True
        broken = np.flatnonzero(breaks)
        return length - 1 - int(broken[-1]) if broken.size else length

    def _allocate(self, vocab_size: int) -> None:
        size, device = self.lanes.num_lanes, self.lanes.device
        self._breakers = torch.zeros(size, vocab_size, dtype=torch.bool, device=device)
        self._longest = torch.zeros(size, vocab_size, dtype=torch.int32, device=device)
        self._tables = native.Dry(
            tokens=self.lanes.tokens.data_ptr(),
            matches=self.matches.lengths.data_ptr(),
            longest=self._longest.data_ptr(),
            breakers=self._breakers.data_ptr(),
            multiplier=self.multiplier.values.data_ptr(),
            base=self.base.values.data_ptr(),
            allowed=self.allowed.values.data_ptr(),
            last_n=self.last_n.values.data_ptr(),
            context=self.lanes.tokens.shape[1],
            vocab=vocab_size,
        )

    def _fork(self, parents: list[int], children: list[int]) -> None:
        if self._breakers is not None:
            self._breakers[children] = self._breakers[parents]


def few_places(where: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each True in a mask [R, C], [n] int64 both."""
    row, column = where.nonzero(as_tuple=True)
    return row, column


def all_places(like: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every entry, [R · C] int64 both."""
    index = torch.arange(like.numel(), device=like.device)
    return index // like.shape[1], index % like.shape[1]
