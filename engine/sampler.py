"""Choose a token for each row, and report logprobs.

The draw is Gumbel-max sampling (Gumbel, 1954; as in Kool et al., 2019, arXiv:1903.06059): the
token whose logit plus a noise of its own is largest. A token's noise depends on nothing but seed,
position and id. Where a filter has left few tokens, each gets its noise; where the whole vocabulary
is left, a block of 256 ids is drawn first, by its probability, and then a token inside it, which is
just as exact.

An inverse-CDF draw would need one random number instead, but a rounding difference of 1e-5 in one
logit shifts every later boundary: on SmolLM2-135M at temperature 1 it changed 0.2 % of all tokens
between a batched and a single forward pass, Gumbel noise none of 15,480.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.config import LogprobsMode
from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.common import Common
from engine.logits.pipeline import Filtered, Pipeline, dense
from engine.logits.stage import Filter
from engine.messages import NO_VALID_TOKEN, NOT_A_NUMBER, Request, Token, TokenTrace, pair
from engine.numerics import (
    BLOCK,
    NEG_INF,
    best,
    block_masses,
    bounded,
    integers,
    known_finite,
    listed,
    log_softmax,
    log_sum_exp,
    moments,
    row_sum,
    scan,
    within,
)
from engine.rng import Domain, gumbel, uniform, winner
from engine.strategies.base import Ranked, Wants
from engine.trace import RowTrace
from engine.types import Beside, Rows, Signals

Top = Seq[tuple[int, float]]  # the likeliest tokens and their numbers, best first
_NOTHING = Wants()


@dataclass(frozen=True, slots=True)
class Samples:
    """What was chosen, on the host.

    `token_ids` has an entry per row: an id, NO_VALID_TOKEN where every token was banned, or
    NOT_A_NUMBER where the model's row, or one beside it, held a NaN. `logprobs` maps the rows that
    asked for them to the chosen token's number and the likeliest tokens, best first.
    """

    token_ids: list[int]
    logprobs: dict[int, tuple[float, Top]]
    traces: dict[int, TokenTrace] = field(default_factory=dict)  # of the rows that asked for them
    tops: dict[int, Ranked] = field(default_factory=dict)  # where a strategy wants them
    logits: Tensor | None = None  # after all transforms, [R, V]


class Sampler:
    """Takes each row of the model's logits through its lane's pipeline to a token."""

    def __init__(self, lanes: Lanes, pipeline: Pipeline, mode: LogprobsMode) -> None:
        self.lanes = lanes
        self.pipeline = pipeline
        self.mode = mode
        self.common = Common(pipeline, lanes)
        self.greedy = self.common.greedy
        self.logprobs = np.full(lanes.num_lanes, -1)  # candidates wanted; -1: not even its own
        self.tops = np.zeros(lanes.num_lanes, dtype=np.int64)  # candidates for a strategy; 0: none
        self.going = np.zeros(lanes.num_lanes, dtype=np.int64)  # of those that do not end
        self.ends = lanes.ragged()  # which do, where that matters
        self.perturbed = lanes.flags()  # whose candidates are those of largest noisy logit
        self.traced = np.zeros(lanes.num_lanes, dtype=np.int64)  # tokens listed; 0: none
        self.watched = lanes.flags()  # whose filters want signals
        self.unnormalised = lanes.flags()  # whose candidates' logits are scores already
        self.reads_raw = lanes.flags()  # who is shown the model's logits as they were
        self.asked = lanes.flags()  # of whom more is wanted to know of a row than its token

    def admit(self, lane: int, request: Request, wants: Wants = _NOTHING) -> None:
        """Give the lane a request's parameters, and what its strategy wants to see of a row."""
        self.pipeline.admit(lane, request)
        self.tops[lane] = wants.top
        self.going[lane] = wants.going
        self.ends.write(lane, request.ends if wants.going else ())
        self.perturbed[lane] = wants.perturbed
        ranked = request.params.best_of_several  # which needs the scores
        self.logprobs[lane] = (
            (0 if ranked else -1) if request.logprobs is None else request.logprobs
        )
        self.traced[lane] = 0 if request.trace is None else request.trace.top
        self.watched[lane] = request.params.wants_signals
        self.unnormalised[lane] = request.params.scores_logprobs
        seen = not self.mode.raw and bool(self.logprobs[lane] >= 0)
        self.common.admit(lane, greedy=request.params.greedy, seen=seen)
        reports = self.mode.raw and (self.logprobs[lane] >= 0 or wants.top > 0)
        self.reads_raw[lane] = reports or request.trace is not None or wants.logits
        self.asked[lane] = self.watched[lane] or self.reads_raw[lane] or wants.top > 0
        self.asked[lane] |= self.logprobs[lane] >= 0

    def fork(self, parents: list[int], children: list[int]) -> None:
        self.pipeline.fork(parents, children)
        for known in (self.logprobs, self.traced, self.tops, self.going):
            known[children] = known[parents]

    def observes(self, lane: int) -> bool:
        """Does the lane want a filter that learns from what is drawn?"""
        _, filters = self.pipeline.stages_of(lane)
        kinds = [type(stage) for stage in filters if isinstance(stage, Filter)]
        return any(kind.observe is not Filter.observe for kind in kinds)

    def __call__(self, raw: Tensor, rows: Rows, forced: int | None = None) -> Samples:
        """Choose from the model's logits [R, V] float32, which may be overwritten.

        A `forced` token takes the place of what would have been chosen.
        """
        transformed = self.pipeline.transformed(rows)
        if transformed:
            raw_top, _ = scan(raw)
        else:
            raw_top, chosen, drawn = self.common.choose(raw, rows)
        sound = known_finite(raw_top)
        raw = raw if sound else bounded(raw)
        asked = bool(self.asked[rows.host_lanes].any())
        if asked:
            rows = self._with_signals(raw, rows)
        logits, top = raw, raw_top
        if transformed:
            shown = asked and bool(self.reads_raw[rows.host_lanes].any())
            logits = self.pipeline.transform(raw, rows, in_place=not shown)
            top, chosen, drawn = self.common.choose(logits, rows)
            sound = sound and known_finite(top)
        valid: Tensor | None = None  # which rows have a number to draw from; None: all
        if rows.beside is not None or not sound:
            chosen = torch.where(top == NEG_INF, NO_VALID_TOKEN, chosen)
            broken = raw_top.isnan()
            if rows.beside is not None:
                broken = broken | rows.beside.broken()
            chosen = torch.where(broken, NOT_A_NUMBER, chosen)
            valid = chosen >= 0
        processed = logits
        parts: list[Filtered] = []
        tokens = chosen
        if drawn:
            everyone = len(drawn) == len(rows)
            index = torch.tensor(drawn, device=raw.device)
            source = logits
            if valid is not None and not bool(valid[index].all()):
                # The others are drawn from all the same, and not used.
                source = torch.where(valid.unsqueeze(1), logits, 0.0)
            its = rows if everyone else rows.select(drawn, index)
            parts = self.pipeline.filter(source, its, None if everyone else index)
            tokens = self._draw(parts, len(drawn))
            chosen[index] = (
                tokens if valid is None else torch.where(valid[index], tokens, chosen[index])
            )
            if not self.mode.raw and self._wanting(rows):
                processed = logits.index_copy(0, index, dense(parts, logits[index]))
        if forced is not None:
            chosen = torch.where(chosen == NOT_A_NUMBER, chosen, forced)
            tokens = chosen if drawn else tokens
        token_ids: list[int] = chosen.tolist()
        traces = self._traces(raw, rows, token_ids) if asked else {}
        for filtered in parts:
            whole = filtered.subset is None
            self.pipeline.observe(filtered, tokens if whole else tokens[filtered.subset])
        if not asked:
            return Samples(token_ids, {}, logits=logits)
        return Samples(
            token_ids,
            self._report(raw, processed, chosen, rows),
            {
                row: trace.of(token_ids[row], certain=bool(self.greedy[rows.host_lanes[row]]))
                for row, trace in traces.items()
            },
            self._candidates(raw, logits, rows, traces),
            logits,
        )

    def _draw(self, parts: list[Filtered], count: int) -> Tensor:
        """A token of each row, [R] int64."""
        tokens = torch.zeros(count, dtype=torch.int64, device=self.lanes.device)
        for part in parts:
            drawn = draw(part.candidates, self.lanes.seeds[part.rows.lanes], part.rows.positions)
            tokens[slice(None) if part.subset is None else part.subset] = drawn
        return tokens

    def _candidates(
        self, raw: Tensor, logits: Tensor, rows: Rows, traces: Mapping[int, RowTrace]
    ) -> dict[int, Ranked]:
        """The likeliest tokens of rows whose strategies want them, after all transforms.

        Or those whose logits are largest with Gumbel noise added.
        """
        wanting: list[int] = np.flatnonzero(self.tops[rows.host_lanes]).tolist()
        if not wanting:
            return {}
        everyone = len(wanting) == len(rows)
        its = logits if everyone else logits[wanting]
        own = its if not self.mode.raw else raw if everyone else raw[wanting]
        lanes = [rows.host_lanes[row] for row in wanting]
        noisy, noise = self._noise(its, lanes, rows, wanting)
        ids = best(noisy, int(self.tops[lanes].max()))[1]
        limits = self.tops[lanes].tolist()
        if bool(self.going[lanes].any()):
            ids, limits = self._with_going(its, lanes, ids, limits)
        values, noise = its.gather(1, ids), noise.gather(1, ids)
        top, rest = log_sum_exp(its)
        # Scores that transformers would not normalise again are taken as they are.
        plain = torch.from_numpy(self.unnormalised[lanes]).to(raw.device).unsqueeze(1)
        scores = torch.where(plain, values, values - top - rest)
        reported = self._reported(own, lanes)
        logprobs = torch.zeros_like(scores)
        if any(one is not None for one in reported):
            logprobs = own.gather(1, ids)
            if self.mode.normalised:
                own_top, own_rest = log_sum_exp(own)
                logprobs = logprobs - own_top - own_rest
        counts = (values > NEG_INF).sum(1).tolist()  # what is banned comes last
        columns = zip(
            wanting,
            map(min, counts, limits),
            reported,
            ids.tolist(),
            scores.tolist(),
            (scores.double() + noise.double()).tolist(),
            logprobs.tolist(),
            strict=True,
        )
        return {
            row: Ranked(
                row_ids[:count],
                row_scores[:count],
                row_noisy[:count],
                partial(_token, row_ids, row_logprobs, report_of, traces.get(row)),
            )
            for row, count, report_of, row_ids, row_scores, row_noisy, row_logprobs in columns
        }

    def _with_going(
        self, logits: Tensor, lanes: list[int], ids: Tensor, limits: list[int]
    ) -> tuple[Tensor, list[int]]:
        """Candidates [m, K], of which so many count, and beside them the likeliest that do not end.

        Best first, of equals the lowest id first.
        """
        rows: list[int] = np.flatnonzero(self.going[lanes]).tolist()
        going, counts = logits[rows], integers(self.going[lanes][rows])
        row, token_id, _ = self.ends.kept.of([lanes[row] for row in rows])
        going[row, token_id] = NEG_INF
        more = best(going, int(counts.max()))[1]
        limit = integers([limits[row] for row in rows])
        both = torch.cat((ids[rows], more), 1)
        counted = torch.cat((_first(ids.shape[1], limit), _first(more.shape[1], counts)), 1)
        # By id first, so that of equals the lowest comes first, and each is seen once.
        both, order = torch.where(counted.to(both.device), both, logits.shape[1]).sort(1)
        once = both < logits.shape[1]
        once[:, 1:] &= both[:, 1:] != both[:, :-1]
        its = logits[rows].gather(1, both.clamp(max=logits.shape[1] - 1))
        values = torch.where(once, its, NEG_INF)
        order = values.sort(dim=1, descending=True, stable=True)[1]
        wide = torch.zeros(len(ids), both.shape[1], dtype=ids.dtype, device=ids.device)
        wide[:, : ids.shape[1]] = ids
        wide[rows] = both.gather(1, order).clamp(max=logits.shape[1] - 1)
        limits = limits.copy()
        for place, count in zip(rows, (values > NEG_INF).sum(1).tolist(), strict=True):
            limits[place] = count
        return wide, limits

    def _noise(
        self, logits: Tensor, lanes: list[int], rows: Rows, wanting: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Logits [m, V] with the noise of the rows that want it, and that noise [m, V]."""
        perturbed: list[int] = np.flatnonzero(self.perturbed[lanes]).tolist()
        if not perturbed:
            return logits, torch.zeros(1, 1, device=logits.device).expand_as(logits)
        its = [wanting[row] for row in perturbed]
        seeds = self.lanes.seeds[rows.lanes[its]].unsqueeze(1)
        ids = torch.arange(logits.shape[1], device=logits.device).unsqueeze(0)
        noise = torch.zeros_like(logits)
        uniforms = uniform(seeds, rows.positions[its].unsqueeze(1), ids, Domain.TOKEN)
        noise[perturbed] = gumbel(uniforms).float()
        return logits + noise, noise

    def _reported(self, source: Tensor, lanes: list[int]) -> list[Top | None]:
        """What is reported beside any token of each row: its likeliest; None if nothing is."""
        found: list[Top | None] = [None] * len(lanes)
        counts: list[int] = self.logprobs[lanes].tolist()
        asking = [row for row, count in enumerate(counts) if count >= 0]
        if asking:
            nothing = torch.zeros(len(asking), dtype=torch.int64, device=source.device)
            _, tops = report(source[asking], nothing, max(counts), self.mode.normalised)
            for row, top in zip(asking, tops, strict=True):
                found[row] = top[: counts[row]]
        return found

    def _with_signals(self, raw: Tensor, rows: Rows) -> Rows:
        watching: list[int] = np.flatnonzero(self.watched[rows.host_lanes]).tolist()
        if not watching:
            return rows
        entropy, varentropy, divergence = torch.zeros(3, len(rows), 1, device=raw.device)
        own, bit = raw[watching], math.log(2.0)
        _, nats, square_nats = moments(own)
        entropy[watching] = (nats / bit).float()
        varentropy[watching] = (square_nats / bit**2).float()
        beside = rows.beside or Beside()
        if beside.companions is not None and beside.companion_of is not None:
            other = beside.companions[beside.companion_of[watching].clamp(min=0)]
            probs, others = log_softmax(own).exp_(), log_softmax(other).exp_()
            divergence[watching] = kl_divergence(probs, others).float()
        attention = beside.attention
        if attention is None:
            attention = torch.zeros(len(rows), 4, device=raw.device)
        return replace(rows, signals=Signals(entropy, varentropy, attention, divergence))

    def _traces(self, raw: Tensor, rows: Rows, token_ids: list[int]) -> dict[int, RowTrace]:
        """Of the rows whose requests ask for it, and that have a token to choose."""
        traces: dict[int, RowTrace] = {}
        for row in np.flatnonzero(self.traced[rows.host_lanes]).tolist():
            if token_ids[row] < 0:
                continue
            lane = rows.host_lanes[row]
            one = rows.select([row], torch.tensor([row], device=raw.device))
            top, greedy = int(self.traced[lane]), bool(self.greedy[lane])
            traces[row] = RowTrace(self.pipeline, self.lanes, raw[row, None], one, top, greedy)
        return traces

    def _wanting(self, rows: Rows) -> list[int]:
        wanting: list[int] = np.flatnonzero(self.logprobs[rows.host_lanes] >= 0).tolist()
        return wanting

    def _report(
        self, raw: Tensor, processed: Tensor, chosen: Tensor, rows: Rows
    ) -> dict[int, tuple[float, Top]]:
        wanting = self._wanting(rows)
        if not wanting:
            return {}
        source = raw if self.mode.raw else processed
        if len(wanting) < len(rows):
            source, chosen = source[wanting], chosen[wanting]
        counts = self.logprobs[[rows.host_lanes[row] for row in wanting]].tolist()
        own, tops = report(source, chosen, max(counts), self.mode.normalised)
        columns = zip(wanting, counts, own, tops, strict=True)
        return {row: (value, top[:count]) for row, count, value, top in columns}


def _first(width: int, counts: Tensor) -> Tensor:
    """The first so many of each row, [m, width] bool."""
    return torch.arange(width) < counts.unsqueeze(1)


def _token(
    ids: list[int],
    logprobs: list[float],
    top: Top | None,
    trace: RowTrace | None,
    place: int,
) -> Token:
    """A candidate of a row as a token, with what is reported beside any token of the row."""
    token_id = ids[place]
    token = Token(token_id, "") if top is None else Token(token_id, "", logprobs[place], top)
    return token if trace is None else token._replace(trace=trace.of(token_id))


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Σ p ln(p / q) of rows [R, V], with both clipped to 1e-7 and the sum to 0: [R, 1]."""
    p, q = p.clamp(1e-7, 1.0), q.clamp(1e-7, 1.0)
    return row_sum(p * (p / q).log()).clamp(min=0.0)


def draw(candidates: Candidates, seeds: Tensor, positions: Tensor) -> Tensor:
    """A token of each row's distribution, [R] int64: a pure function of row, seed and position.

    seeds, positions [R] int64.
    """
    tailed = candidates.tail.nonzero().squeeze(1) if candidates.ranked else None
    if tailed is None or len(tailed) == len(seeds):
        raw, index = candidates.raw_rows()
        return draw_dense(raw, candidates.temperature, seeds, positions, index)
    place = winner(candidates.logits, seeds, positions, candidates.ids, Domain.TOKEN)
    if candidates.num_draws is not None and candidates.redrawn is not None:
        place = _draw_more(candidates, place, seeds, positions)
    tokens = candidates.ids.gather(1, place).squeeze(1)
    if len(tailed):
        raw, index = candidates.raw_rows(tailed)
        its = candidates.temperature[tailed], seeds[tailed], positions[tailed]
        tokens[tailed] = draw_dense(raw, *its, index)
    return tokens


def _draw_more(candidates: Candidates, place: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw again where candidates ask for it; later draws have noise of their own."""
    logits = candidates.logits
    counts, redrawn = candidates.num_draws, candidates.redrawn
    assert counts is not None
    assert redrawn is not None
    drawing = logits.masked_fill((counts <= 1).unsqueeze(1), NEG_INF)  # costs the others no draw
    for index in range(1, int(counts.max())):
        other = winner(drawing, seeds, positions, candidates.ids, Domain.EXTRA + index)
        better = logits.gather(1, other) > logits.gather(1, place)
        place = torch.where(better & (counts > index).unsqueeze(1), other, place)
    if bool(redrawn.any()):
        without = logits.scatter(1, place, NEG_INF)
        other = winner(without, seeds, positions, candidates.ids, Domain.EXTRA)
        left = (without > NEG_INF).any(1) & redrawn
        place = torch.where(left.unsqueeze(1), other, place)
    return place


def draw_dense(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    index: Tensor | None = None,
) -> Tensor:
    """A token of softmax(logits / temperature) of each row, [R] int64.

    logits [R, V] float32, or with an `index` [R] int64 those of some of the rows; temperature [R];
    seeds, positions [R] int64.
    """
    _, mass, _ = block_masses(logits, temperature, index)
    ids = torch.arange(mass.shape[1], device=logits.device).unsqueeze(0)
    block = winner(mass.double().log_(), seeds, positions, ids, Domain.BLOCK)
    ids = block * BLOCK + torch.arange(BLOCK, device=logits.device)
    valid = ids < logits.shape[1]
    row = torch.arange(len(seeds), device=logits.device) if index is None else index
    entries = logits[row.unsqueeze(1), ids.clamp(max=logits.shape[1] - 1)]
    valid &= entries > NEG_INF
    inside = within(entries / temperature.unsqueeze(1))
    token = winner(torch.where(valid, inside, NEG_INF), seeds, positions, ids, Domain.TOKEN)
    return ids.gather(1, token).squeeze(1)


def report(
    logits: Tensor, chosen: Tensor, count: int, normalised: bool
) -> tuple[list[float], list[Top]]:
    """The chosen tokens' logprobs (or logits) and each row's `count` best, for rows [R, V]."""
    # The largest logit and the sum are subtracted one after the other: their sum has too few digits
    # in float32 where logits are large.
    top, shift = torch.zeros(2, len(logits), 1, device=logits.device)
    if normalised:
        top, shift = log_sum_exp(logits)
    its = logits.gather(1, chosen.clamp(min=0).unsqueeze(1))
    own: list[float] = (its - top - shift).flatten().tolist()
    if count == 0:
        return own, [()] * len(own)
    values, ids = best(logits, count)
    return own, list(listed(pair, ids, values - top - shift))
