"""Contrastive decoding."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.logits.contrastive_decoding import ContrastiveDecoding
from engine.numerics import NEG_INF
from tests.support.logits import (
    Spec,
    apply_beside,
    bits,
    companions,
    hard_rows,
    kept,
    random_rows,
    softmax,
)

AMATEUR = {"cd_amateur": "small"}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"cd_alpha": 0.02},
    {"cd_alpha": 0.5, "cd_temperature": 0.5},
    {"cd_temperature": 2.0},
    {"cd_beta": 0.5},
    {"cd_beta": 0.0},
    {"cd_beta": 2.5, "cd_alpha": 0.003},
]


def contrasted(row: list[float], other: list[float], **params: Any) -> Tensor:
    beside = companions(torch.tensor([other]))
    return apply_beside(ContrastiveDecoding, [Spec(AMATEUR | params)], torch.tensor([row]), beside)[
        0
    ]


def naive(
    row: Tensor,
    other: Tensor,
    *,
    cd_alpha: float = 0.1,
    cd_beta: float | None = None,
    cd_temperature: float = 1.0,
) -> list[float]:
    """The formula, token by token in float64."""
    z, z_other = row.double().tolist(), other.double().tolist()
    p, p_other = softmax(row), softmax(other.double() / cd_temperature)
    least = cd_alpha * max(p)
    scores = []
    for token, prob in enumerate(p):
        if prob < least:
            scores.append(NEG_INF)
        elif cd_beta is None:
            scores.append(math.log(prob) - math.log(p_other[token]))
        else:
            scores.append((1 + cd_beta) * z[token] - cd_beta * z_other[token])
    return scores


def test_worked_numbers() -> None:
    expert = torch.tensor([0.6, 0.3, 0.05, 0.05]).log().tolist()
    amateur = torch.tensor([0.6, 0.1, 0.1, 0.2]).log().tolist()
    got = contrasted(expert, amateur)
    assert got.tolist() == pytest.approx([0.0, 1.098612, NEG_INF, NEG_INF], abs=1e-5)
    # The later form wants logits: 1.5 ln 0.6 - 0.5 ln 0.6, and 1.5 ln 0.3 - 0.5 ln 0.1.
    later = contrasted(expert, amateur, cd_beta=0.5)
    assert later.tolist() == pytest.approx([-0.510826, -0.654667, NEG_INF, NEG_INF], abs=1e-5)


@pytest.mark.parametrize("vocab_size", [5, 257, 1000])
def test_each_row_is_the_formula_at_its_own_settings(vocab_size: int) -> None:
    count = 10 * len(SETTINGS)
    logits, others = random_rows(count, vocab_size), random_rows(count, vocab_size, seed=1).flip(0)
    settings = [SETTINGS[row % len(SETTINGS)] for row in range(count)]
    neutral = set(range(3, count, 8))
    specs = [Spec({} if row in neutral else AMATEUR | one) for row, one in enumerate(settings)]
    of = [-1 if row in neutral else count - 1 - row for row in range(count)]

    got = apply_beside(ContrastiveDecoding, specs, logits, companions(others, of))

    for row in range(count):
        if row in neutral:
            assert torch.equal(bits(got[row]), bits(logits[row]))
            continue
        want = naive(logits[row], others[of[row]], **settings[row])
        assert kept(got[row]) == {token for token, one in enumerate(want) if one > NEG_INF}
        torch.testing.assert_close(got[row], torch.tensor(want), rtol=1e-5, atol=1e-4)


def test_an_alpha_of_one_keeps_the_likeliest_and_its_equals() -> None:
    got = contrasted([1.0, 3.0, 2.9999998, 3.0], [0.0, 1.0, 0.0, 0.0], cd_alpha=1.0)
    assert kept(got) == {1, 3}
    assert got[3] > got[1]  # the amateur thought less of it


def test_a_hot_amateur_says_nothing_and_a_cold_one_everything() -> None:
    row, other = [1.0, 0.8, 0.5], [2.0, 0.0, 1.0]
    hot = contrasted(row, other, cd_temperature=1e30)
    want = torch.tensor(row).log_softmax(0) + math.log(3)
    torch.testing.assert_close(hot, want, rtol=1e-5, atol=1e-5)
    cold = contrasted(row, other, cd_temperature=1e-3)
    assert cold.tolist() == pytest.approx([-0.885939, 1998.914061, 998.614061], abs=1e-3)
    assert contrasted(row, other, cd_temperature=1e-300).isfinite().all()


def test_a_beta_of_nothing_only_keeps_what_is_plausible() -> None:
    row = [2.0, 1.0, -3.0]
    assert contrasted(row, [0.0, 5.0, 9.0], cd_beta=0.0).tolist() == [2.0, 1.0, NEG_INF]


@pytest.mark.parametrize("params", [{}, {"cd_beta": 0.5}], ids=str)
def test_what_is_impossible_for_one_of_the_two(params: dict[str, Any]) -> None:
    got = contrasted([1.0, NEG_INF, NEG_INF, 0.5], [1.0, NEG_INF, 3.0, NEG_INF], **params)
    assert kept(got) == {0, 3}
    assert got[3] > got[0]
    assert got[3] < float("inf")


@pytest.mark.parametrize("params", [*SETTINGS, {"cd_beta": 1e300}, {"cd_alpha": 1e-300}], ids=str)
def test_hard_rows_keep_their_best_token(params: dict[str, Any]) -> None:
    logits = hard_rows(700)
    specs = [Spec(AMATEUR | params)] * len(logits)
    got = apply_beside(ContrastiveDecoding, specs, logits, companions(logits.roll(1, 0)))
    assert not got.isnan().any()
    assert got.amax() < float("inf")
    for before, after in zip(logits, got, strict=True):
        assert after[before.argmax()] > NEG_INF
        assert not kept(after) - kept(before)
