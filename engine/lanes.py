"""Lanes: where the per-sequence tensors of live sequences are.

A sequence holds one lane from admission to finish or preemption. A step gathers its rows from
lanes, so nothing moves when requests come and go.
"""

import logging
from collections.abc import Callable, Collection
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.numerics import integers
from engine.types import Rows
from engine.vocabulary import Vocabulary

log = logging.getLogger(__name__)

T = TypeVar("T")
J = TypeVar("J")

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


class PerLane(Generic[T, J]):
    """A value of any size for some lanes; a lane's copies share it, so it must not be changed.

    What the rows of a step hold is put together by `join`, from pairs of a row and its value, and
    kept until something changes: most steps have the rows of the one before. So reading costs what
    the rows hold, writing what is written, and a lane that was released nothing.
    """

    def __init__(self, join: Callable[[list[tuple[int, T]]], J]) -> None:
        self._join = join
        self._values: dict[int, T] = {}
        self._joined: tuple[list[int], J] | None = None  # of these lanes

    def get(self, lane: int) -> T | None:
        return self._values.get(lane)

    def values(self) -> Collection[T]:
        """Those of all lanes; of copies, the same one several times."""
        return self._values.values()

    def write(self, lane: int, value: T | None) -> None:
        """Replace the lane's value; None: it has none."""
        if value is not None:
            self._values[lane] = value
        elif self._values.pop(lane, None) is None:
            return
        self._joined = None

    def fork(self, parents: list[int], children: list[int]) -> None:
        for parent, child in zip(parents, children, strict=True):
            self.write(child, self._values.get(parent))

    def of(self, lanes: list[int]) -> J:
        """What some lanes hold, put together; rows count from 0."""
        if self._joined is None or self._joined[0] != lanes:
            held = [
                (row, self._values[lane]) for row, lane in enumerate(lanes) if lane in self._values
            ]
            self._joined = lanes, self._join(held)
        return self._joined[1]

    def __len__(self) -> int:
        return len(self._values)


class Entries(NamedTuple):
    """A lane's token ids [n] and values [n], and the collection they were read from."""

    source: Collection[int]
    token_ids: Tensor
    values: Tensor


class Ragged:
    """Entries per lane, any number: a token id each, and a value where the stage has values."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._dtype, self._device = dtype, device
        self.kept = PerLane(self._joined)

    def write(self, lane: int, token_ids: Collection[int], values: Collection[float] = ()) -> None:
        """Replace the lane's entries. Where another lane has the same collection, they share it."""
        if not token_ids:
            self.kept.write(lane, None)
            return
        same = (one for one in self.kept.values() if one.source is token_ids)
        entries = next(same, None)
        if entries is None:
            ids = torch.from_numpy(np.fromiter(token_ids, np.int64, len(token_ids)))
            numbers = torch.from_numpy(np.fromiter(values, np.float64, len(values)))
            on_device = ids.to(self._device), numbers.to(self._device, self._dtype)
            entries = Entries(token_ids, *on_device)
        self.kept.write(lane, entries)

    def at(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """The rows' entries: row [N] int64, token id [N] int64, value [N] where there are any."""
        return self.kept.of(rows.host_lanes)

    def _joined(self, held: list[tuple[int, Entries]]) -> tuple[Tensor, Tensor, Tensor]:
        if not held:
            none = torch.empty(0, dtype=torch.int64, device=self._device)
            return none, none, none.to(self._dtype)
        ids = torch.cat([entries.token_ids for _, entries in held])
        row = repeated([(row, len(entries.token_ids)) for row, entries in held], self._device)
        return row, ids, torch.cat([entries.values for _, entries in held])


def repeated(counts: list[tuple[int, int]], device: str) -> Tensor:
    """Each number as many times as it says beside it, [N] int64."""
    numbers, times = integers(list(zip(*counts, strict=True)), device).unbind()
    return numbers.repeat_interleave(times, output_size=sum(count for _, count in counts))


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
        self._kept: list[PerLane[Any, Any]] = []
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

    def ragged(self, dtype: torch.dtype = torch.float32) -> Ragged:
        """A new list per lane; a fork copies it."""
        ragged = Ragged(dtype, self.device)
        self.keep(ragged.kept)
        return ragged

    def keep(self, values: PerLane[Any, Any]) -> None:
        """Have these forked with their lanes, and forgotten when one is released."""
        self._forks.append(values.fork)
        self._kept.append(values)

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

    def states(self) -> list[Tensor]:
        """A copy of all lanes' states, [L] each."""
        return [column.values.clone() for column in self._states]

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
        """Take a lane back, and forget what takes memory of its own there.

        Whoever gets the lane next has everything there written anew, so nothing that fails here
        can matter to anybody.
        """
        self.free.append(lane)
        for values in self._kept:
            try:
                values.write(lane, None)
            except Exception:
                log.exception("something of lane %d could not be forgotten", lane)

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
