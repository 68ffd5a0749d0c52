"""Words that must not be generated."""

from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Transform
from engine.logits.words import Words
from engine.messages import Request
from engine.numerics import NEG_INF
from engine.types import Rows


class BadWords(Transform):
    """Ban the last token of a word where the output ends with all its other tokens."""

    fields = ("bad_words",)
    soft_ban = True

    def __init__(self, lanes: Lanes) -> None:
        self.words = Words(lanes)

    def admit(self, lane: int, request: Request) -> bool:
        self.words.write(lane, request.bad_word_ids)
        return bool(request.bad_word_ids)

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        row, last, banned = self.words.at(rows)
        logits[row[banned], last[banned]] = NEG_INF
        return logits
