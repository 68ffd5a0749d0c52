"""Classifier-free guidance."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.modeling_outputs import CausalLMOutput

from engine.logits.guidance import Guidance
from engine.numerics import NEG_INF
from tests.support.logits import (
    Spec,
    apply_beside,
    bits,
    companions,
    hard_rows,
    one_row,
    random_rows,
)

SCALES = [1.5, 0.0, 0.5, -2.0, 7.5]


def guided(row: list[float], other: list[float], scale: float) -> Tensor:
    spec = Spec({"guidance_scale": scale})
    beside = companions(torch.tensor([other]))
    return apply_beside(Guidance, [spec], torch.tensor([row]), beside)[0]


def oracle(row: Tensor, other: Tensor, scale: float) -> Tensor:
    """What transformers makes of a row, where its model would say `other` without the prompt."""

    def model(input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=other.expand(1, input_ids.shape[1], -1))

    process = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model)
    (want,) = process(torch.tensor([[3]]), row[None])
    return want


def test_worked_numbers() -> None:
    got = guided([2.0, 1.0, 0.0], [0.7, 0.7, 0.7], 1.5)
    assert got.tolist() == pytest.approx([-0.062103, -1.562103, -3.062103], abs=1e-5)
    want = [0.785597, 0.175290, 0.039113]
    assert got.softmax(0).tolist() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("vocab_size", [5, 257, 1000])
def test_each_row_matches_transformers_at_its_own_scale(vocab_size: int) -> None:
    logits, others = random_rows(60, vocab_size), random_rows(60, vocab_size, seed=1).flip(0)
    scales = [SCALES[row % len(SCALES)] for row in range(60)]
    neutral = set(range(3, 60, 7))
    specs = [Spec({} if row in neutral else {"guidance_scale": s}) for row, s in enumerate(scales)]
    # Every row has the companion of the row as far from the end as it is from the beginning.
    of = [-1 if row in neutral else 59 - row for row in range(60)]

    got = apply_beside(Guidance, specs, logits, companions(others, of))

    for row in range(60):
        if row in neutral:
            assert torch.equal(bits(got[row]), bits(logits[row]))
        else:
            want = oracle(logits[row].double(), others[of[row]].double(), scales[row])
            torch.testing.assert_close(got[row].double(), want, rtol=1e-5, atol=1e-4)


def test_copies_of_a_prompt_share_a_companion() -> None:
    logits, others = random_rows(1, 50), random_rows(2, 50, seed=1)
    specs = [Spec({"guidance_scale": 1.5})] * 3
    got = apply_beside(Guidance, specs, logits.repeat(3, 1), companions(others, [1, 1, 1]))
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])
    torch.testing.assert_close(got[0], oracle(logits[0], others[1], 1.5))


def test_a_scale_of_one_is_no_guidance() -> None:
    row = torch.tensor([2.0, 1.0, NEG_INF])
    assert torch.equal(bits(one_row(Guidance, row, guidance_scale=1.0)), bits(row))


def test_a_scale_of_nothing_is_what_the_companion_says() -> None:
    got = guided([3.0, -4.0, 0.0], [1.0, 2.0, 0.5], 0.0)
    torch.testing.assert_close(got, torch.tensor([1.0, 2.0, 0.5]).log_softmax(0))


@pytest.mark.parametrize("scale", [1.5, 0.5, 0.0, -2.0, 1e300, -1e300])
def test_what_the_model_cannot_say_stays_impossible(scale: float) -> None:
    got = guided([1.0, NEG_INF, NEG_INF, 0.5], [1.0, NEG_INF, 3.0, NEG_INF], scale)
    assert got[1:3].tolist() == [NEG_INF, NEG_INF]
    assert got[[0, 3]].isfinite().all()
    # What only the companion cannot say is as far away from it as can be.
    assert got[3] >= got[0] if scale > 1.0 else got[3] <= got[0]
    assert abs(float(got[3])) > 1e29


@pytest.mark.parametrize("scale", [*SCALES, 1e300])
def test_hard_rows_come_out_as_numbers_that_can_be_drawn_from(scale: float) -> None:
    logits = hard_rows(700).clamp(max=1e37)
    specs = [Spec({"guidance_scale": scale})] * len(logits)
    got = apply_beside(Guidance, specs, logits, companions(logits.roll(1, 0)))
    assert not got.isnan().any()
    assert torch.equal(got == NEG_INF, logits == NEG_INF)
    assert got.amax() < float("inf")
