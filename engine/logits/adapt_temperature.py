"""AdapT sampling, "Hot or Cold?": Zhu et al., 2023, arXiv:2309.02772."""

import torch

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.history import History
from engine.logits.stage import Filter
from engine.messages import Request
from engine.types import Rows


class AdaptTemperature(Filter):
    """One temperature for the first token of an indented line of code, another elsewhere.

    A position is hot if the text before it ends with a line break and some spaces or tabs. The
    authors' code says so in token ids of its own tokenizer; here it is read off the tokens' texts.
    """

    fields = ("adapt_temperature",)

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.hot = lanes.column(torch.float32, neutral=1.0)
        self.cold = lanes.column(torch.float32, neutral=1.0)

    def admit(self, lane: int, request: Request) -> bool:
        pair = request.params.adapt_temperature
        self.hot[lane], self.cold[lane] = pair or (1.0, 1.0)
        return pair is not None

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        words = self.lanes.vocabulary
        history = History.of(self.lanes, rows)
        # The last token that is not just spaces, and whether only spaces came after it.
        solid = history.written & ~words.blank[history.ids]
        last = torch.where(solid, history.index, -1).amax(1, keepdim=True)
        token = history.ids.gather(1, last.clamp(min=0))
        spaced = last < history.lengths - 1
        hot = words.indents[token] | (spaced & words.ends_line[token])
        hot &= last >= 0
        candidates.divide(torch.where(hot, self.hot.at(rows), self.cold.at(rows)))
