"""Keep a sequence from ending too early."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Transform
from engine.messages import Request
from engine.numerics import NEG_INF
from engine.types import Rows


class MinTokens(Transform):
    """Ban end-of-sequence and stop tokens until enough tokens are out.

    Stop strings are held off in `engine.text`, which sees the text.
    """

    fields = ("min_tokens",)
    soft_ban = True

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.min_tokens = lanes.column(torch.int64, neutral=0)
        self.ends = lanes.ragged()

    def admit(self, lane: int, request: Request) -> bool:
        wanted = request.params.min_tokens > 0
        ends = request.possible_ends
        self.min_tokens[lane] = request.params.min_tokens
        self.ends.write(lane, ends if wanted else ())
        return wanted and bool(ends)

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        generated = rows.positions + 1 - self.lanes.prompt_lengths[rows.lanes]
        early = generated < self.min_tokens.at(rows)[:, 0]
        row, token_id, _ = self.ends.at(rows)
        held = early[row]
        logits[row[held], token_id[held]] = NEG_INF
        return logits
