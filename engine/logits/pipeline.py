"""Run on each row the stages it wants, all rows in one pass."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Stage
from engine.numerics import NEG_INF, row_max
from engine.types import Request, Rows


class Pipeline:
    """The stages and which lanes want them.

    Stages run in two groups: those of every row, then those of sampled rows. A group runs on the
    rows that want any of its stages, so other rows cost nothing and cannot change. Inside a group
    a stage runs if one of the rows wants it. All this is decided on the host.
    """

    def __init__(self, stages: Sequence[type[Stage]], lanes: Lanes) -> None:
        self.stages = [stage(lanes) for stage in stages]
        self.wanted = np.zeros((len(stages), lanes.num_lanes), dtype=bool)
        self.groups = [
            slice(group[0], group[-1] + 1)
            for group in (
                [index for index, _ in items]
                for _, items in groupby(enumerate(stages), key=lambda item: item[1].sampling_only)
            )
        ]

    def admit(self, lane: int, request: Request) -> None:
        """Give every stage the lane's parameters."""
        for index, stage in enumerate(self.stages):
            wanted = stage.admit(lane, request)
            skipped = stage.sampling_only and request.params.greedy
            self.wanted[index, lane] = wanted and not skipped

    def fork(self, parent: int, child: int) -> None:
        self.wanted[:, child] = self.wanted[:, parent]

    def __call__(self, logits: Tensor, rows: Rows) -> Tensor:
        """Process logits [R, V] float32 in place; a row that is all -inf has no valid token."""
        wanted = self.wanted[:, rows.host_lanes]
        for group in self.groups:
            subset: list[int] = np.flatnonzero(wanted[group].any(axis=0)).tolist()
            if subset:
                used: list[int] = np.flatnonzero(wanted[group].any(axis=1)).tolist()
                stages = [self.stages[group][index] for index in used]
                logits = _run_on(subset, stages, logits, rows)
        return logits


def _run_on(subset: list[int], stages: list[Stage], logits: Tensor, rows: Rows) -> Tensor:
    """Run stages on some rows only; the others keep their bits."""
    if len(subset) == len(rows):
        return _run(stages, logits, rows)
    index = torch.tensor(subset, dtype=torch.int64, device=logits.device)
    part = _run(stages, logits[index], rows.select(subset, index))
    return logits.index_copy_(0, index, part)


def _run(stages: list[Stage], logits: Tensor, rows: Rows) -> Tensor:
    """Run stages in order, lifting soft bans, last first, where nothing would be left."""
    before: list[Tensor] = []
    for stage in stages:
        if stage.soft_ban:
            before.append(logits.clone())
        logits = stage.apply(logits, rows)
    for snapshot in reversed(before):
        empty = row_max(logits) == NEG_INF
        if not bool(empty.any()):
            break
        logits = torch.where(empty, snapshot, logits)
    return logits
