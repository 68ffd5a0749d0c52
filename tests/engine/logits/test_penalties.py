"""Repetition, frequency and presence penalties."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from engine.logits.penalties import Penalties
from tests.support.logits import ROW_A, Spec, apply, bits, histories, random_rows


def penalised(logits: list[float], output: list[int], **params: float) -> list[float]:
    spec = Spec(params, prompt=(len(logits) - 1,), output=output)
    got: list[float] = apply(Penalties, [spec], torch.tensor([logits]))[0].tolist()
    return got


def test_positive_logits_are_divided_and_the_others_multiplied() -> None:
    assert penalised([2.0, -1.0, 0.5, 0.0], [0, 1, 1], repetition_penalty=1.25) == pytest.approx(
        [1.6, -1.25, 0.5, 0.0]
    )


def test_frequency_counts_and_presence_does_not_after_the_repetition_penalty() -> None:
    got = penalised(
        [2.0, -1.0, 0.5, 0.0],
        [0, 1, 1],
        repetition_penalty=1.25,
        frequency_penalty=0.5,
        presence_penalty=0.25,
    )
    assert got == pytest.approx([0.85, -2.5, 0.5, 0.0])


def test_the_repetition_penalty_is_of_logits_not_of_logprobs() -> None:
    got = torch.tensor(penalised([2.0, 1.0, 0.0], [0], repetition_penalty=1.5))
    torch.testing.assert_close(got, torch.tensor([4 / 3, 1.0, 0.0]))
    assert got.softmax(0)[0].item() == pytest.approx(0.5050, abs=5e-5)


@pytest.mark.parametrize("window", [-1, 1, 4, 100])
@pytest.mark.parametrize("penalty_prompt", [True, False])
def test_each_row_matches_transformers_at_its_own_value(window: int, penalty_prompt: bool) -> None:
    logits = random_rows(300, 600)
    values = [(0.5, 1.0, 1.1, 1.3, 4.0)[row % 5] for row in range(300)]
    specs = [
        Spec(
            {
                "repetition_penalty": value,
                "penalty_last_n": window,
                "penalty_prompt": penalty_prompt,
            },
            *history,
        )
        for value, history in zip(values, histories(300), strict=True)
    ]

    got = apply(Penalties, specs, logits)

    for row, (value, spec) in enumerate(zip(values, specs, strict=True)):
        seen = spec.tokens if penalty_prompt else list(spec.output)
        seen = seen if window < 0 else seen[-window:]
        ids = torch.tensor([seen], dtype=torch.int64)
        want = RepetitionPenaltyLogitsProcessor(value)(ids, logits[row, None])[0]
        torch.testing.assert_close(got[row], want, rtol=1e-6, atol=0)
        if value == 1.0:
            assert torch.equal(bits(got[row]), bits(logits[row]))


def naive(row: Tensor, spec: Spec) -> list[float]:
    """The formulas, in float64."""
    params = spec.request.params
    last_n = params.penalty_last_n
    tokens = list(enumerate(spec.tokens))
    window = tokens if last_n < 0 else tokens[max(len(tokens) - last_n, 0) :]
    output = Counter(token for index, token in window if index >= len(spec.prompt))
    seen = {token for _, token in window} if params.penalty_prompt else set(output)
    scores: list[float] = row.double().tolist()
    for token in seen:
        theta = params.repetition_penalty
        scores[token] = scores[token] / theta if scores[token] > 0 else scores[token] * theta
    for token, count in output.items():
        scores[token] -= params.frequency_penalty * count + params.presence_penalty
    return scores


def test_all_five_parameters_together_match_a_naive_loop() -> None:
    logits = random_rows(400, 600)
    rng = random.Random(1)
    choices: dict[str, list[Any]] = {
        "repetition_penalty": [0.7, 1.0, 1.2],
        "frequency_penalty": [-2.0, 0.0, 0.3],
        "presence_penalty": [-0.4, 0.0, 2.0],
        "penalty_last_n": [-1, 0, 1, 2, 5, 11, 1000],
        "penalty_prompt": [True, False],
    }
    specs = [
        Spec({name: rng.choice(values) for name, values in choices.items()}, *history)
        for history in histories(400)
    ]

    got = apply(Penalties, specs, logits)

    want = torch.tensor([naive(row, spec) for row, spec in zip(logits, specs, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("theta", [1e-300, 1e-40, 1e40, 1e300])
def test_a_penalty_outside_float32_gives_numbers_and_keeps_its_meaning(theta: float) -> None:
    logits = [3.0, 1.0, 0.0, -1.0, 2.0]
    got = penalised(logits, [0, 1, 2, 3], repetition_penalty=theta)
    assert all(math.isfinite(score) for score in got)
    best = max(range(4), key=got.__getitem__)
    assert (best, got[best] > got[3]) == (0, True)
    assert (got[1] > 2.0) == (theta < 1)


def test_without_a_window_nothing_is_penalised() -> None:
    spec = Spec({"repetition_penalty": 2.0, "penalty_last_n": 0}, prompt=(0,), output=(1, 2))
    got = apply(Penalties, [spec], ROW_A[None])
    assert torch.equal(bits(got[0]), bits(ROW_A))
