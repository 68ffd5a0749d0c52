"""Locally typical sampling."""

import math

import pytest
import torch
from torch import Tensor
from transformers import TypicalLogitsWarper

from engine.logits.typical_p import TypicalP
from engine.numerics import NEG_INF
from tests.support.logits import DIST_P, assert_filters_like, kept, one_row


def oracle(value: float, scores: Tensor) -> Tensor:
    want: Tensor = TypicalLogitsWarper(value)(None, scores)
    return want


@pytest.mark.parametrize("vocab_size", [7, 256, 257, 1000])
def test_each_row_matches_transformers_at_its_own_value(vocab_size: int) -> None:
    assert_filters_like(TypicalP, "typical_p", [0.05, 0.2, 0.5, 0.9, 0.95], oracle, vocab_size)


@pytest.mark.parametrize(
    ("typical_p", "survivors"),
    [(0.2, {1}), (0.6, {0, 1}), (0.8, {0, 1, 2}), (0.95, {0, 1, 2, 3})],
)
def test_worked_numbers(typical_p: float, survivors: set[int]) -> None:
    assert kept(one_row(TypicalP, DIST_P, typical_p=typical_p)) == survivors


@pytest.mark.parametrize(("vocab_size", "typical_p", "count"), [(10, 0.25, 3), (1000, 0.4995, 500)])
def test_of_equally_typical_tokens_those_with_the_lowest_ids_stay(
    vocab_size: int, typical_p: float, count: int
) -> None:
    got = one_row(TypicalP, torch.full((vocab_size,), 1.25), typical_p=typical_p)
    assert kept(got) == set(range(count))


@pytest.mark.parametrize("likely", [1, 2, 5])
def test_of_a_likelier_and_a_less_likely_token_equally_near_the_lowest_id_stays(
    likely: int,
) -> None:
    # The mean logit is 0, and as far from the one token as from the four.
    logits = torch.full((6,), -math.log(2.0))
    logits[0], logits[likely] = 0.0, math.log(2.0)
    assert kept(one_row(TypicalP, logits, typical_p=0.25)) == {0, 1}


@pytest.mark.parametrize("typical_p", [1e-300, 1e-20])
def test_the_most_typical_token_always_stays(typical_p: float) -> None:
    assert kept(one_row(TypicalP, DIST_P, typical_p=typical_p)) == {1}


def test_dropped_tokens_have_no_part_in_the_entropy() -> None:
    padded = torch.full((900,), NEG_INF)
    padded[[3, 300, 600, 700, 899]] = DIST_P
    assert kept(one_row(TypicalP, padded, typical_p=0.2)) == {300}
    assert kept(one_row(TypicalP, padded, typical_p=0.999)) == {3, 300, 600, 700, 899}
