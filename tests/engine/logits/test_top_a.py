"""Top-a."""

import pytest
import torch
from torch import Tensor

from engine.logits.top_a import TopA
from engine.numerics import NEG_INF
from tests.support.logits import DIST_P, assert_filters_like, kept, one_row, only, softmax


def oracle(top_a: float, scores: Tensor) -> Tensor:
    (row,) = scores
    probs = softmax(row)
    floor = top_a * max(probs) ** 2
    best = probs.index(max(probs))
    return only(row, [i for i, prob in enumerate(probs) if prob >= floor or i == best])[None]


@pytest.mark.parametrize("vocab_size", [5, 257, 600])
def test_each_row_matches_a_naive_loop_at_its_own_value(vocab_size: int) -> None:
    assert_filters_like(TopA, "top_a", [0.001, 0.05, 0.2, 0.5, 0.999], oracle, vocab_size)


@pytest.mark.parametrize(
    ("top_a", "survivors"),
    [(0.5, {0, 1, 2, 3}), (1.0, {0, 1}), (0.64, {0, 1, 2}), (0.0, {0, 1, 2, 3, 4})],
)
def test_worked_numbers(top_a: float, survivors: set[int]) -> None:
    assert kept(one_row(TopA, DIST_P, top_a=top_a)) == survivors


def test_the_floor_is_low_where_the_model_is_unsure() -> None:
    sure, unsure = torch.tensor([6.0, 2.0, 0.0]), torch.tensor([0.3, 0.2, 0.0])
    assert kept(one_row(TopA, sure, top_a=0.5)) == {0}
    assert kept(one_row(TopA, unsure, top_a=0.5)) == {0, 1, 2}


def test_the_best_stay_whatever_the_value() -> None:
    row = torch.full((300,), -5.0)
    row[[7, 100]] = 40.0
    assert kept(one_row(TopA, row, top_a=1.0)) == {7, 100}
    row[100] = NEG_INF
    assert kept(one_row(TopA, row, top_a=1.0)) == {7}


def test_dropped_tokens_have_no_mass() -> None:
    padded = torch.full((900,), NEG_INF)
    padded[[3, 300, 600, 700, 899]] = DIST_P
    assert kept(one_row(TopA, padded, top_a=0.5)) == {3, 300, 600, 700}
