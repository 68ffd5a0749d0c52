"""No n-gram twice: Paulus et al., 2017, arXiv:1705.04304."""

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.history import History
from engine.logits.stage import Transform
from engine.numerics import NEG_INF
from engine.types import Request, Rows


class NoRepeatNgram(Transform):
    """Ban every token that followed an earlier occurrence of the last n - 1 tokens."""

    fields = ("no_repeat_ngram_size",)
    soft_ban = True

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.size = lanes.column(torch.int64, neutral=0)

    def admit(self, lane: int, request: Request) -> bool:
        self.size[lane] = request.params.no_repeat_ngram_size
        return request.params.no_repeat_ngram_size > 0

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        history = History.of(self.lanes, rows)
        ids, lengths, size = history.ids, history.lengths, self.size.at(rows)
        # Entry i is banned if the n - 1 entries before it are the row's last n - 1.
        banned = history.written & (size > 0) & (history.index >= size - 1)
        for back in range(1, min(int(size.max()), rows.max_len)):
            last = ids.gather(1, (lengths - back).clamp(min=0))
            same = (ids[:, :-back] == last) | (size <= back)
            banned[:, back:] &= same
            banned[:, :back] &= size <= back
            if not bool(banned.any()):
                return logits
        scores = logits.gather(1, ids)
        scores.masked_fill_(history.count(banned, logits.shape[1]) > 0, NEG_INF)
        return logits.scatter_(1, ids, scores)
