"""Repetition, frequency and presence penalties, over a window of the latest tokens.

Repetition: Keskar et al., 2019, arXiv:1909.05858, with the rule all implementations share for
negative logits, which are multiplied. Frequency and presence: OpenAI's. Window: Zhu et al., 2023,
arXiv:2310.14971.
"""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.counts import TokenCounts
from engine.logits.stage import Transform
from engine.messages import Request
from engine.numerics import kernels
from engine.types import Rows


class Penalties(Transform):
    """Make tokens that have occurred less likely.

    The repetition penalty looks at prompt and output (or only output), once per distinct token;
    the other two count the output alone.
    """

    fields = (
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "penalty_last_n",
        "penalty_prompt",
    )

    def __init__(self, lanes: Lanes) -> None:
        self.repetition = lanes.column(torch.float32, neutral=1.0)
        self.frequency = lanes.column(torch.float32, neutral=0.0)
        self.presence = lanes.column(torch.float32, neutral=0.0)
        self.counts = TokenCounts(lanes)
        self.prompt = lanes.column(torch.bool, neutral=True)

    def admit(self, lane: int, request: Request) -> bool:
        params = request.params
        # Beyond these all penalties are alike, and no logit may overflow.
        self.repetition[lane] = min(max(params.repetition_penalty, 1e-30), 1e30)
        self.frequency[lane] = params.frequency_penalty
        self.presence[lane] = params.presence_penalty
        self.counts.start(lane, params.penalty_last_n)
        self.prompt[lane] = params.penalty_prompt
        return params.penalty_last_n != 0 and (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        if (library := kernels(logits)) is not None:
            self.counts.catch_up(rows, logits.shape[1])
            columns = self.repetition, self.frequency, self.presence, self.prompt
            values = [column.values for column in columns]
            library.penalise(logits, rows.lanes, self.counts.tables, values)
            return logits
        ids, seen, generated = self.counts.at(rows, logits.shape[1])
        scores = logits.gather(1, ids)
        theta = self.repetition.at(rows)
        penalised = torch.where(scores > 0, scores / theta, scores * theta)
        repeated = torch.where(self.prompt.at(rows), seen, generated) > 0
        scores = torch.where(repeated, penalised, scores)
        lowered = scores - self.frequency.at(rows) * generated - self.presence.at(rows)
        return logits.scatter_(1, ids, torch.where(generated > 0, lowered, scores))
