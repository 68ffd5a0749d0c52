"""XTC, exclude top choices (text-generation-webui, 2024)."""

import torch

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.rng import Domain, uniform
from engine.types import Rows


class Xtc(Filter):
    """Now and then, drop all tokens above a threshold but the least likely of them.

    A coin of the row's own seed and position decides whether. Where that would drop an
    end-of-sequence token or a line break, nothing happens, as in text-generation-webui.
    """

    fields = ("xtc_probability", "xtc_threshold")

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.probability = lanes.column(torch.float32, neutral=0.0)
        self.threshold = lanes.column(torch.float32, neutral=1.0)
        self.ends = lanes.ragged()

    def admit(self, lane: int, request: Request) -> bool:
        params = request.params
        # Two tokens cannot both have more than half.
        wanted = params.xtc_probability > 0.0 and params.xtc_threshold <= 0.5
        self.probability[lane] = params.xtc_probability if wanted else 0.0
        self.threshold[lane] = params.xtc_threshold
        self.ends.write(lane, request.eos_token_ids if wanted else ())
        return wanted

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        seeds, nobody = self.lanes.seeds[rows.lanes], torch.zeros_like(rows.positions)
        coin = uniform(seeds, rows.positions, nobody, Domain.COIN).unsqueeze(1)
        acts = coin < self.probability.at(rows)
        above = candidates.alive & (candidates.probs >= self.threshold.at(rows))
        # Candidates are sorted: the last one above the threshold is the least likely, and stays.
        excluded = above & (above.cumsum(1) < above.sum(1, keepdim=True))
        newlines = self.lanes.vocabulary.newlines[candidates.ids]
        acts &= ~(excluded & newlines).any(1, keepdim=True)
        row, token_id, _ = self.ends.at(rows)
        ended = (excluded[row] & (candidates.ids[row] == token_id.unsqueeze(1))).any(1)
        acts[row[ended]] = False
        # Where all candidates are above the threshold, there may be more.
        candidates.drop(excluded & acts, sure=~acts | ~above[:, -1:])
