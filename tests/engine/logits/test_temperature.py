"""Temperature, and llama.cpp's dynamic one."""

import math
import random
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper

from engine.logits import ORDERS, STAGES
from engine.logits.temperature import Temperature
from engine.numerics import NEG_INF
from tests.support.logits import (
    DIST_P,
    ROW_A,
    Spec,
    apply,
    bits,
    entropy,
    kept,
    new_lanes,
    one_row,
    process,
    random_rows,
    softmax,
)


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


# -- with a range


@pytest.mark.parametrize(
    ("temperature", "exponent", "want"),
    [(0.8, 1.0, 1.165098), (0.8, 2.0, 1.048394), (0.3, 1.0, 0.692078)],
)
def test_worked_numbers_of_the_dynamic_temperature(
    temperature: float, exponent: float, want: float
) -> None:
    got = one_row(
        Temperature,
        DIST_P,
        temperature=temperature,
        dynatemp_range=0.5,
        dynatemp_exponent=exponent,
    )
    torch.testing.assert_close(got, DIST_P / want, rtol=2e-6, atol=2e-6)


def test_each_row_matches_the_formula_at_its_own_values() -> None:
    rng = random.Random(0)
    rows = random_rows(300, 700)
    rows[::5, ::2] = NEG_INF
    params: list[dict[str, Any]] = [
        {
            "temperature": rng.choice([0.2, 0.8, 1.0, 2.0]),
            "dynatemp_range": rng.choice([0.0, 0.3, 0.8, 4.0]),
            "dynatemp_exponent": rng.choice([0.3, 1.0, 2.0]),
        }
        for _ in rows
    ]

    got = apply(Temperature, [Spec(one) for one in params], rows)

    for row, one in enumerate(params):
        temperature, reach = one["temperature"], one["dynatemp_range"]
        if reach:
            low, high = max(0.0, temperature - reach), temperature + reach
            share = entropy(softmax(rows[row])) / math.log(len(kept(rows[row])))
            temperature = low + (high - low) * share ** one["dynatemp_exponent"]
        torch.testing.assert_close(got[row], rows[row] / temperature, rtol=2e-5, atol=1e-5)


def test_a_row_of_one_token_has_the_plain_temperature() -> None:
    row = torch.full((700,), NEG_INF)
    row[300] = 3.0
    got = one_row(Temperature, row, temperature=0.5, dynatemp_range=0.4)
    assert got[300] == 6.0
    assert kept(got) == {300}


def test_a_row_as_unsure_as_can_be_has_the_highest_temperature() -> None:
    for count in (2, 5, 300):
        row = torch.full((700,), NEG_INF)
        row[:count] = 3.0
        got = one_row(Temperature, row, temperature=1.0, dynatemp_range=0.5, dynatemp_exponent=1e9)
        torch.testing.assert_close(got[:count], row[:count] / 1.5)


def test_a_certain_row_may_become_greedy() -> None:
    row = torch.full((700,), -60.0)
    row[[300, 400]] = torch.tensor([0.0, -40.0])
    assert kept(one_row(Temperature, row, temperature=0.5, dynatemp_range=0.5)) == {300}
    assert kept(one_row(Temperature, row, temperature=0.5, dynatemp_range=0.3)) == set(range(700))


def test_in_llamas_order_the_entropy_is_of_what_filters_left() -> None:
    params: dict[str, Any] = {"temperature": 0.8, "dynatemp_range": 0.5, "top_k": 3}
    left = entropy([0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85])
    for order, want in (
        ("vllm", 1.165098),
        ("hf", 1.165098),
        ("llama.cpp", 0.3 + left / math.log(3)),
    ):
        (got,) = process(STAGES, [Spec(params | {"sampler_order": order})], DIST_P[None], ORDERS)
        assert kept(got) == {0, 1, 2}
        torch.testing.assert_close(got[:3], DIST_P[:3] / want, rtol=2e-6, atol=2e-6)


def test_a_range_is_wanted_at_any_temperature_but_zero() -> None:
    stage = Temperature(new_lanes(1, 1))
    assert stage.admit(0, Spec({"dynatemp_range": 0.1}).request)
    assert not stage.admit(0, Spec({"dynatemp_exponent": 2.0}).request)
    assert not stage.admit(0, Spec({"dynatemp_range": 0.1, "temperature": 0.0}).request)
