"""No n-gram twice: Paulus et al., 2017, arXiv:1705.04304."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.history import History
from engine.logits.matches import Matches
from engine.logits.stage import Transform
from engine.messages import Request
from engine.numerics import NEG_INF
from engine.types import Rows


class NoRepeatNgram(Transform):
    """Ban every token that followed an earlier occurrence of the last n - 1 tokens."""

    fields = ("no_repeat_ngram_size",)
    soft_ban = True

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.size = lanes.column(torch.int64, neutral=0)
        self.matches = Matches(lanes)

    def admit(self, lane: int, request: Request) -> bool:
        size = request.params.no_repeat_ngram_size
        self.size[lane] = size
        self.matches.start(lane, wanted=size > 0)
        return size > 0

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        self.matches.catch_up(rows)
        history, size = History.of(self.lanes, rows), self.size.at(rows)
        # A token is banned if the n - 1 before it are the row's last n - 1. Nothing is before the
        # first one.
        match = torch.zeros_like(history.ids)
        match[:, 1:] = self.matches.lengths[rows.lanes, : rows.max_len - 1]
        banned = history.written & (size > 0) & (match >= size - 1)
        scores = logits.gather(1, history.ids)
        scores.masked_fill_(history.count(banned, logits.shape[1]) > 0, NEG_INF)
        return logits.scatter_(1, history.ids, scores)
