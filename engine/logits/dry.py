"""DRY, "don't repeat yourself": Weidmann et al., 2026, arXiv:2608.22761."""

import numpy as np
import torch
from torch import Tensor

from engine.kernels import native
from engine.lanes import Lanes
from engine.logits.history import ANY, ends_with
from engine.logits.stage import Transform
from engine.numerics import NEG_INF, kernels
from engine.types import Request, Rows

_UNKNOWN = -1  # of a lane that was given to another sequence
_LARGEST_EXPONENT = 88.72283905206835  # e to this is the largest float32


class Dry(Transform):
    """Make it less likely that a repetition of earlier text goes on.

    A token that would extend a match of m ≥ `dry_allowed_length` tokens between the end of the
    context and an earlier place loses multiplier · base^(m - allowed length); of several matches
    the longest counts. No match crosses a sequence breaker, and a breaker of one token loses
    nothing. A token whose text holds a breaker is one.

    For each lane, how long a match ends at each position is kept: when a token is appended, those
    at the same tokens grow by one and the others are over.
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
        self.long_breakers = lanes.ragged(torch.int64, pad=ANY)  # of several tokens
        self._breakers: Tensor | None = None  # [L, V] bool: those of one token
        self._matches: Tensor | None = None  # [L, C] int32
        self._longest: Tensor | None = None  # [L, V] int32: a place to work in
        self._tables = native.Dry()  # all of these, for the kernels
        self._active = lanes.flags()
        self._covered = np.full(lanes.num_lanes, _UNKNOWN)
        lanes.on_fork(self._fork)

    def admit(self, lane: int, request: Request) -> bool:
        params = request.params
        wanted = params.dry_multiplier > 0.0 and params.dry_penalty_last_n != 0
        self.multiplier[lane] = params.dry_multiplier if wanted else 0.0
        self._active[lane] = wanted
        self.base[lane] = params.dry_base
        self.allowed[lane] = params.dry_allowed_length
        self.last_n[lane] = params.dry_penalty_last_n
        self._covered[lane] = _UNKNOWN
        long = [ids for ids in request.dry_breaker_ids if len(ids) > 1] if wanted else []
        self.long_breakers.write(lane, [ids[-1] for ids in long], [list(i[:-1]) for i in long])
        if wanted:
            holding = self.lanes.vocabulary.holding(tuple(params.dry_sequence_breakers))
            if self._breakers is None:
                self._allocate(len(holding))
            self._breakers[lane] = holding  # type: ignore[index]
        return wanted

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        if self._matches is None or self._breakers is None or self._longest is None:
            return logits  # no lane has ever wanted this
        self._catch_up(rows)
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
        match[:, 1:] = self._matches[rows.lanes, : rows.max_len - 1].minimum(index[1:] - begin)
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

    def _catch_up(self, rows: Rows) -> None:
        lanes, ends = np.asarray(rows.host_lanes), np.asarray(rows.host_positions) + 1
        wanting = self._active[lanes]
        for row in np.flatnonzero(wanting & (self._covered[lanes] == _UNKNOWN)).tolist():
            self._recount(rows.host_lanes[row], rows.host_positions[row])
        covered = self._covered[lanes]
        while (behind := np.flatnonzero(wanting & (covered < ends))).size:
            index = torch.from_numpy(behind).to(self.lanes.device)
            at = torch.from_numpy(covered[behind]).to(self.lanes.device)
            self._append(rows.lanes[index], at, int(covered[behind].max()))
            covered[behind] += 1
        self._covered[lanes[wanting]] = ends[wanting]

    def _append(self, lanes: Tensor, positions: Tensor, last: int) -> None:
        """Take in the tokens at `positions` [R], at most `last`, of some lanes."""
        assert self._matches is not None
        assert self._breakers is not None
        broken = self._broken(lanes, positions) if len(self.long_breakers.lanes) else None
        if lanes.is_cpu and (library := native.LIBRARY) is not None:
            library.extend_matches(self._tables, lanes, positions, broken)
            return
        tokens = self.lanes.tokens[lanes, : last + 1]
        new = tokens.gather(1, positions.unsqueeze(1))
        breaks = self._breakers[lanes, new.squeeze(1).long()]
        if broken is not None:
            breaks |= broken
        before = torch.nn.functional.pad(self._matches[lanes, :last], (1, 0))
        index = torch.arange(last + 1, device=tokens.device)
        goes_on = (tokens == new) & (index < positions.unsqueeze(1)) & ~breaks.unsqueeze(1)
        self._matches[lanes, : last + 1] = torch.where(goes_on, before + 1, 0)

    def _broken(self, lanes: Tensor, positions: Tensor) -> Tensor:
        """Where sequence breakers of several tokens end at these positions [R], [R] bool."""
        new = self.lanes.tokens[lanes, positions]
        row, final, leading = self.long_breakers.of(lanes)
        begins = torch.zeros_like(row)
        done = ends_with(self.lanes, lanes[row], positions[row], leading, begins)
        done &= new[row] == final
        return torch.zeros_like(new, dtype=torch.bool).index_fill_(0, row[done], True)

    def _recount(self, lane: int, position: int) -> None:
        """Find the matches of what a lane began with, but not of what came after `position`."""
        assert self._matches is not None
        assert self._breakers is not None
        length = min(self.lanes.lengths[lane], position + 1)
        tokens = self.lanes.tokens[lane, :length]
        breaks = self._breakers[lane][tokens.long()].cpu().numpy()
        ids = tokens.cpu().numpy()
        mine = self.long_breakers.lanes == lane
        for last, leading in zip(
            self.long_breakers.token_ids[mine].tolist(),
            self.long_breakers.values[mine].tolist(),
            strict=True,
        ):
            word = [token for token in leading if token != ANY] + [last]
            if len(word) <= length:
                windows = np.lib.stride_tricks.sliding_window_view(ids, len(word))
                breaks[len(word) - 1 :] |= (windows == word).all(1)
        broken = np.flatnonzero(breaks)
        reach = length - 1 - int(broken[-1]) if broken.size else length
        matches = np.zeros(length, dtype=np.int32)
        ends = np.arange(length - 1)
        for back in range(reach):
            ends = ends[ends >= back]
            ends = ends[ids[ends - back] == ids[length - 1 - back]]
            if not ends.size:
                break
            matches[ends] += 1
        self._matches[lane] = 0
        self._matches[lane, :length] = torch.from_numpy(matches)
        self._covered[lane] = length

    def _allocate(self, vocab_size: int) -> None:
        size, device = self.lanes.num_lanes, self.lanes.device
        self._breakers = torch.zeros(size, vocab_size, dtype=torch.bool, device=device)
        self._matches = torch.zeros_like(self.lanes.tokens)
        self._longest = torch.zeros(size, vocab_size, dtype=torch.int32, device=device)
        self._tables = native.Dry(
            tokens=self.lanes.tokens.data_ptr(),
            matches=self._matches.data_ptr(),
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
        self._covered[children] = self._covered[parents]
        if self._matches is not None and self._breakers is not None:
            self._matches[children] = self._matches[parents]
            self._breakers[children] = self._breakers[parents]


def few_places(where: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each True in a mask [R, C], [n] int64 both."""
    row, column = where.nonzero(as_tuple=True)
    return row, column


def all_places(like: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every entry, [R · C] int64 both."""
    index = torch.arange(like.numel(), device=like.device)
    return index // like.shape[1], index % like.shape[1]
