"""Temperature: flatten or sharpen the distribution."""

import torch

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.types import Request, Rows


class Temperature(Filter):
    """Divide the logits by the temperature."""

    fields = ("temperature",)

    def __init__(self, lanes: Lanes) -> None:
        self.temperature = lanes.column(torch.float32, neutral=1.0)

    def admit(self, lane: int, request: Request) -> bool:
        # A greedy lane never gets here as itself, but may stand beside rows that do.
        value = 1.0 if request.params.greedy else request.params.temperature
        self.temperature[lane] = value
        return value != 1.0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        candidates.divide(self.temperature.at(rows))
