"""Tail-free sampling."""

import math

import pytest
import torch
from torch import Tensor

from engine.logits.pipeline import run_filters
from engine.logits.tfs import TailFree
from engine.numerics import NEG_INF
from engine.types import Rows
from tests.support.logits import (
    Spec,
    assert_filters_like,
    kept,
    likeliest,
    new_lanes,
    one_row,
    only,
    place,
    softmax,
)

CURVE = torch.tensor([0.5, 0.25, 0.12, 0.08, 0.05]).log()


def oracle(tfs: float, scores: Tensor) -> Tensor:
    """The formula, step by step."""
    (row,) = scores
    probs = softmax(row)
    ranks = likeliest(probs)
    curve = [probs[token_id] for token_id in ranks]
    bends = [abs((a - b) - (b - c)) for a, b, c in zip(curve, curve[1:], curve[2:], strict=False)]
    total = math.fsum(bends)
    if not total > 0.0:
        return scores
    passed, gone = 0.0, {len(ranks) - 1}
    for index, bend in enumerate(bends):
        passed += bend
        if passed / total > tfs:
            gone.add(index + 1)
    return only(row, [ranks[r] for r in range(len(ranks)) if r == 0 or r not in gone])[None]


@pytest.mark.parametrize("vocab_size", [3, 5, 257, 600])
def test_each_row_matches_a_naive_loop_at_its_own_value(vocab_size: int) -> None:
    values = [0.05, 0.5, 0.8, 0.95, 0.99]
    assert_filters_like(TailFree, "tfs", values, oracle, vocab_size)


@pytest.mark.parametrize(
    ("tfs", "survivors"),
    [(0.0, {0}), (0.5, {0}), (0.545, {0}), (0.546, {0, 1}), (0.9, {0, 1}), (0.954, {0, 1}),
     (0.96, {0, 1, 2}), (0.99999, {0, 1, 2}), (1.0, {0, 1, 2, 3, 4})],
)  # fmt: skip
def test_worked_numbers(tfs: float, survivors: set[int]) -> None:
    assert kept(one_row(TailFree, CURVE, tfs=tfs)) == survivors


def test_a_token_stays_where_exactly_so_much_has_been_done() -> None:
    halves = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()  # two bends of equal size
    for tfs, survivors in ((0.49999, {0}), (0.5, {0, 1})):
        assert kept(one_row(TailFree, halves, tfs=tfs)) == survivors


@pytest.mark.parametrize("vocab_size", [3, 50, 257, 700])
@pytest.mark.parametrize("tfs", [0.0, 0.5, 0.999])
def test_a_flat_curve_has_no_tail(vocab_size: int, tfs: float) -> None:
    assert kept(one_row(TailFree, torch.full((vocab_size,), 1.5), tfs=tfs)) == set(
        range(vocab_size)
    )


@pytest.mark.parametrize("row", [[1.0], [3.0, -2.0], [3.0, NEG_INF, 1.0], [NEG_INF, NEG_INF, 0.5]])
def test_two_tokens_make_no_curve(row: list[float]) -> None:
    before = torch.tensor(row)
    assert kept(one_row(TailFree, before, tfs=0.5)) == kept(before)


def test_dropped_tokens_are_not_part_of_the_curve() -> None:
    padded = torch.full((900,), NEG_INF)
    padded[[3, 300, 600, 700, 899]] = CURVE
    assert kept(one_row(TailFree, padded, tfs=0.9)) == {3, 300}
    assert kept(one_row(TailFree, padded, tfs=0.96)) == {3, 300, 600}


def test_a_long_flat_end_is_looked_at_whole() -> None:
    """Its many small bends could move the limit."""
    lanes = new_lanes(2, 1)
    stage = TailFree(lanes)
    logits = torch.linspace(0.0, -1.0, 700).repeat(2, 1)
    logits[1, :3] = torch.tensor([30.0, 29.0, 28.5])
    for lane in (0, 1):
        place(lanes, lane, Spec({"tfs": 0.97}), stage)
    _, again = run_filters([stage], logits, Rows.build([0, 1], [0, 0], "cpu"))
    assert again.subset == [0]
    assert kept(again.candidates.dense()[0]) == kept(oracle(0.97, logits[:1])[0])
