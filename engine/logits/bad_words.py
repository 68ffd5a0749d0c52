"""Words that must not be generated."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Transform
from engine.numerics import NEG_INF
from engine.types import Request, Rows

_ANY = -1  # pads a word's leading tokens to the longest word's


class BadWords(Transform):
    """Ban the last token of a word where the output ends with all its other tokens."""

    fields = ("bad_words",)
    soft_ban = True

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.words = lanes.ragged(torch.int64, pad=_ANY)  # last token, and those before it

    def admit(self, lane: int, request: Request) -> bool:
        words = request.bad_word_ids
        self.words.write(lane, [word[-1] for word in words], [list(word[:-1]) for word in words])
        return bool(words)

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        row, last, leading = self.words.at(rows)
        lane = rows.lanes[row]
        width = leading.shape[1]
        offsets = torch.arange(-width, 0, device=logits.device)
        index = rows.positions[row].unsqueeze(1) + 1 + offsets
        tokens = self.lanes.tokens[lane.unsqueeze(1), index.clamp(min=0)]
        output = index >= self.lanes.prompt_lengths[lane].unsqueeze(1)
        banned = ((leading == _ANY) | (output & (tokens == leading))).all(1)
        logits[row[banned], last[banned]] = NEG_INF
        return logits
