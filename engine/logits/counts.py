"""How often each lane's tokens occur, kept up as they come."""

import numpy as np
import torch
from torch import Tensor

from engine.kernels import native
from engine.lanes import Lanes
from engine.types import Rows

_UNKNOWN = -1  # of a lane that was given to another sequence: nothing is counted yet


class TokenCounts:
    """Counts of each lane's tokens inside a window of the latest ones, in all and generated.

    A lane's distinct tokens stand in `ids` [L, C] in the order of their first occurrence, with
    their counts beside them; `slots` [L, V] says where a token stands. A step adds one token to
    each of its rows, and takes away the one that leaves the window, whatever the context length.
    Memory comes with the first lane that counts.
    """

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.windows = lanes.column(torch.int64, neutral=-1)
        self._covered = np.full(lanes.num_lanes, _UNKNOWN)
        self._slots: Tensor | None = None  # int32, 1 more than the place in `ids`; 0: not there
        self.tables = native.Counts()  # all of these, for the kernels
        lanes.on_fork(self._fork)

    def start(self, lane: int, window: int) -> None:
        """A lane has a new owner, whose latest `window` tokens count; -1: all."""
        self.windows[lane] = window
        self._covered[lane] = _UNKNOWN

    def at(self, rows: Rows, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows' distinct tokens, how often they occur, and how often generated: [R, U] each.

        A row with fewer distinct tokens repeats its first one, with the same counts.
        """
        self.catch_up(rows, vocab_size)
        lanes, sizes = rows.lanes.unsqueeze(1), self._sizes[rows.lanes].unsqueeze(1)
        # Asking a GPU for the largest would mean waiting for it.
        width = int(sizes.max()) if sizes.is_cpu else rows.max_len
        place = torch.arange(width, device=sizes.device).expand(len(rows), -1)
        place = torch.where(place < sizes, place, 0)
        ids = self._ids[lanes, place].long()
        return ids, self._seen[lanes, place], self._generated[lanes, place]

    def catch_up(self, rows: Rows, vocab_size: int) -> None:
        """Count what the rows' lanes hold by now."""
        if self._slots is None:
            self._allocate(vocab_size)
        covered = self._covered[rows.host_lanes]
        for row in np.flatnonzero(covered == _UNKNOWN).tolist():
            self._recount(rows.host_lanes[row], rows.host_positions[row])
        covered = self._covered[rows.host_lanes]
        ends = np.asarray(rows.host_positions) + 1
        while (behind := np.flatnonzero(covered < ends)).size:
            index = torch.from_numpy(behind).to(self.lanes.device)
            at = torch.from_numpy(covered[behind]).to(self.lanes.device)
            self._append(rows.lanes[index], at)
            covered[behind] += 1
        self._covered[rows.host_lanes] = ends

    def _append(self, lanes: Tensor, positions: Tensor) -> None:
        """Count one more token of each of these lanes [R], and one less where one leaves."""
        if lanes.is_cpu and (library := native.LIBRARY) is not None:
            library.count_tokens(self.tables, lanes, positions)
            return
        self._add(lanes, positions, torch.ones_like(positions))
        windows = self.windows.values[lanes]
        leaving = positions - windows
        leaves = (windows >= 0) & (leaving >= 0)
        self._add(lanes, leaving.clamp(min=0), -leaves.long())

    def _add(self, lanes: Tensor, positions: Tensor, amounts: Tensor) -> None:
        assert self._slots is not None
        tokens = self.lanes.tokens[lanes, positions].long()
        places = self._slots[lanes, tokens].long()
        fresh = (places == 0) & (amounts > 0)
        places = torch.where(fresh, self._sizes[lanes] + 1, places)
        self._sizes[lanes] += fresh
        self._slots[lanes, tokens] = places.int()
        places = (places - 1).clamp(min=0)
        self._ids[lanes, places] = torch.where(fresh, tokens.int(), self._ids[lanes, places])
        self._seen[lanes, places] += amounts.int()
        generated = positions >= self.lanes.prompt_lengths[lanes]
        self._generated[lanes, places] += (amounts * generated).int()

    def _recount(self, lane: int, position: int) -> None:
        """Count what a lane began with, but not what came after `position`."""
        assert self._slots is not None
        length = min(self.lanes.lengths[lane], position + 1)
        tokens = self.lanes.tokens[lane, :length].long()
        window = int(self.windows.values[lane])
        begin = 0 if window < 0 else max(length - window, 0)
        ids, place = tokens.unique(return_inverse=True)
        index = torch.arange(length, device=tokens.device)
        inside = index >= begin
        generated = inside & (index >= self.lanes.prompt_lengths[lane])
        size = len(ids)
        self._slots[lane] = 0
        self._slots[lane, ids] = torch.arange(1, size + 1, dtype=torch.int32, device=ids.device)
        self._ids[lane, :size] = ids.int()
        self._seen[lane] = 0
        self._generated[lane] = 0
        self._seen[lane].scatter_add_(0, place, inside.int())
        self._generated[lane].scatter_add_(0, place, generated.int())
        self._sizes[lane] = size
        self._covered[lane] = length

    def _allocate(self, vocab_size: int) -> None:
        num_lanes, context_len = self.lanes.tokens.shape
        device = self.lanes.device
        self._slots = torch.zeros(num_lanes, vocab_size, dtype=torch.int32, device=device)
        self._ids = torch.zeros(num_lanes, context_len, dtype=torch.int32, device=device)
        self._seen = torch.zeros_like(self._ids)
        self._generated = torch.zeros_like(self._ids)
        self._sizes = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        self.tables = native.Counts(
            tokens=self.lanes.tokens.data_ptr(),
            prompt_lengths=self.lanes.prompt_lengths.data_ptr(),
            windows=self.windows.values.data_ptr(),
            slots=self._slots.data_ptr(),
            ids=self._ids.data_ptr(),
            seen=self._seen.data_ptr(),
            generated=self._generated.data_ptr(),
            sizes=self._sizes.data_ptr(),
            context=context_len,
            vocab=vocab_size,
        )

    def _fork(self, parents: list[int], children: list[int]) -> None:
        self._covered[children] = self._covered[parents]
        known = np.flatnonzero(self._covered[parents] != _UNKNOWN)
        if self._slots is not None and known.size:
            sources, targets = np.asarray(parents)[known], np.asarray(children)[known]
            for table in (self._slots, self._ids, self._seen, self._generated, self._sizes):
                table[targets] = table[sources]
