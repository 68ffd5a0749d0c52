"""Temperature."""

import pytest
import torch
from transformers import TemperatureLogitsWarper

from engine.logits.temperature import Temperature
from engine.numerics import NEG_INF
from tests.support.logits import ROW_A, Spec, apply, bits, one_row, random_rows


@pytest.mark.parametrize(
    ("temperature", "probs"),
    [
        (0.5, [0.864704, 0.117025, 0.015838, 0.002143, 0.000290]),
        (1.0, [0.636409, 0.234122, 0.086129, 0.031685, 0.011656]),
        (2.0, [0.428656, 0.259993, 0.157694, 0.095646, 0.058012]),
    ],
)
def test_worked_numbers(temperature: float, probs: list[float]) -> None:
    got = one_row(Temperature, ROW_A, temperature=temperature).softmax(0)
    torch.testing.assert_close(got, torch.tensor(probs), rtol=0, atol=1e-6)


def test_each_row_matches_transformers_at_its_own_value() -> None:
    values = [(0.01, 0.3, 0.7, 1.0, 1.1, 2.0)[row % 6] for row in range(300)]
    logits = random_rows(300, 1000)

    got = apply(Temperature, [Spec({"temperature": value}) for value in values], logits)

    for row, value in enumerate(values):
        want = TemperatureLogitsWarper(value)(None, logits[row, None])[0]
        torch.testing.assert_close(got[row], want, rtol=1e-6, atol=0)


def test_a_greedy_row_beside_sampled_ones_is_left_alone() -> None:
    logits = random_rows(2, 300)
    got = apply(Temperature, [Spec({"temperature": 0.0}), Spec({"temperature": 0.5})], logits)
    assert torch.equal(bits(got[0]), bits(logits[0]))
    assert torch.equal(got[1], logits[1] * 2)


def test_banned_tokens_stay_banned() -> None:
    got = one_row(Temperature, torch.tensor([NEG_INF, 1.0]), temperature=2.0)
    assert got.tolist() == [NEG_INF, 0.5]
