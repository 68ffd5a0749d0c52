"""KL-guided temperature."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import LogprobsMode
from engine.logits import ORDERS, STAGES
from engine.logits.pipeline import Pipeline
from engine.messages import NOT_A_NUMBER
from engine.numerics import NEG_INF
from engine.sampler import Sampler, Samples, kl_divergence
from tests.support.logits import (
    DIST_P,
    Spec,
    bits,
    companions,
    hard_rows,
    lanes_for,
    place,
    random_rows,
    rows_of,
    softmax,
)

DIST_Q = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2]).log()


def guided(bandwidth: float, **params: Any) -> Spec:
    return Spec({"kl_bandwidth": bandwidth, "kl_reference_prompt": "x"} | params)


def sample(
    specs: list[Spec], logits: Tensor, others: Tensor, of: list[int] | None = None
) -> tuple[Samples, Tensor]:
    """What comes of rows with companions, and the logits that they were drawn from."""
    lanes, lane_ids = lanes_for(specs, logits.shape[1])
    sampler = Sampler(lanes, Pipeline(STAGES, lanes, ORDERS), LogprobsMode.PROCESSED_LOGITS)
    specs = [Spec(one.params, one.prompt, one.output, one.seed, logits.shape[1]) for one in specs]
    for lane, spec in zip(lane_ids, specs, strict=True):
        place(lanes, lane, spec, sampler)
    rows = rows_of(specs, lane_ids)
    rows = type(rows)(
        rows.host_lanes,
        rows.host_positions,
        rows.max_len,
        rows.lanes,
        rows.positions,
        beside=companions(others, of),
    )
    samples = sampler(logits.clone(), rows)
    drawn_from = torch.full_like(logits, NEG_INF)
    for row in range(len(specs)):
        for token, value in samples.logprobs[row][1]:
            drawn_from[row, token] = value
    return samples, drawn_from


def temperature(row: Tensor, after: Tensor) -> float:
    """What a row was divided by."""
    return float((row[0] - row[1]) / (after[0] - after[1]))


def naive(row: Tensor, other: Tensor, bandwidth: float) -> float:
    p = [min(max(one, 1e-7), 1.0) for one in softmax(row)]
    q = [min(max(one, 1e-7), 1.0) for one in softmax(other)]
    divergence = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return float(2.0 ** (-max(divergence, 0.0) / bandwidth))


def test_worked_divergence_is_from_the_prompts_to_the_references() -> None:
    p, q = DIST_P.exp().double()[None], DIST_Q.exp().double()[None]
    assert float(kl_divergence(p, q)) == pytest.approx(0.372736, abs=1e-6)
    assert float(kl_divergence(q, p)) == pytest.approx(0.334795, abs=1e-6)


@pytest.mark.parametrize(("bandwidth", "want"), [(1.0, 0.772316), (0.5, 0.596473)])
def test_worked_temperatures(bandwidth: float, want: float) -> None:
    _, after = sample([guided(bandwidth)], DIST_P[None], DIST_Q[None])
    assert temperature(DIST_P, after[0]) == pytest.approx(want, abs=1e-5)
    _, after = sample([guided(bandwidth, temperature=0.7)], DIST_P[None], DIST_Q[None])
    assert temperature(DIST_P, after[0]) == pytest.approx(0.7 * want, abs=1e-5)


def test_probabilities_are_clipped_and_the_divergence_is_never_negative() -> None:
    p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    want = math.log(1e7) + 1e-7 * math.log(1e-7)
    assert float(kl_divergence(p.double(), q.double())) == pytest.approx(want)
    # Clipped, the second row has more than 1 together: the sum alone would be negative.
    p = torch.zeros(1, 200_000, dtype=torch.float64)
    p[0, 0] = 1.0
    q = torch.full_like(p, 1e-6)
    q[0, 0] = 1.0
    assert float((p.clamp(1e-7) * (p.clamp(1e-7) / q).log()).sum()) < 0.0
    assert float(kl_divergence(p, q)) == 0.0


@pytest.mark.parametrize("vocab_size", [5, 257, 600])
@pytest.mark.parametrize("order", ["vllm", "hf", "llama.cpp"])
def test_each_row_has_its_own_temperature(vocab_size: int, order: str) -> None:
    logits = random_rows(48, vocab_size)
    others = random_rows(48, vocab_size, seed=1).flip(0)
    bandwidths = [(0.5, 1.0, 7.0)[row % 3] for row in range(48)]
    neutral = set(range(3, 48, 7))
    of = [-1 if row in neutral else 47 - row for row in range(48)]
    specs = [
        Spec() if row in neutral else guided(h, temperature=0.8, sampler_order=order)
        for row, h in enumerate(bandwidths)
    ]

    _, after = sample(specs, logits, others, of)

    num_compared = 0
    for row in range(48):
        if row in neutral:
            assert torch.equal(bits(after[row]), bits(logits[row]))
            continue
        factor = naive(logits[row], others[of[row]], bandwidths[row])
        if 0.8 * factor > 2e-4:
            want = logits[row].double() / (0.8 * factor)
            torch.testing.assert_close(after[row].double(), want, rtol=1e-4, atol=1e-4)
            num_compared += 1
    assert num_compared > 25


def test_where_the_two_say_the_same_the_temperature_stays() -> None:
    _, after = sample([guided(0.1, temperature=0.5)], DIST_P[None], DIST_P[None] + 3.0)
    torch.testing.assert_close(after[0], DIST_P / 0.5)


@pytest.mark.parametrize("bandwidth", [0.01, 1e-30, 1e-300])
def test_where_they_differ_much_the_likeliest_token_is_taken(bandwidth: float) -> None:
    rows = torch.stack((DIST_P, DIST_Q)).repeat(50, 1)
    specs = [
        Spec(one.params, seed=seed) for seed, one in enumerate([guided(bandwidth), Spec()] * 50)
    ]
    samples, _ = sample(specs, rows, rows.flip(1))
    assert set(samples.token_ids[::2]) == {0}
    assert len(set(samples.token_ids[1::2])) == 5


def test_the_divergence_is_of_the_models_own_distributions() -> None:
    changed = {"logit_bias": {"4": 2.0}, "top_k": 3}
    _, after = sample([guided(1.0, **changed)], DIST_P[None], DIST_Q[None])
    biased = DIST_P.clone()
    biased[4] += 2.0
    want = torch.where(biased >= biased.sort(descending=True)[0][2], biased / 0.772316, NEG_INF)
    torch.testing.assert_close(after[0], want, rtol=1e-5, atol=1e-5)


def test_greedy_rows_stay_as_they_are() -> None:
    samples, after = sample([guided(0.5, temperature=0.0)], DIST_Q[None], DIST_P[None])
    assert samples.token_ids == [1]
    assert torch.equal(bits(after[0]), bits(DIST_Q))


@pytest.mark.parametrize("bandwidth", [1e-300, 0.1, 1e300])
def test_hard_rows_have_a_token_to_draw(bandwidth: float) -> None:
    logits = hard_rows(700)
    samples, after = sample([guided(bandwidth)] * len(logits), logits, logits.roll(1, 0))
    assert not after.isnan().any()
    for row, token in enumerate(samples.token_ids):
        assert logits[row, token] > NEG_INF


def test_a_reference_that_is_not_a_number_is_told_and_no_other_row_changes() -> None:
    logits, others = random_rows(12, 600), random_rows(12, 600, seed=1)
    specs = [Spec(guided(1.0, top_p=0.9).params, seed=row) for row in range(12)]
    want, _ = sample(specs, logits, others)
    others[3] = float("nan")
    others[8, 5] = float("nan")
    got, _ = sample(specs, logits, others)
    for row in range(12):
        assert got.token_ids[row] == (NOT_A_NUMBER if row in (3, 8) else want.token_ids[row])
