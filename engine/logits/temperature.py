"""Temperature: flatten or sharpen the distribution, by a constant or by its own entropy."""

import torch

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.types import Rows


class Temperature(Filter):
    """Divide the logits by the temperature.

    With a range r, llama.cpp's dynamic temperature: from T - r (but not below 0) where the model is
    sure to T + r where it is as unsure as it can be, by the entropy's part of its maximum, raised
    to the exponent.
    """

    fields = ("temperature", "dynatemp_range", "dynatemp_exponent")

    def __init__(self, lanes: Lanes) -> None:
        self.temperature = lanes.column(torch.float32, neutral=1.0)
        self.range = lanes.column(torch.float32, neutral=0.0)
        self.exponent = lanes.column(torch.float32, neutral=1.0)
        self.dynamic = lanes.flags()

    def admit(self, lane: int, request: Request) -> bool:
        params = request.params
        # A greedy lane never gets here as itself, but may stand beside rows that do.
        self.temperature[lane] = 1.0 if params.greedy else params.temperature
        self.range[lane] = 0.0 if params.greedy else params.dynatemp_range
        self.exponent[lane] = params.dynatemp_exponent
        self.dynamic[lane] = not params.greedy and params.dynatemp_range > 0.0
        return not params.greedy and (params.temperature != 1.0 or params.dynatemp_range > 0.0)

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        temperature, reach = self.temperature.at(rows), self.range.at(rows)
        if self.dynamic[rows.host_lanes].any():
            low = (temperature - reach).clamp(min=0.0)
            share = (candidates.entropy / candidates.count.double().log()).float()
            dynamic = low + (temperature + reach - low) * share.pow(self.exponent.at(rows))
            applies = (reach > 0.0) & (candidates.count > 1)
            temperature = torch.where(applies, dynamic, temperature)
        candidates.divide(temperature)
