"""Epsilon and eta sampling."""

import pytest
import torch
from torch import Tensor
from transformers import EpsilonLogitsWarper, EtaLogitsWarper

from engine.logits.cutoffs import EpsilonCutoff, EtaCutoff
from engine.logits.stage import Stage
from engine.numerics import NEG_INF
from tests.support.logits import DIST_P, assert_filters_like, kept, one_row


def epsilon(value: float, scores: Tensor) -> Tensor:
    want: Tensor = EpsilonLogitsWarper(value)(None, scores)
    return want


def eta(value: float, scores: Tensor) -> Tensor:
    want: Tensor = EtaLogitsWarper(value)(None, scores)
    return want


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 1000])
def test_each_row_matches_transformers_at_its_own_value(vocab_size: int) -> None:
    values = [1e-5, 3e-4, 4e-3, 0.05, 0.6]
    assert_filters_like(EpsilonCutoff, "epsilon_cutoff", values, epsilon, vocab_size)
    assert_filters_like(EtaCutoff, "eta_cutoff", values, eta, vocab_size)


@pytest.mark.parametrize(
    ("stage", "name", "value", "survivors"),
    [
        (EpsilonCutoff, "epsilon_cutoff", 0.12, {0, 1, 2}),
        (EtaCutoff, "eta_cutoff", 0.12, {0, 1, 2, 3}),  # cut at 0.086
        (EtaCutoff, "eta_cutoff", 0.2, {0, 1, 2}),  # cut at 0.111
    ],
)
def test_worked_numbers(stage: type[Stage], name: str, value: float, survivors: set[int]) -> None:
    assert kept(one_row(stage, DIST_P, **{name: value})) == survivors


def test_the_likeliest_stays_where_nothing_reaches_the_cutoff() -> None:
    assert kept(one_row(EpsilonCutoff, DIST_P, epsilon_cutoff=0.99)) == {0}
    padded = torch.full((900,), NEG_INF)
    padded[[3, 300, 600, 700, 899]] = DIST_P.flip(0)
    assert kept(one_row(EpsilonCutoff, padded, epsilon_cutoff=0.99)) == {899}


def test_dropped_tokens_have_no_part_in_the_entropy() -> None:
    padded = torch.full((900,), NEG_INF)
    padded[[3, 300, 600, 700, 899]] = DIST_P
    assert kept(one_row(EtaCutoff, padded, eta_cutoff=0.2)) == {3, 300, 600}
