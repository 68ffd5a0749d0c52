"""Candidates: a few tokens of each row, and what is right where they are not enough."""

from copy import copy

import pytest
import torch
from torch import Tensor

from engine.logits import STAGES, candidates
from engine.logits.candidates import Candidates
from engine.logits.pipeline import run_filters
from engine.logits.stage import Filter, Stage
from engine.logits.top_k import TopK
from engine.numerics import NEG_INF
from tests.support.logits import (
    EXAMPLES,
    Spec,
    apply,
    bits,
    examples,
    hard_rows,
    lanes_for,
    place,
    process,
    random_rows,
    rows_of,
)

VOCAB = 700
FILTERS = [stage for stage in STAGES if issubclass(stage, Filter)]


def rows() -> Tensor:
    """Many ties, few, and none."""
    logits = random_rows(24, VOCAB)
    return torch.cat((hard_rows(VOCAB), logits, logits.round(), (logits * 8).round()))


@pytest.mark.parametrize("width", [1, 3, 40, 256])
@pytest.mark.parametrize("stage", FILTERS, ids=lambda stage: stage.__name__)
def test_a_filter_keeps_of_a_few_candidates_what_it_would_of_the_whole_row(
    monkeypatch: pytest.MonkeyPatch, stage: type[Stage], width: int
) -> None:
    logits = rows()
    for params in examples(stage.fields, 12):
        specs = [Spec(params, seed=row) for row in range(len(logits))]
        monkeypatch.setattr(candidates, "WIDTH", VOCAB)
        want = apply(stage, specs, logits)
        monkeypatch.setattr(candidates, "WIDTH", width)
        assert torch.equal(bits(apply(stage, specs, logits)), bits(want)), params


@pytest.mark.parametrize("width", [1, 3, 40, 256])
def test_so_do_all_filters_together(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    logits = torch.cat((rows(), random_rows(200, VOCAB)))
    fields = [name for stage in FILTERS for name in stage.fields]
    specs = [Spec(params, seed=5) for params in examples(fields, len(logits))]
    monkeypatch.setattr(candidates, "WIDTH", VOCAB)
    want = process(FILTERS, specs, logits)
    monkeypatch.setattr(candidates, "WIDTH", width)
    assert torch.equal(process(FILTERS, specs, logits) > NEG_INF, want > NEG_INF)


def test_only_rows_that_need_more_candidates_are_looked_at_whole() -> None:
    values = [10, 400, 256, 257, 0]
    specs = [Spec({"top_k": value}) for value in values]
    lanes, lane_ids = lanes_for(specs, VOCAB)
    stage = TopK(lanes)
    for lane, spec in zip(lane_ids, specs, strict=True):
        place(lanes, lane, spec, stage)
    logits = random_rows(5, VOCAB)

    first, again = run_filters([stage], logits, rows_of(specs, lane_ids))

    assert first.subset is None
    assert again.subset == [1, 3]
    assert (first.candidates.width, again.candidates.width) == (256, VOCAB)
    assert first.candidates.tail.tolist() == [False, False, False, False, True]
    assert [int(row.sum()) for row in again.candidates.alive] == [400, 257]


def test_the_distribution_counts_the_tail() -> None:
    logits = random_rows(6, VOCAB)
    few, all_of_it = Candidates(logits, 20), Candidates(logits, VOCAB)
    temperature = torch.full((6, 1), 0.7)
    for one in (few, all_of_it):
        one.divide(temperature)
    first = torch.arange(6).unsqueeze(1) == 0
    numbers = [
        (one.total, one.entropy, one.top, one.deviation(first | True), one.deviation(first)[:1])
        for one in (few, all_of_it)
    ]
    torch.testing.assert_close(*numbers, rtol=1e-6, atol=1e-6)
    assert (few.least >= few.logits[:, -1:]).all()
    torch.testing.assert_close(few.probs, all_of_it.probs[:, :20], rtol=1e-6, atol=1e-9)


def test_what_is_dropped_no_longer_counts() -> None:
    logits = random_rows(6, VOCAB)
    some = Candidates(logits, 20)
    everywhere = torch.ones(6, 1, dtype=torch.bool)
    some.keep(torch.arange(20).expand(6, -1) % 2 == 0, active=everywhere, inside=everywhere)
    assert not some.tail.any()
    left = some.dense()
    exact = left.double().logsumexp(1, keepdim=True)
    torch.testing.assert_close(some.total, exact, rtol=1e-6, atol=1e-6)
    assert (left > NEG_INF).sum(1).tolist() == [10] * 6
    torch.testing.assert_close(some.probs.sum(1), torch.ones(6))


@pytest.mark.parametrize("width", [20, VOCAB])
def test_a_floor_in_the_tail_and_a_hole_in_the_candidates_leave_rows_whole(width: int) -> None:
    logits = random_rows(6, VOCAB)
    some = Candidates(logits, width)
    some.divide(torch.full((6, 1), 0.5))
    everywhere = torch.ones(6, 1, dtype=torch.bool)
    floor = (logits / 0.5).sort(1, descending=True)[0][:, 300:301]
    some.keep_above(floor, active=everywhere)
    hole = torch.arange(some.width).expand(6, -1) == 1
    some.drop(hole, sure=everywhere)

    second = logits.argsort(1, descending=True)[:, 1:2]
    want = (logits / 0.5).masked_fill(logits / 0.5 < floor, NEG_INF).scatter(1, second, NEG_INF)

    assert not some.unsure.any()
    assert some.tail.tolist() == [width < VOCAB] * 6
    assert torch.equal(some.dense(), want)
    assert some.count.tolist() == [[300]] * 6
    exact = want.double().logsumexp(1, keepdim=True)
    torch.testing.assert_close(some.total, exact, rtol=1e-6, atol=1e-6)
    spread = torch.stack([row[row > NEG_INF].double().std(correction=0) for row in want])
    torch.testing.assert_close(some.deviation(everywhere)[:, 0].double(), spread, rtol=1e-5, atol=0)
    for rank, alive in ((0, True), (1, False), (2, True), (299, True), (301, False)):
        token = logits.argsort(1, descending=True)[:, rank]
        prob = want.double().softmax(1).gather(1, token[:, None])
        torch.testing.assert_close(some.probs_of(token).double(), prob, rtol=1e-4, atol=0)
        assert bool((prob > 0).all()) is alive


def test_a_row_that_needs_more_gets_eight_times_as_many_at_a_time() -> None:
    specs = [Spec({"top_k": value}) for value in (10, 300, 3000)]
    lanes, lane_ids = lanes_for(specs, 5000)
    stage = TopK(lanes)
    for lane, spec in zip(lane_ids, specs, strict=True):
        place(lanes, lane, spec, stage)
    parts = run_filters([stage], random_rows(3, 5000), rows_of(specs, lane_ids))
    assert [(part.subset, part.candidates.width) for part in parts] == [
        (None, 256),
        ([1, 2], 2048),
        ([2], 5000),
    ]


def test_nobody_looks_for_the_best_until_a_filter_asks() -> None:
    logits = random_rows(2, VOCAB)
    some = Candidates(logits)
    some.divide(torch.full((2, 1), 2.0))
    assert not some.ranked
    assert torch.equal(some.dense(), logits / 2.0)
    assert some.ids.shape == (2, 256)
    assert some.logits.shape == (2, 256)
    assert some.ranked


def test_there_are_examples_of_every_filter() -> None:
    assert {name for stage in FILTERS for name in stage.fields} <= EXAMPLES.keys()


@pytest.mark.parametrize("index", [None, torch.tensor([2, 0, 3])])
def test_a_shallow_copy_keeps_what_it_has_seen(index: Tensor | None) -> None:
    logits = random_rows(4, VOCAB)
    before = logits.clone()
    some = Candidates(logits, 8, index)
    count = len(some.temperature)
    everywhere = torch.ones(count, 1, dtype=torch.bool)
    for floor in (-1.0, -0.5, 0.0):
        was = copy(some)
        kept = was.dense().clone()
        some.keep_above(torch.full((count, 1), floor), active=everywhere)
        assert torch.equal(was.dense(), kept)
        rows = logits if index is None else logits[index]
        assert torch.equal(some.dense(), rows.masked_fill(rows < floor, NEG_INF))
    assert torch.equal(logits, before)
