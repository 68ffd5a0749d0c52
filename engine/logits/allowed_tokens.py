"""A hard mask: only the listed tokens are possible."""

from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Transform
from engine.messages import Request
from engine.numerics import NEG_INF
from engine.types import Rows


class AllowedTokens(Transform):
    """Ban every token but those the request allows."""

    fields = ("allowed_token_ids",)

    def __init__(self, lanes: Lanes) -> None:
        self.limited = lanes.flags()
        self.allowed = lanes.ragged()

    def admit(self, lane: int, request: Request) -> bool:
        allowed = request.params.allowed_token_ids
        self.limited[lane] = allowed is not None
        self.allowed.write(lane, allowed or ())
        return allowed is not None

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        row, token_id, _ = self.allowed.at(rows)
        allowed = logits[row, token_id]
        logits[self.limited[rows.host_lanes].nonzero()[0].tolist()] = NEG_INF
        logits[row, token_id] = allowed
        return logits
