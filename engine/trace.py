"""What each stage of the pipeline did to one row, for people who want to see it.

A trace runs the row's stages once more, one after the other, and looks in between. It changes
nothing, and rows that are not traced do not pay for it.
"""

import re
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.pipeline import Pipeline, run_transforms, widening
from engine.logits.stage import Filter, Stage
from engine.messages import Listed, Probability, StageTrace, TokenTrace
from engine.numerics import NEG_INF, best, count_finite, listed, moments, scan, summarise
from engine.rng import Domain, gumbel, uniform
from engine.types import Rows


class RowTrace:
    """The way of one row, raw [1, V] float32, through the pipeline.

    To be made before the pipeline observes what is drawn.
    """

    def __init__(
        self, pipeline: Pipeline, lanes: Lanes, raw: Tensor, rows: Rows, top: int, greedy: bool
    ) -> None:
        self._lanes, self._raw, self._rows, self._greedy = lanes, raw, rows, greedy
        transforms, filters = pipeline.stages_of(rows.host_lanes[0])
        stages: list[StageTrace] = []
        logits = raw
        for count in range(1, len(transforms) + 1):
            after = run_transforms(transforms[:count], raw, rows)
            if not torch.equal(after, logits):
                stages.append(_step(transforms[count - 1], logits, after))
            logits = after
        self._candidates, self._final = _filtered(filters, logits, rows, stages)
        self._raw_total, entropy, varentropy = moments(raw)
        self._shared = TokenTrace(
            entropy=float(entropy),
            varentropy=float(varentropy),
            temperature=0.0 if greedy else float(self._candidates.temperature[0]),
            stages=tuple(stages),
            before=_likeliest(raw, top, self._raw_total)[0],
            after=_likeliest(self._final, top, self._candidates.total)[0],
            rank=0,
            prob_before=0.0,
            prob_after=0.0,
            uniform=None,
        )

    def of(self, token_id: int, *, certain: bool = False) -> TokenTrace:
        """What led to the choice of this token.

        It is `certain` if none but the likeliest could come: this one, or one that was not chosen.
        """
        own = self._raw[:, token_id]
        drawn = _prob(self._final[:, token_id], self._candidates.total)
        if certain:
            drawn = float(token_id == int(scan(self._final)[1]))
        return replace(
            self._shared,
            rank=int((self._raw > own).count_nonzero()) + 1,
            prob_before=_prob(own, self._raw_total),
            prob_after=drawn,
            uniform=None if self._greedy else self._uniform(token_id),
        )

    def _uniform(self, token_id: int) -> float:
        """The number in (0, 1) that the chosen token's Gumbel noise was made of."""
        ids = torch.tensor([token_id], device=self._rows.positions.device)
        return float(self._uniforms(ids, self._draw_of(token_id)))

    def _uniforms(self, ids: Tensor, draw: int) -> Tensor:
        return uniform(self._lanes.seeds[self._rows.lanes], self._rows.positions, ids, draw)

    def _draw_of(self, token_id: int) -> int:
        """Which draw the token came from, where there are several."""
        candidates = self._candidates
        if candidates.redrawn is not None and bool(candidates.redrawn & (candidates.count[0] > 1)):
            return Domain.EXTRA
        count = 1 if candidates.num_draws is None else int(candidates.num_draws)
        for index in range(count if count > 1 else 0):
            draw = Domain.EXTRA + index if index else Domain.TOKEN
            noise = gumbel(self._uniforms(candidates.ids[0], draw))
            if int(candidates.ids[0, (candidates.logits[0] + noise).argmax()]) == token_id:
                return draw
        return Domain.TOKEN


def likeliest(logits: Tensor, top: int) -> list[Listed[Probability]]:
    """The `top` likeliest tokens of each row [n, V] that are left."""
    return _likeliest(logits, top, _total(logits))


def _filtered(
    filters: Seq[Stage], logits: Tensor, rows: Rows, stages: list[StageTrace]
) -> tuple[Candidates, Tensor]:
    """Run the filters, noting what each of them does, and again if they need more tokens.

    Returns what is left in the end, also as logits of the whole vocabulary.
    """
    candidates = Candidates(logits)
    while True:
        noted: list[StageTrace] = []
        count = int(candidates.count)
        whole: Tensor | None = None  # the vocabulary's logits as they are now, if known
        for stage in filters:
            assert isinstance(stage, Filter)
            before = copy(candidates)
            stage.apply(candidates, rows)
            left = count if candidates.whole is before.whole else int(candidates.count)
            if left != count:
                was, whole = before.dense() if whole is None else whole, candidates.dense()
                removed = _mass(was, before.total, where=whole == NEG_INF)
                noted.append(StageTrace(_name(stage), left, removed))
            elif float(candidates.temperature) != float(before.temperature):
                whole = None
                noted.append(StageTrace(_name(stage), left, 0.0))
            count = left
        settled = candidates.whole
        candidates.settle()
        if not bool(candidates.unsure.any()):
            stages += noted
            if whole is None or candidates.whole is not settled:
                whole = candidates.dense()
            return candidates, whole
        candidates = candidates.wider(torch.zeros_like(rows.lanes), widening(filters))


def _step(stage: Stage, before: Tensor, after: Tensor) -> StageTrace:
    """What a transform did: tokens left, and the mass of those it banned."""
    count, left = int(count_finite(before)), int(count_finite(after))
    banned = left < count
    removed = _mass(before, _total(before), where=after == NEG_INF) if banned else 0.0
    return StageTrace(_name(stage), left, removed)


def _mass(logits: Tensor, total: Tensor, where: Tensor) -> float:
    """The probability of some tokens [1, V] bool together, of which one at least is left.

    `total` is ln Σ exp of all.
    """
    return _prob(_total(torch.where(where, logits, NEG_INF)), total)


def _total(logits: Tensor) -> Tensor:
    """ln Σ exp of each row, [n, 1] float64."""
    return summarise(logits, torch.ones_like(logits[:, 0]))[0]


def _prob(logit: Tensor, total: Tensor) -> float:
    return float((logit.double() - total).exp())


def _name(stage: Stage) -> str:
    """NoRepeatNgram as no_repeat_ngram."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(stage).__name__).lower()


def _likeliest(logits: Tensor, top: int, totals: Tensor) -> list[Listed[Probability]]:
    """The `top` likeliest tokens of rows [n, V]; `totals` [n, 1] are ln Σ exp of all of a row."""
    values, ids = best(logits, top)
    probs = (values.double() - totals).exp()
    counts = (probs > 0.0).sum(1).tolist()  # the others come last
    rows = zip(listed(Probability, ids, probs), counts, strict=True)
    return [row[:count] for row, count in rows]
