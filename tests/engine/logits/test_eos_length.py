"""Moving the end of the text: penalties on early ends, and on late ones."""

import math
import random
from typing import Any

import pytest
import torch
from transformers import ExponentialDecayLengthPenalty as TheirDecay

from engine.logits import STAGES
from engine.logits.eos_length import EosLengthPenalty, ExponentialDecayLengthPenalty
from engine.numerics import NEG_INF
from tests.support.logits import (
    END,
    Spec,
    apply,
    bits,
    kept,
    new_lanes,
    process,
    random_rows,
)


def after(num_generated: int, params: dict[str, Any], score: float) -> float:
    """The score of the end-of-sequence token after so many output tokens."""
    spec = Spec(params, prompt=[1] * 7, output=[3] * num_generated)
    row = torch.zeros(1, 9)
    row[0, END] = score
    (got,) = process([EosLengthPenalty, ExponentialDecayLengthPenalty], [spec], row)
    assert got[got != 0].numel() <= 1  # no other token has changed
    return float(got[END])


# -- early ends


@pytest.mark.parametrize(
    ("num_generated", "want"), [(0, -2.0), (25, -1.0), (50, 0.0), (99, 1.96), (100, 2), (900, 2)]
)
def test_worked_numbers_of_the_early_end(num_generated: int, want: float) -> None:
    params = {"eos_length_penalty": 4.0, "eos_length_window": 100}
    assert after(num_generated, params, 2.0) == pytest.approx(want, abs=1e-6)


def test_each_row_matches_the_formula_at_its_own_values_and_length() -> None:
    rng = random.Random(0)
    logits = random_rows(300, 600)
    specs = []
    for row in range(300):
        params = {
            "eos_length_penalty": rng.choice([0.0, 0.5, 3.0, 20.0]),
            "eos_length_window": rng.choice([1, 2, 7, 30]),
            "stop_token_ids": [7, 300, END][: row % 4],
        }
        ends = rng.choice([(END,), (END, 5, 599), ()])
        length = rng.randint(0, 35)
        specs.append(Spec(params, [1] * rng.randint(1, 9), [3] * length, ends=ends))

    got = apply(EosLengthPenalty, specs, logits)

    want = logits.double()
    for row, spec in enumerate(specs):
        its = spec.request.params
        missing = max(0.0, 1.0 - len(spec.output) / its.eos_length_window)
        for token_id in {*spec.ends, *its.stop_token_ids}:
            want[row, token_id] -= its.eos_length_penalty * missing
    torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(bits(got[:, 20:200]), bits(logits[:, 20:200]))


def test_without_an_end_it_is_not_wanted() -> None:
    stage = EosLengthPenalty(new_lanes(1, 1))
    params: dict[str, Any] = {"eos_length_penalty": 1.0}
    assert stage.admit(0, Spec(params).request)
    assert not stage.admit(0, Spec(params, ends=()).request)
    assert stage.admit(0, Spec(params | {"stop_token_ids": [5]}, ends=()).request)
    assert not stage.admit(0, Spec({"eos_length_window": 5}).request)


# -- late ends


def test_each_row_matches_transformers_at_its_own_values_and_length() -> None:
    rng = random.Random(1)
    logits = random_rows(300, 600)
    logits[::7, END] = NEG_INF
    specs = []
    for row in range(300):
        pair = [rng.randint(0, 12), rng.choice([0.5, 1.0, 1.05, 1.5, 2.0])]
        params = {} if row == 17 else {"exponential_decay_length_penalty": pair}
        ends = rng.choice([(END,), (5, 599), (END, 300, 0)])
        output = [3] * rng.randint(0, 20)
        specs.append(Spec(params, [1] * rng.randint(1, 9), output, ends=ends))

    got = apply(ExponentialDecayLengthPenalty, specs, logits)

    changed = 0
    for row, spec in enumerate(specs):
        want = logits[row, None]
        its = spec.request.params.exponential_decay_length_penalty
        if its is not None:
            theirs = TheirDecay(its, list(spec.ends), len(spec.prompt))
            want = theirs(torch.tensor([spec.tokens]), want.clone())
        torch.testing.assert_close(got[row], want[0], rtol=1e-5, atol=2e-5)
        changed += not torch.equal(got[row], logits[row])
    assert changed > 80
    assert torch.equal(bits(got[17]), bits(logits[17]))


@pytest.mark.parametrize(
    ("num_generated", "score", "want"),
    [(3, -2.0, -2.0), (4, -2.0, -1.0), (5, -2.0, 0.5), (5, 2.0, 4.5), (5, 0.0, 0.0), (0, 1.0, 1.0)],
)
def test_worked_numbers_of_the_late_end(num_generated: int, score: float, want: float) -> None:
    params = {"exponential_decay_length_penalty": [3, 1.5]}
    assert after(num_generated, params, score) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("factor", [-1e300, -1e30, -2.0, 0.0, 1e-300, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("start", [-(2**63), -3, 0, 3, 2**63 - 1])
def test_extreme_values_give_numbers(factor: float, start: int) -> None:
    params = {"exponential_decay_length_penalty": [start, factor]}
    for score in (0.0, -2.0, 2.0, 3e38, -3e38):
        for length in (0, 4, 5, 60):
            got = after(length, params, score)
            assert math.isfinite(got)
            if length <= start or score == 0.0 or factor == 1.0:
                assert got == pytest.approx(score)


def test_an_end_that_is_banned_stays_so_and_comes_in_the_end_otherwise() -> None:
    params: dict[str, Any] = {"exponential_decay_length_penalty": [0, 3.0]}
    spec = Spec(params, output=[3] * 40)
    row = torch.zeros(2, 9)
    row[0, END], row[1, END] = NEG_INF, -1.0
    got = apply(ExponentialDecayLengthPenalty, [spec] * 2, row)
    assert kept(got[0]) == set(range(9)) - {END}
    assert int(got[1].argmax()) == END
    held = Spec(params | {"min_tokens": 50}, output=[3] * 40)
    assert END not in kept(process(STAGES, [held], row[1:])[0])


def test_both_may_be_asked_for_and_greedy_rows_have_them_too() -> None:
    params = {
        "eos_length_penalty": 4.0,
        "eos_length_window": 10,
        "exponential_decay_length_penalty": [5, 2.0],
        "temperature": 0.0,
    }
    # 2 - 4 * (1 - 7 / 10) = 0.8, then 0.8 * 2^2.
    assert after(7, params, 2.0) == pytest.approx(3.2, abs=1e-5)


def test_without_end_of_sequence_tokens_the_decay_is_not_wanted() -> None:
    stage = ExponentialDecayLengthPenalty(new_lanes(1, 1))
    params: dict[str, Any] = {"exponential_decay_length_penalty": [3, 1.5]}
    assert stage.admit(0, Spec(params).request)
    assert not stage.admit(0, Spec(params | {"stop_token_ids": [5]}, ends=()).request)
