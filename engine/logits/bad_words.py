"""Words that must not be generated."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.history import ANY, ends_with
from engine.logits.stage import Transform
from engine.numerics import NEG_INF
from engine.types import Request, Rows


class BadWords(Transform):
    """Ban the last token of a word where the output ends with all its other tokens."""

    fields = ("bad_words",)
    soft_ban = True

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.words = lanes.ragged(torch.int64, pad=ANY)  # last token, and those before it

    def admit(self, lane: int, request: Request) -> bool:
        words = request.bad_word_ids
        self.words.write(lane, [word[-1] for word in words], [list(word[:-1]) for word in words])
        return bool(words)

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        row, last, leading = self.words.at(rows)
        lane, ends = rows.lanes[row], rows.positions[row] + 1
        begins = self.lanes.prompt_lengths[lane]
        banned = ends_with(self.lanes, lane, ends, leading, begins)
        logits[row[banned], last[banned]] = NEG_INF
        return logits
