"""Additive biases by token id."""

from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Transform
from engine.messages import Request
from engine.types import Rows


class LogitBias(Transform):
    """Add each request's own numbers to the logits of the tokens it names."""

    fields = ("logit_bias",)

    def __init__(self, lanes: Lanes) -> None:
        self.biases = lanes.ragged()

    def admit(self, lane: int, request: Request) -> bool:
        biases = request.params.logit_bias
        self.biases.write(lane, biases, biases.values())
        return bool(biases)

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        row, token_id, bias = self.biases.at(rows)
        logits[row, token_id] += bias  # no token twice
        return logits
