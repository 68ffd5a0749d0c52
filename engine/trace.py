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
from engine.numerics import NEG_INF, best, log_sum_exp, scan
from engine.rng import Domain, gumbel, uniform
from engine.types import LayerTrace, Probability, Rows, StageTrace, TokenTrace


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
        self._candidates = _filtered(filters, logits, rows, stages)
        self._final = self._candidates.dense()
        values, ids = best(self._final, top)
        entropy, varentropy = _moments(raw)
        self._raw_total = log_sum_exp(raw)
        self._shared = TokenTrace(
            entropy=entropy,
            varentropy=varentropy,
            temperature=0.0 if greedy else float(self._candidates.temperature[0]),
            stages=tuple(stages),
            before=_likeliest(raw, top, self._raw_total),
            after=_top(ids[0], self._prob(values[0]), top),
            rank=0,
            prob_before=0.0,
            prob_after=0.0,
            uniform=None,
        )

    def of(self, token_id: int, *, certain: bool = False) -> TokenTrace:
        """What led to the choice of this token.

        It is `certain` if none but the likeliest could come: this one, or one that was not chosen.
        """
        own = self._raw[0, token_id]
        top, shift = self._raw_total
        drawn = float(self._prob(self._final[0, token_id]))
        if certain:
            drawn = float(token_id == int(scan(self._final)[1]))
        return replace(
            self._shared,
            rank=int((self._raw[0] > own).sum()) + 1,
            prob_before=float((own - top[0, 0] - shift[0, 0]).exp()),
            prob_after=drawn,
            uniform=None if self._greedy else self._uniform(token_id),
        )

    def _prob(self, logits: Tensor) -> Tensor:
        """Probabilities at the end, of such logits."""
        return (logits.double() - self._candidates.total[0]).exp()

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


def trace_layers(logits: Tensor, layers: Seq[int], top: int) -> tuple[LayerTrace, ...]:
    """The likeliest next tokens of chosen layers, from their logits [n, V]: the logit lens."""
    return tuple(
        LayerTrace(layer, _likeliest(one, top, log_sum_exp(one)))
        for layer, one in zip(layers, logits.split(1), strict=True)
    )


def _filtered(
    filters: Seq[Stage], logits: Tensor, rows: Rows, stages: list[StageTrace]
) -> Candidates:
    """Run the filters, noting what each of them does, and again if they need more tokens."""
    candidates = Candidates(logits)
    while True:
        noted: list[StageTrace] = []
        for stage in filters:
            assert isinstance(stage, Filter)
            before, count = copy(candidates), int(candidates.count)
            stage.apply(candidates, rows)
            left = int(candidates.count)
            if left != count:
                gone = candidates.dense() == NEG_INF
                noted.append(StageTrace(_name(stage), left, _mass(before.dense(), gone)))
            elif float(candidates.temperature[0]) != float(before.temperature[0]):
                noted.append(StageTrace(_name(stage), left, 0.0))
        candidates.settle()
        if not bool(candidates.unsure.any()):
            stages += noted
            return candidates
        candidates = candidates.wider(torch.zeros_like(rows.lanes), widening(filters))


def _step(stage: Stage, before: Tensor, after: Tensor) -> StageTrace:
    """What a transform did: tokens left, and the mass of those it banned."""
    gone = after == NEG_INF
    return StageTrace(_name(stage), int((~gone).sum()), _mass(before, gone))


def _mass(logits: Tensor, where: Tensor) -> float:
    """The probability of some tokens [1, V] bool together."""
    return float(logits[0].double().softmax(0).dot(where[0].double()))


def _name(stage: Stage) -> str:
    """NoRepeatNgram as no_repeat_ngram."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(stage).__name__).lower()


def _moments(raw: Tensor) -> tuple[float, float]:
    """Entropy in nats and varentropy in nats² of a row's softmax."""
    below = raw[0].double()
    below = below - below.max()
    mass = below.exp()
    total = mass.sum()
    below.clamp_(min=-1e30)  # 0 times infinity is no number
    mean = mass.dot(below) / total
    varentropy = mass.dot((below - mean).square_()) / total
    return float(total.log() - mean), float(varentropy)


def _likeliest(logits: Tensor, top: int, total: tuple[Tensor, Tensor]) -> tuple[Probability, ...]:
    values, ids = best(logits, top)
    largest, shift = total
    return _top(ids[0], (values - largest - shift)[0].exp(), top)


def _top(ids: Tensor, probs: Tensor, top: int) -> tuple[Probability, ...]:
    alive = (probs > 0.0).nonzero().flatten()[:top]
    pairs = zip(ids[alive].tolist(), probs[alive].tolist(), strict=True)
    return tuple(Probability(token_id, prob) for token_id, prob in pairs)
