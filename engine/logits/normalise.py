"""Logprobs instead of logits, before anything else: what transformers' beam search works on."""

from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Transform
from engine.messages import Request
from engine.numerics import log_softmax
from engine.types import Rows


class Normalise(Transform):
    """Subtract ln Σ exp.

    A repetition penalty divides or multiplies by the sign of a score, so it does something else to
    logprobs, which all are negative, than to logits.
    """

    fields = ("sampler_order", "use_beam_search")

    def __init__(self, lanes: Lanes) -> None:
        self.wanted = lanes.flags()

    def admit(self, lane: int, request: Request) -> bool:
        params = request.params
        wanted = params.use_beam_search and params.sampler_order == "hf"
        self.wanted[lane] = wanted
        return wanted

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        wanted = self.wanted[rows.host_lanes].nonzero()[0].tolist()
        if wanted:
            logits[wanted] = log_softmax(logits[wanted])
        return logits
