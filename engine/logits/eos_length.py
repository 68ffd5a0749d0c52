"""Two ways to move the end of the text: later if it comes too soon, sooner if it is late."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Transform
from engine.messages import Request
from engine.types import Rows


class EosLengthPenalty(Transform):
    """Lower the end-of-sequence tokens while the output is short.

    Against the early ends that penalties cause (Zhu et al., 2023, arXiv:2310.14971, whose exact
    form is not published): z -= λ · max(0, 1 - t / W) after t output tokens.
    """

    fields = ("eos_length_penalty", "eos_length_window")

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.strength = lanes.column(torch.float32, neutral=0.0)
        self.window = lanes.column(torch.float32, neutral=1.0)
        self.ends = lanes.ragged()

    def admit(self, lane: int, request: Request) -> bool:
        wanted = request.params.eos_length_penalty > 0.0
        self.strength[lane] = request.params.eos_length_penalty
        self.window[lane] = request.params.eos_length_window
        ends = request.possible_ends
        self.ends.write(lane, ends if wanted else ())
        return wanted and bool(ends)

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        count = _generated(self.lanes, rows)
        missing = (1.0 - count / self.window.at(rows)).clamp(min=0.0)
        lowered = (self.strength.at(rows) * missing).squeeze(1)
        row, token_id, _ = self.ends.at(rows)
        logits[row, token_id] -= lowered[row]
        return logits


class ExponentialDecayLengthPenalty(Transform):
    """Raise the end-of-sequence tokens ever more once the output is long, as in transformers.

    After `start` output tokens: z += |z| · (factor^(t - start) - 1).
    """

    fields = ("exponential_decay_length_penalty",)

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.start = lanes.column(torch.float32, neutral=0.0)
        self.factor = lanes.column(torch.float32, neutral=1.0)
        self.ends = lanes.ragged()

    def admit(self, lane: int, request: Request) -> bool:
        pair = request.params.exponential_decay_length_penalty
        self.start[lane], self.factor[lane] = pair or (0, 1.0)
        self.ends.write(lane, request.eos_token_ids if pair else ())
        return pair is not None and bool(request.eos_token_ids)

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        late = (_generated(self.lanes, rows) - self.start.at(rows)).clamp(min=0.0)
        largest = torch.finfo(torch.float32).max
        growth = (self.factor.at(rows).pow(late) - 1.0).clamp(-largest, largest).squeeze(1)
        row, token_id, _ = self.ends.at(rows)
        score = logits[row, token_id]
        raised = (score + score.abs() * growth[row]).clamp(-largest, largest)
        # A token that something has banned stays banned: |-inf| times a growth is no number.
        logits[row, token_id] = torch.where(score == float("-inf"), score, raised)
        return logits


def _generated(lanes: Lanes, rows: Rows) -> Tensor:
    """How many output tokens each row has, [R, 1] float32."""
    count = rows.positions + 1 - lanes.prompt_lengths[rows.lanes]
    return count.float().unsqueeze(1)
