"""Sequences of tokens for each lane, to be found at the end of its history."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from engine.lanes import Lanes, PerLane, repeated
from engine.numerics import integers
from engine.types import Rows


@dataclass(frozen=True, slots=True)
class _Words:
    """Words of n tokens or more: the last of each, and all those before it in one list [m].

    For each of these: which word it is of, and how far it stands before the word's last token.
    """

    source: Collection[tuple[int, ...]]
    last: Tensor  # [n] int64
    counts: Tensor  # [n] int64: how many tokens are before the last
    leading: Tensor  # [m] int64
    word: Tensor  # [m] int64
    distance: Tensor  # [m] int64


@dataclass(frozen=True, slots=True)
class _Joined:
    """Those of several rows, and whose each word and each token is."""

    words: _Words
    row: Tensor  # [n] int64
    leading_row: Tensor  # [m] int64


class Words:
    """Words per lane, any number, of any length: what they cost is their tokens together."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self._kept: PerLane[_Words, _Joined] = PerLane(self._join)
        lanes.keep(self._kept)

    def __len__(self) -> int:
        """How many lanes have words."""
        return len(self._kept)

    def write(self, lane: int, words: Collection[tuple[int, ...]]) -> None:
        """Replace the lane's words. Where another lane has the same collection, they share it."""
        if not words:
            self._kept.write(lane, None)
            return
        same = (one for one in self._kept.values() if one.source is words)
        self._kept.write(lane, next(same, None) or self._read(words))

    def of(self, lane: int) -> Collection[tuple[int, ...]]:
        """What was written for a lane."""
        kept = self._kept.get(lane)
        return () if kept is None else kept.source

    def ending(
        self, lanes: list[int], ends: Tensor, begins: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The words of some lanes: row [n], last token [n], and is all before it there? [n] bool.

        Those before it must be the lane's tokens up to (not including) index `ends` [R], none of
        them before `begins` [R]. All int64.
        """
        joined = self._kept.of(lanes)
        words, its = joined.words, joined.leading_row
        index = ends[its] - words.distance
        lane = integers(lanes, self.lanes.device)[its]
        held = self.lanes.tokens[lane, index.clamp(min=0)]
        there = (held == words.leading) & (index >= begins[its])
        found = torch.zeros_like(words.counts).index_add_(0, words.word, there.long())
        return joined.row, words.last, found == words.counts

    def at(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """As `ending`: which token each row must not get next to complete a word of its output."""
        begins = self.lanes.prompt_lengths[rows.lanes]
        return self.ending(rows.host_lanes, rows.positions + 1, begins)

    def _read(self, words: Collection[tuple[int, ...]]) -> _Words:
        counts = np.fromiter((len(word) - 1 for word in words), np.int64, len(words))
        total = int(counts.sum())
        leading = np.fromiter(chain.from_iterable(word[:-1] for word in words), np.int64, total)
        word = np.repeat(np.arange(len(words)), counts)
        # The first token of a word of n stands n - 1 before the last, the next one n - 2, ...
        distance = counts.cumsum()[word] - np.arange(total)
        last = np.fromiter((word[-1] for word in words), np.int64, len(words))
        tensors = (last, counts, leading, word, distance)
        return _Words(words, *(torch.from_numpy(one).to(self.lanes.device) for one in tensors))

    def _join(self, held: list[tuple[int, _Words]]) -> _Joined:
        if not held:
            none = torch.empty(0, dtype=torch.int64, device=self.lanes.device)
            return _Joined(_Words((), none, none, none, none, none), none, none)
        before, shifted = 0, []
        for _, words in held:
            shifted.append(words.word + before)
            before += len(words.last)
        all_of = _Words(
            (),
            torch.cat([words.last for _, words in held]),
            torch.cat([words.counts for _, words in held]),
            torch.cat([words.leading for _, words in held]),
            torch.cat(shifted),
            torch.cat([words.distance for _, words in held]),
        )
        device = self.lanes.device
        return _Joined(
            all_of,
            repeated([(row, len(words.last)) for row, words in held], device),
            repeated([(row, len(words.leading)) for row, words in held], device),
        )
