"""Run on each row the stages it wants, all rows in one pass."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter, Stage, Transform
from engine.numerics import NEG_INF, scan
from engine.types import Request, Rows


class Pipeline:
    """The stages and which lanes want them.

    First transforms, on the logits of the rows that want any of them; other rows cost nothing and
    cannot change. Then, for sampled rows, temperature and filters, on their candidates. A stage
    runs if one of the rows wants it. All this is decided on the host.
    """

    def __init__(self, stages: Sequence[type[Stage]], lanes: Lanes) -> None:
        self.stages = [stage(lanes) for stage in stages]
        self.wanted = np.zeros((len(stages), lanes.num_lanes), dtype=bool)
        self._transforms = np.array([isinstance(stage, Transform) for stage in self.stages])

    def admit(self, lane: int, request: Request) -> None:
        """Give every stage the lane's parameters."""
        for index, stage in enumerate(self.stages):
            wanted = stage.admit(lane, request)
            skipped = isinstance(stage, Filter) and request.params.greedy
            self.wanted[index, lane] = wanted and not skipped

    def fork(self, parent: int, child: int) -> None:
        self.wanted[:, child] = self.wanted[:, parent]

    def transform(self, logits: Tensor, rows: Rows) -> Tensor:
        """Biases, penalties and bans over logits [R, V] float32, which are only read.

        A row that comes out all -inf has no valid token.
        """
        wanted = self.wanted[:, rows.host_lanes] & self._transforms[:, None]
        subset: list[int] = np.flatnonzero(wanted.any(axis=0)).tolist()
        if not subset:
            return logits
        stages = [self.stages[index] for index in np.flatnonzero(wanted.any(axis=1))]
        if len(subset) == len(rows):
            return run_transforms(stages, logits.clone(), rows)
        index = torch.tensor(subset, dtype=torch.int64, device=logits.device)
        part = run_transforms(stages, logits[index], rows.select(subset, index))
        return logits.index_copy(0, index, part)

    def filter(self, logits: Tensor, rows: Rows) -> list[tuple[list[int] | None, Candidates]]:
        """Temperature and filters over sampled rows, each with a finite entry.

        The candidates of most rows come first; rows whose filters had to see the whole vocabulary
        come again with it, and with their indices.
        """
        wanted = self.wanted[:, rows.host_lanes] & ~self._transforms[:, None]
        stages = [self.stages[index] for index in np.flatnonzero(wanted.any(axis=1))]
        return run_filters(stages, logits, rows)


def run_transforms(stages: Sequence[Stage], logits: Tensor, rows: Rows) -> Tensor:
    """Run transforms in order, lifting soft bans, last first, where nothing would be left."""
    before: list[Tensor] = []
    for stage in stages:
        assert isinstance(stage, Transform)
        if stage.soft_ban:
            before.append(logits.clone())
        logits = stage.apply(logits, rows)
    for snapshot in reversed(before):
        empty = scan(logits)[0] == NEG_INF
        if not bool(empty.any()):
            break
        logits = torch.where(empty.unsqueeze(1), snapshot, logits)
    return logits


def run_filters(
    stages: Sequence[Stage], logits: Tensor, rows: Rows
) -> list[tuple[list[int] | None, Candidates]]:
    """Run filters in order, and again on the whole vocabulary of the rows that need it."""
    candidates = Candidates(logits)
    _run(stages, candidates, rows)
    result: list[tuple[list[int] | None, Candidates]] = [(None, candidates)]
    unsure: list[int] = candidates.unsure.nonzero().flatten().tolist() if candidates.ranked else []
    if unsure:
        index = torch.tensor(unsure, device=logits.device)
        again = Candidates(logits[index], width=logits.shape[1])
        _run(stages, again, rows.select(unsure, index))
        result.append((unsure, again))
    return result


def dense(groups: list[tuple[list[int] | None, Candidates]]) -> Tensor:
    """What `run_filters` has made of the logits, [R, V] float32, -inf where dropped."""
    (_, candidates), *others = groups
    logits = candidates.dense()
    for subset, again in others:
        logits[subset] = again.dense()
    return logits


def _run(stages: Sequence[Stage], candidates: Candidates, rows: Rows) -> None:
    for stage in stages:
        assert isinstance(stage, Filter)
        stage.apply(candidates, rows)
