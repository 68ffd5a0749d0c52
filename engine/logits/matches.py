"""How long the end of each lane's history has stood elsewhere in it before."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.kernels import native
from engine.lanes import Lanes
from engine.types import Rows

_UNKNOWN = -1  # of a lane that was given to another sequence

# Of the tokens of some lanes at these positions [R]: which end all matches, [R] bool; None: none.
Breaks = Callable[[list[int], Tensor, Tensor], Tensor | None]
# How far back from the end of a lane's first tokens, of which there are so many, none does.
Reach = Callable[[int, int], int]


class Matches:
    """For each position of a history, how many tokens up to it are those at its end.

    Of the lanes that want it, kept up as tokens come: those at tokens like the new one grow by one,
    all others are over. So a token costs time proportional to the history, however much of it is
    repeated. Memory comes with the first lane that wants it.
    """

    def __init__(
        self, lanes: Lanes, breaks: Breaks | None = None, reach: Reach | None = None
    ) -> None:
        """No match goes on where `breaks` says so, or further back than `reach`."""
        self.lanes = lanes
        self._breaks = breaks
        self._reach = reach
        self._lengths: Tensor | None = None  # [L, C] int32
        self._tables = native.Matches()  # the same, for the kernels
        self._wanting = lanes.flags()
        self._covered = np.full(lanes.num_lanes, _UNKNOWN)
        lanes.on_fork(self._fork)

    def start(self, lane: int, *, wanted: bool) -> None:
        """A lane has a new owner."""
        self._wanting[lane] = wanted
        self._covered[lane] = _UNKNOWN

    @property
    def lengths(self) -> Tensor:
        """[L, C] int32; a lane that does not want it holds anything."""
        if self._lengths is None:
            self._lengths = torch.zeros_like(self.lanes.tokens)
            self._tables = native.Matches(
                tokens=self.lanes.tokens.data_ptr(),
                lengths=self._lengths.data_ptr(),
                context=self._lengths.shape[1],
            )
        return self._lengths

    def catch_up(self, rows: Rows) -> None:
        """Take in what the rows' lanes hold by now."""
        lanes, ends = np.asarray(rows.host_lanes), np.asarray(rows.host_positions) + 1
        wanting = self._wanting[lanes]
        for row in np.flatnonzero(wanting & (self._covered[lanes] == _UNKNOWN)).tolist():
            self._recount(rows.host_lanes[row], rows.host_positions[row])
        covered = self._covered[lanes]
        while (behind := np.flatnonzero(wanting & (covered < ends))).size:
            index = torch.from_numpy(behind).to(self.lanes.device)
            at = torch.from_numpy(covered[behind]).to(self.lanes.device)
            broken = None
            if self._breaks is not None:
                broken = self._breaks(lanes[behind].tolist(), rows.lanes[index], at)
            self._append(rows.lanes[index], at, int(covered[behind].max()), broken)
            covered[behind] += 1
        self._covered[lanes[wanting]] = ends[wanting]

    def _append(self, lanes: Tensor, positions: Tensor, last: int, broken: Tensor | None) -> None:
        """Take in the tokens at `positions` [R], at most `last`, of some lanes."""
        lengths = self.lengths
        if lanes.is_cpu and (library := native.LIBRARY) is not None:
            library.extend_matches(self._tables, lanes, positions, broken)
            return
        tokens = self.lanes.tokens[lanes, : last + 1]
        new = tokens.gather(1, positions.unsqueeze(1))
        before = torch.nn.functional.pad(lengths[lanes, :last], (1, 0))
        index = torch.arange(last + 1, device=tokens.device)
        goes_on = (tokens == new) & (index < positions.unsqueeze(1))
        if broken is not None:
            goes_on &= ~broken.unsqueeze(1)
        lengths[lanes, : last + 1] = torch.where(goes_on, before + 1, 0)

    def _recount(self, lane: int, position: int) -> None:
        """Find the matches of what a lane began with, but not of what came after `position`."""
        lengths = self.lengths
        length = min(self.lanes.lengths[lane], position + 1)
        reach = length if self._reach is None else self._reach(lane, length)
        if lengths.is_cpu and (library := native.LIBRARY) is not None:
            library.find_matches(self._tables, lane, length, reach)
        else:
            found = matches_of(self.lanes.tokens[lane, :length].tolist())
            lengths[lane, :length] = torch.tensor(found, dtype=torch.int32).clamp_(max=reach)
        lengths[lane, length:] = 0
        self._covered[lane] = length

    def _fork(self, parents: list[int], children: list[int]) -> None:
        self._wanting[children] = self._wanting[parents]
        self._covered[children] = self._covered[parents]
        if self._lengths is not None:
            self._lengths[children] = self._lengths[parents]


def matches_of(tokens: list[int]) -> list[int]:
    """How many tokens up to each position are those at the end; 0 for the end itself.

    The Z function of the tokens backwards, in time proportional to their number.
    """
    backwards = tokens[::-1]
    count = len(backwards)
    found = [0] * count
    begin = end = 0  # the match that goes back farthest covers places [begin, end)
    for at in range(1, count):
        size = min(found[at - begin], end - at) if at < end else 0
        while at + size < count and backwards[size] == backwards[at + size]:
            size += 1
        found[at] = size
        if at + size > end:
            begin, end = at, at + size
    return found[::-1]
