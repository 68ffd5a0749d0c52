"""Run on each row the stages it wants, all rows in one pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter, Stage, Transform
from engine.messages import Request
from engine.numerics import NEG_INF, pick, scan
from engine.types import Rows

Kind = TypeVar("Kind", bound=Stage)


@dataclass(frozen=True, slots=True)
class Filtered:
    """Some rows after their filters, `subset` of those given; None: all of them."""

    subset: list[int] | None
    rows: Rows
    candidates: Candidates


class Pipeline:
    """The stages and which lanes want them.

    First transforms, on the logits of the rows that want any of them; other rows cost nothing and
    cannot change. Then, for sampled rows, temperature and filters, on their candidates. A stage
    runs if one of the rows wants it. All this is decided on the host.

    `orders` are other orders of the filters, by the name that a request gives as `sampler_order`.
    """

    def __init__(
        self,
        stages: Sequence[type[Stage]],
        lanes: Lanes,
        orders: Mapping[str, Sequence[type[Stage]]] | None = None,
    ) -> None:
        self.stages = [stage(lanes) for stage in stages]
        self.wanted = [0] * lanes.num_lanes  # by each lane: bit i is set for stage i
        self.transforms = [i for i, stage in enumerate(self.stages) if isinstance(stage, Transform)]
        self._any_transform = sum(1 << index for index in self.transforms)
        filters = [i for i, stage in enumerate(self.stages) if isinstance(stage, Filter)]
        self.observers = [index for index in filters if _observes(stages[index])]
        self.orders = [filters]
        self._order_names: list[str | None] = [None]
        for name, order in (orders or {}).items():
            self._order_names.append(name)
            self.orders.append([stages.index(stage) for stage in order])
        self._order_of = np.zeros(lanes.num_lanes, dtype=np.int64)

    def admit(self, lane: int, request: Request) -> None:
        """Give every stage the lane's parameters."""
        self.wanted[lane] = 0
        for index, stage in enumerate(self.stages):
            wanted = stage.admit(lane, request)
            skipped = isinstance(stage, Filter) and request.params.greedy
            self.wanted[lane] |= (wanted and not skipped) << index
        name = request.params.sampler_order
        self._order_of[lane] = self._order_names.index(name) if name in self._order_names else 0

    def fork(self, parents: list[int], children: list[int]) -> None:
        for parent, child in zip(parents, children, strict=True):
            self.wanted[child] = self.wanted[parent]
        self._order_of[children] = self._order_of[parents]

    def transform(self, logits: Tensor, rows: Rows, *, in_place: bool = False) -> Tensor:
        """Biases, penalties and bans over logits [R, V] float32, only read if not `in_place`.

        A row that comes out all -inf has no valid token.
        """
        subset = self.transformed(rows)
        if not subset:
            return logits
        stages = self._wanted_of(self.transforms, rows)
        if len(subset) == len(rows):
            return run_transforms(stages, logits, rows, in_place=in_place)
        index = torch.tensor(subset, dtype=torch.int64, device=logits.device)
        part = run_transforms(stages, logits, rows.select(subset, index), index)
        changed = logits if in_place else logits.clone()
        return changed.index_copy_(0, index, part)

    def transformed(self, rows: Rows) -> list[int]:
        """Which rows any transform may change."""
        lanes = enumerate(rows.host_lanes)
        return [row for row, lane in lanes if self.wanted[lane] & self._any_transform]

    def filter(self, logits: Tensor, rows: Rows, index: Tensor | None = None) -> list[Filtered]:
        """Temperature and filters over sampled rows, each with a finite entry.

        They are the rows `index` [R] of the logits; None: all.

        Rows of equal order share a pass. Rows whose filters had to see more candidates come again,
        and what comes later counts.
        """
        order_of = self._order_of[rows.host_lanes]
        present: list[int] = np.unique(order_of).tolist()
        if len(present) == 1:
            return self._filter(present[0], logits, rows, index)
        parts: list[Filtered] = []
        for order in present:
            subset: list[int] = np.flatnonzero(order_of == order).tolist()
            its = torch.tensor(subset, device=logits.device)
            where = its if index is None else index[its]
            for part in self._filter(order, logits, rows.select(subset, its), where):
                inner = subset if part.subset is None else [subset[i] for i in part.subset]
                parts.append(Filtered(inner, part.rows, part.candidates))
        return parts

    def _filter(
        self, order: int, logits: Tensor, rows: Rows, index: Tensor | None
    ) -> list[Filtered]:
        def wanted(some: Rows) -> list[Stage]:
            return self._wanted_of(self.orders[order], some)

        return run_filters(wanted(rows), logits, rows, wanted, index)

    def stage(self, kind: type[Kind]) -> Kind:
        """The stage of a kind, of which there must be one."""
        (its,) = (stage for stage in self.stages if isinstance(stage, kind))
        return its

    def stages_of(self, lane: int) -> tuple[list[Stage], list[Stage]]:
        """The transforms and the filters that a lane wants, in its order."""
        wanted, order = self.wanted[lane], self.orders[self._order_of[lane]]
        return self._some(self.transforms, wanted), self._some(order, wanted)

    def observe(self, part: Filtered, tokens: Tensor) -> None:
        """Tell the filters that want to know which tokens [R] were drawn."""
        for stage in self._wanted_of(self.observers, part.rows):
            assert isinstance(stage, Filter)
            stage.observe(part.candidates, part.rows, tokens)

    def _wanted_of(self, order: Sequence[int], rows: Rows) -> list[Stage]:
        return self._some(order, reduce(or_, (self.wanted[lane] for lane in rows.host_lanes)))

    def _some(self, order: Sequence[int], wanted: int) -> list[Stage]:
        return [self.stages[index] for index in order if wanted >> index & 1]


def run_transforms(
    stages: Sequence[Stage],
    given: Tensor,
    rows: Rows,
    index: Tensor | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """Run transforms in order on the rows of `given` [N, V]; [R, V].

    With an `index` [R] on those rows of it. What is given is only read, unless all its rows may be
    changed `in_place`. Where nothing is left, they run again without the soft bans, lifted last
    first.
    """
    soft = [stage for stage in stages if isinstance(stage, Transform) and stage.soft_ban]
    if index is not None:
        logits = pick(given, index)
    else:
        logits = given if in_place and not soft else given.clone()
    for stage in stages:
        assert isinstance(stage, Transform)
        logits = stage.apply(logits, rows)
    if not soft:
        return logits
    empty = (scan(logits)[0] == NEG_INF).nonzero().squeeze(1)
    if len(empty):
        others = [stage for stage in stages if stage is not soft[-1]]
        source = empty if index is None else index[empty]
        logits[empty] = run_transforms(others, given, rows.select(empty.tolist(), empty), source)
    return logits


def run_filters(
    stages: Sequence[Stage],
    logits: Tensor,
    rows: Rows,
    wanted: Callable[[Rows], Sequence[Stage]] | None = None,
    index: Tensor | None = None,
) -> list[Filtered]:
    """Run filters in order, and again with more candidates on the rows that need them.

    `wanted` are those stages that some of the rows want, if not all of them. The rows are those
    of the logits at `index` [R]; None: all.
    """
    parts: list[Filtered] = []
    subset: list[int] | None = None
    candidates = Candidates(logits, index=index)
    while True:
        _run(stages, candidates, rows)
        parts.append(Filtered(subset, rows, candidates))
        unsure = [row for row, is_it in enumerate(candidates.unsure.tolist()) if is_it]
        if not unsure:
            return parts
        subset = unsure if subset is None else [subset[row] for row in unsure]
        its = torch.tensor(unsure, device=logits.device)
        rows = rows.select(unsure, its)
        stages = stages if wanted is None else wanted(rows)
        candidates = candidates.wider(its, widening(stages))


def _observes(stage: type[Stage]) -> bool:
    return issubclass(stage, Filter) and stage.observe is not Filter.observe


def widening(filters: Sequence[Stage]) -> int:
    """How many times as many candidates the rows of these get."""
    return max(stage.widening for stage in filters if isinstance(stage, Filter))


def dense(parts: Sequence[Filtered], like: Tensor) -> Tensor:
    """What filters have made of logits [R, V], -inf where dropped."""
    logits = torch.empty_like(like)
    for part in parts:
        whole = part.candidates.dense()
        if part.subset is None:
            logits = whole
        else:
            logits[part.subset] = whole
    return logits


def _run(stages: Sequence[Stage], candidates: Candidates, rows: Rows) -> None:
    for stage in stages:
        assert isinstance(stage, Filter)
        stage.apply(candidates, rows)
    candidates.settle()
