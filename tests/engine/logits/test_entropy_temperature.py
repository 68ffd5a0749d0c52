"""Entropy-based dynamic temperature."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.logits import ORDERS, STAGES
from engine.logits.entropy_temperature import EntropyTemperature
from engine.logits.temperature import Temperature
from engine.numerics import NEG_INF
from tests.support.logits import (
    DIST_P,
    Spec,
    bits,
    entropy,
    kept,
    new_lanes,
    process,
    random_rows,
    softmax,
)


def temperature_of(before: Tensor, after: Tensor) -> float:
    """What a row has been divided by, from its two likeliest tokens that are left."""
    best = after.sort(descending=True).indices[:2]
    (high, low), (high_then, low_then) = before[best].tolist(), after[best].tolist()
    return float((high - low) / (high_then - low_then))


def processed(row: Tensor, **params: Any) -> Tensor:
    return process(STAGES, [Spec(params)], row[None], ORDERS)[0]


@pytest.mark.parametrize(
    ("base", "theta", "want"), [(1.0, 1.0, 0.851916), (0.7, 1.5, 0.550419), (1.0, 0.1, 0.984101)]
)
def test_worked_numbers(base: float, theta: float, want: float) -> None:
    got = processed(DIST_P, temperature=base, edt_theta=theta)
    torch.testing.assert_close(got, DIST_P / want, rtol=2e-6, atol=2e-6)


def test_each_row_matches_the_formula_at_its_own_values() -> None:
    rng = random.Random(0)
    rows = random_rows(300, 700)
    rows[::5, ::2] = NEG_INF
    rows[::3] *= 2
    params: list[dict[str, Any]] = [
        {
            "edt_theta": rng.choice([0.01, 0.1, 1.0, 4.0]),
            "edt_base": rng.choice([0.3, 0.8, 0.95]),
            "temperature": rng.choice([0.5, 1.0, 1.7]),
        }
        for _ in rows
    ]
    params[17] = {}

    got = process([EntropyTemperature, Temperature], [Spec(one) for one in params], rows)

    assert torch.equal(bits(got[17]), bits(rows[17]))
    num_cold = 0
    for row, one in enumerate(params):
        if not one:
            continue
        height = entropy(softmax(rows[row]))
        want = one["temperature"] * one["edt_base"] ** (one["edt_theta"] / height)
        if want < 1e-4:
            assert kept(got[row]) == {int(rows[row].argmax())}
            num_cold += 1
        elif want > 1.01e-4:
            torch.testing.assert_close(got[row], rows[row] / want, rtol=1e-4, atol=1e-5)
    assert 5 < num_cold < 100


def test_the_more_certain_the_model_the_colder() -> None:
    got = [
        temperature_of(row, processed(row, edt_theta=0.5))
        for row in (DIST_P * scale for scale in (0.0001, 0.5, 1.0, 2.0, 3.0))
    ]
    assert got == sorted(got, reverse=True)
    assert 0.5 < got[-1] < got[0] < 1.0


@pytest.mark.parametrize("theta", [0.1, 1.0, 1e300])
def test_a_single_token_is_left_as_it_is(theta: float) -> None:
    row = torch.full((700,), NEG_INF)
    row[300] = 4.0
    assert kept(processed(row, edt_theta=theta)) == {300}
    row[5], row[600] = -90.0, -90.0  # certain, as far as float32 can say
    assert kept(processed(row, edt_theta=theta)) == {300}


def test_a_temperature_near_zero_takes_the_first_of_the_likeliest() -> None:
    row = torch.full((700,), -1.0)
    row[[400, 500]] = 30.0  # entropy ln 2
    for params in (
        {"edt_theta": 1e300},
        {"edt_theta": 40.0},  # 0.8^(40 / ln 2) = 2.6e-6
        {"edt_theta": 20.0, "temperature": 0.05},  # 0.0016 * 0.05
        {"edt_theta": 20.0, "temperature": 0.05, "sampler_order": "llama.cpp"},
    ):
        assert kept(processed(row, **params)) == {400}, params
    for params in ({"edt_theta": 20.0}, {"temperature": 0.05}, {"edt_theta": 1e-300}):
        assert kept(processed(row, **params)) >= {400, 500}, params


def test_the_entropy_is_of_the_whole_row_but_where_filters_come_first() -> None:
    whole = {"edt_theta": 1.0, "top_k": 3}
    assert temperature_of(DIST_P, processed(DIST_P, **whole)) == pytest.approx(0.851916, abs=1e-5)
    last = whole | {"sampler_order": "llama.cpp"}
    left = entropy([0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85])
    want = 0.8 ** (1.0 / left)
    assert temperature_of(DIST_P, processed(DIST_P, **last)) == pytest.approx(want, abs=1e-5)


def test_the_entropy_is_that_before_the_temperature() -> None:
    got = processed(DIST_P, edt_theta=1.0, temperature=1.9)
    assert temperature_of(DIST_P, got) == pytest.approx(1.9 * 0.851916, abs=1e-5)


def test_without_theta_it_is_not_wanted() -> None:
    stage = EntropyTemperature(new_lanes(1, 1))
    assert not stage.admit(0, Spec({"edt_base": 0.5}).request)
    assert stage.admit(0, Spec({"edt_theta": 0.5}).request)
