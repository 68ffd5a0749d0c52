"""Min-p."""

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper

from engine.logits.min_p import MinP
from engine.logits.temperature import Temperature
from tests.support.logits import DIST_P, ROW_A, assert_filters_like, kept, one_row


def oracle(value: float, scores: Tensor) -> Tensor:
    want: Tensor = MinPLogitsWarper(value)(None, scores)
    return want


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 1000])
def test_each_row_matches_transformers_at_its_own_value(vocab_size: int) -> None:
    assert_filters_like(MinP, "min_p", [0.001, 0.02, 0.1, 0.3, 0.9], oracle, vocab_size)


def test_worked_numbers() -> None:
    assert kept(one_row(MinP, DIST_P, min_p=0.3)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("temperature", "survivors"), [(0.5, {0, 1}), (1.0, {0, 1, 2}), (2.0, {0, 1, 2, 3, 4})]
)
def test_a_higher_temperature_keeps_more(temperature: float, survivors: set[int]) -> None:
    logits = one_row(Temperature, ROW_A, temperature=temperature)
    assert kept(one_row(MinP, logits, min_p=0.1)) == survivors


def test_one_keeps_the_best_and_its_equals() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9999998, 3.0, -1.0])
    assert kept(one_row(MinP, logits, min_p=1.0)) == {1, 3}
