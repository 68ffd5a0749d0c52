"""Top-nσ."""

import math

import pytest
import torch
from torch import Tensor

from engine.logits.temperature import Temperature
from engine.logits.top_n_sigma import TopNSigma
from engine.numerics import NEG_INF
from tests.support.logits import ROW_A, assert_filters_like, kept, one_row, random_rows


def naive(sigmas: float, scores: Tensor) -> Tensor:
    """The formula over a row, in float64."""
    row: list[float] = scores[0].double().tolist()
    alive = [score for score in row if score > NEG_INF]
    mean = math.fsum(alive) / len(alive)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in alive) / len(alive))
    return scores.masked_fill(scores.double() < max(alive) - sigmas * deviation, NEG_INF)


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 1000])
def test_each_row_matches_a_naive_loop_at_its_own_value(vocab_size: int) -> None:
    assert_filters_like(TopNSigma, "top_n_sigma", [0.1, 0.5, 1.0, 1.7, 3.0], naive, vocab_size)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_makes_no_difference(temperature: float) -> None:
    logits = one_row(Temperature, ROW_A, temperature=temperature)
    assert kept(one_row(TopNSigma, logits, top_n_sigma=1.0)) == {0, 1}
    for row in random_rows(8, 700):
        warmer = one_row(Temperature, row, temperature=temperature)
        kept_warmer = kept(one_row(TopNSigma, warmer, top_n_sigma=1.3))
        assert kept_warmer == kept(one_row(TopNSigma, row, top_n_sigma=1.3))


def test_the_deviation_is_the_populations() -> None:
    # Dividing by n - 1 would move the cut from 0.64 to 0.48, and token 1 would stay.
    logits = torch.tensor([2.0, 0.5, 0.0, -1.0, -2.0])
    assert kept(one_row(TopNSigma, logits, top_n_sigma=1.0)) == {0}


def test_dropped_tokens_do_not_count() -> None:
    padded = torch.full((900,), NEG_INF)
    padded[[3, 300, 600, 700, 899]] = ROW_A
    assert kept(one_row(TopNSigma, padded, top_n_sigma=1.0)) == {3, 300}


def test_equal_tokens_all_stay_and_so_does_a_single_one() -> None:
    assert kept(one_row(TopNSigma, torch.full((300,), 0.1), top_n_sigma=0.01)) == set(range(300))
    single = torch.full((300,), NEG_INF)
    single[290] = -5.0
    assert kept(one_row(TopNSigma, single, top_n_sigma=0.01)) == {290}


@pytest.mark.parametrize("value", [0.0, -1.0, -1e300])
def test_zero_or_less_is_off(value: float) -> None:
    assert kept(one_row(TopNSigma, ROW_A, top_n_sigma=value)) == set(range(5))
