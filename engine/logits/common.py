"""The filters that most requests have: with no others, one pass chooses a row's token."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels import native
from engine.lanes import Lanes
from engine.logits.min_p import MinP
from engine.logits.pipeline import Pipeline
from engine.logits.temperature import Temperature
from engine.logits.top_k import TopK
from engine.logits.top_p import TopP
from engine.numerics import kernels, scan
from engine.types import Rows

_KINDS = (Temperature, MinP, TopK, TopP)  # in the order in which they act


class Common:
    """Chooses for rows that are greedy, or have temperature, min-p, top-k and top-p at most.

    On the CPU in one pass of our kernels (engine/kernels/choose.h). The stages and `draw` are its
    reference: where there are no kernels, or 256 candidates are not enough, a row goes their way.
    """

    def __init__(self, pipeline: Pipeline, lanes: Lanes) -> None:
        self.pipeline = pipeline
        self.greedy = lanes.flags()
        self._only = lanes.flags()  # who is sampled, and has no other filters
        temperature = pipeline.stage(Temperature)
        self._dynamic = temperature.dynamic
        self._columns = native.choice(
            greedy=torch.from_numpy(self.greedy),
            common=torch.from_numpy(self._only),
            seeds=lanes.seeds,
            temperature=temperature.temperature.values,
            min_p=pipeline.stage(MinP).log_min_p.values,
            top_k=pipeline.stage(TopK).top_k.values,
            top_p=pipeline.stage(TopP).limit.values,
        )

    def admit(self, lane: int, *, greedy: bool, seen: bool) -> None:
        """After the pipeline has. `seen`: somebody wants to see what the filters leave."""
        _, filters = self.pipeline.stages_of(lane)
        kinds = [type(stage) for stage in filters]
        only = kinds == [kind for kind in _KINDS if kind in kinds] and not self._dynamic[lane]
        self.greedy[lane] = greedy
        self._only[lane] = only and not greedy and not seen

    def choose(self, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor, list[int]]:
        """The largest entry of each row of logits [R, V], NaN if it holds one, and a token, [R].

        Last the rows, in order, whose tokens are still to be chosen: what stands there is the
        lowest id with the largest entry.
        """
        if (library := kernels(logits)) is None:
            top, ids = scan(logits)
            late: NDArray[np.bool_] = ~self.greedy[rows.host_lanes]
        else:
            top, ids, undecided = library.choose(logits, rows.lanes, rows.positions, self._columns)
            late = undecided.numpy()
        return top, ids, np.flatnonzero(late).tolist()
