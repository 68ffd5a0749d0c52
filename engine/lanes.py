"""Lanes: where the per-sequence tensors of live sequences are.

A sequence holds one lane from admission to finish or preemption. A step gathers its rows from
lanes, so nothing moves when requests come and go.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engine.numerics import integers
from engine.types import Rows
from engine.vocabulary import Vocabulary

_COLUMNS = 32  # stand together in a tensor, so that a fork copies all of them at once
Fork = Callable[[list[int], list[int]], None]  # from parents' lanes to their children's


class Column:
    """One value per lane, [L], for one parameter of one stage."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __setitem__(self, lane: int, value: float) -> None:
        """Write a lane's value; one too large for the column's type counts as the largest."""
        if self.values.is_floating_point():
            largest = torch.finfo(self.values.dtype).max
            value = min(max(value, -largest), largest)
        self.values[lane] = value

    def at(self, rows: Rows) -> Tensor:
        """The rows' values, [R, 1], so that they broadcast over the vocabulary."""
        return self.values[rows.lanes].unsqueeze(1)


class Ragged:
    """Entries per lane, any number: a token id and a vector of values each.

    All lanes' entries are in one flat pair of tensors, `token_ids` [N] and `values` [N, W]; the
    vectors are padded on the left to the widest. Writing a lane costs time proportional to all
    entries, reading is a few tensor operations: such lists are admitted far less often than they
    are stepped.
    """

    def __init__(self, num_lanes: int, dtype: torch.dtype, pad: float, device: str) -> None:
        self.num_lanes = num_lanes
        self.pad = pad
        self.lanes = torch.empty(0, dtype=torch.int64, device=device)
        self.token_ids = torch.empty(0, dtype=torch.int64, device=device)
        self.values = torch.empty(0, 0, dtype=dtype, device=device)

    def write(
        self, lane: int, token_ids: list[int], values: list[list[float]] | None = None
    ) -> None:
        """Replace the lane's entries."""
        others = self.lanes != lane
        if not token_ids and bool(others.all()):
            return
        device, dtype = self.values.device, self.values.dtype
        rows = values if values is not None else [[] for _ in token_ids]
        width = max([len(row) for row in rows] + [self.values.shape[1]])
        padded = [[self.pad] * (width - len(row)) + row for row in rows]
        added = torch.tensor(padded, dtype=dtype, device=device).reshape(len(rows), width)
        kept = F.pad(self.values[others], (width - self.values.shape[1], 0), value=self.pad)
        ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
        self.lanes = torch.cat((self.lanes[others], torch.full_like(ids, lane)))
        self.token_ids = torch.cat((self.token_ids[others], ids))
        self.values = torch.cat((kept, added))

    def at(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """The rows' entries: row [N], token id [N], values [N, W]."""
        return self.of(rows.lanes)

    def of(self, lanes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of lanes [R], as `at`."""
        row_of_lane = torch.full((self.num_lanes,), -1, device=self.lanes.device)
        row_of_lane[lanes] = torch.arange(len(lanes), device=self.lanes.device)
        row = row_of_lane[self.lanes]
        wanted = row >= 0
        return row[wanted], self.token_ids[wanted], self.values[wanted]

    def fork(self, parents: list[int], children: list[int]) -> None:
        if not len(self.lanes):
            return
        for parent, child in zip(parents, children, strict=True):
            mine = self.lanes == parent
            self.write(child, self.token_ids[mine].tolist(), self.values[mine].tolist())


class Lanes:
    """Which lanes are taken, the token history of each, and the stages' columns.

    `tokens` [L, C] int32 holds prompt and output, `prompt_lengths` and `seeds` [L] int64 what
    they say; `lengths` on the host is how many tokens a lane began with. Written by the scheduler
    only: on admission, fork and append. `vocabulary` is for stages that look at texts.
    """

    def __init__(
        self,
        num_lanes: int,
        context_len: int,
        device: str = "cpu",
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.num_lanes = num_lanes
        self.device = device
        self.vocabulary = vocabulary or Vocabulary(lambda: ())
        self.lengths = [0] * num_lanes
        self.free = list(range(num_lanes - 1, -1, -1))
        self.tokens = torch.zeros(num_lanes, context_len, dtype=torch.int32, device=device)
        self.prompt_lengths = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        self._forks: list[Fork] = []
        self._tables: dict[torch.dtype, tuple[Tensor, int]] = {}  # of columns, and how many it has
        self._states: list[Column] = []

    def column(self, dtype: torch.dtype, neutral: float) -> Column:
        """A new value per lane; a fork copies it."""
        table, used = self._tables.get(dtype, (torch.empty(0), 0))
        if used == len(table):
            table, used = torch.empty(_COLUMNS, self.num_lanes, dtype=dtype, device=self.device), 0

            def copy(parents: list[int], children: list[int]) -> None:
                table[:, children] = table[:, parents]

            self._forks.append(copy)
        self._tables[dtype] = table, used + 1
        table[used] = neutral
        return Column(table[used])

    def ragged(self, dtype: torch.dtype = torch.float32, pad: float = 0.0) -> Ragged:
        """A new list per lane; a fork copies it."""
        ragged = Ragged(self.num_lanes, dtype, pad, self.device)
        self._forks.append(ragged.fork)
        return ragged

    def flags(self) -> NDArray[np.bool_]:
        """A new yes or no per lane, on the host; a fork copies it."""
        flags = np.zeros(self.num_lanes, dtype=bool)

        def copy(parents: list[int], children: list[int]) -> None:
            flags[children] = flags[parents]

        self._forks.append(copy)
        return flags

    def on_fork(self, copy: Fork) -> None:
        """Have `copy(parents, children)` called when lanes are forked."""
        self._forks.append(copy)

    def state(self, dtype: torch.dtype, neutral: float) -> Column:
        """A column that a stage changes as tokens are drawn: it outlives a preemption."""
        column = self.column(dtype, neutral)
        self._states.append(column)
        return column

    def save(self, lane: int) -> list[float]:
        """What `restore` needs to give a sequence its state back in another lane."""
        return [float(column.values[lane]) for column in self._states]

    def restore(self, lane: int, state: list[float]) -> None:
        """After `write`, and after the stages have admitted the sequence."""
        for column, value in zip(self._states, state, strict=True):
            column[lane] = value

    def take(self) -> int:
        """A free lane. What stages keep there is the last owner's until they admit a new one."""
        return self.free.pop()

    def release(self, lane: int) -> None:
        self.free.append(lane)

    def write(self, lane: int, token_ids: list[int], prompt_len: int, seed: int) -> None:
        """Start a lane with a sequence's history."""
        self.tokens[lane, : len(token_ids)] = torch.tensor(token_ids, dtype=torch.int32)
        self.prompt_lengths[lane] = prompt_len
        self.seeds[lane] = seed
        self.lengths[lane] = len(token_ids)

    def append(self, lanes: list[int], positions: list[int], token_ids: list[int]) -> None:
        """Add tokens to several lanes' histories, in one write."""
        if lanes and self.device == "cpu":
            self.tokens.numpy()[lanes, positions] = token_ids  # in a quarter of torch's time
        elif lanes:
            at = integers([lanes, positions, token_ids], self.device)
            self.tokens[at[0], at[1]] = at[2].to(torch.int32)

    def fork(self, parents: list[int], children: list[int]) -> None:
        """Make each of `children` (already taken, and different) a copy of its parent.

        Columns and lists are copied too. No parent is a child.
        """
        self.tokens[children] = self.tokens[parents]
        self.prompt_lengths[children] = self.prompt_lengths[parents]
        self.seeds[children] = self.seeds[parents]
        for parent, child in zip(parents, children, strict=True):
            self.lengths[child] = self.lengths[parent]
        for copy in self._forks:
            copy(parents, children)
