"""Paged attention in torch against the formula in float64."""

import pytest
import torch

from engine.attention.torch_paged import TorchPagedAttention
from tests.engine.attention.steps import BLOCK, CHUNKS, DECODES, MIXED, Shape, Step

SHAPES = [Shape(), Shape(4, 4, 24, 8), Shape(6, 1, 20, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (1, None), (7, 5.0), (65, None)])
def test_a_mixed_step_follows_the_formula(
    shape: Shape, window: int | None, softcap: float | None
) -> None:
    step = Step(MIXED, shape)
    got = step.attend(TorchPagedAttention(BLOCK, "cpu"), window=window, softcap=softcap)
    for span, one, want in zip(step.spans, got, step.expected(window, softcap), strict=True):
        torch.testing.assert_close(
            one.double(), want, rtol=0, atol=2e-6, msg=lambda text, span=span: f"{span}: {text}"
        )
    step.assert_stored()


@pytest.mark.parametrize("parts", [DECODES, CHUNKS, DECODES[:1], CHUNKS[:1]], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_steps_of_one_kind_follow_the_formula(
    parts: list[tuple[int, int]], softcap: float | None
) -> None:
    step = Step(parts, Shape(), seed=1)
    got = step.attend(TorchPagedAttention(BLOCK, "cpu"), softcap=softcap)
    torch.testing.assert_close(
        torch.cat(got).double(), torch.cat(step.expected(None, softcap)), rtol=0, atol=2e-6
    )


def test_bfloat16_is_as_exact_as_its_numbers_are() -> None:
    step = Step(MIXED, Shape(), dtype=torch.bfloat16)
    got = step.attend(TorchPagedAttention(BLOCK, "cpu"))
    # 8 bits of mantissa, and weights that were rounded to them before they were summed.
    torch.testing.assert_close(
        torch.cat(got).double(), torch.cat(step.expected()), rtol=2**-6, atol=2**-6
    )


def test_one_backend_serves_steps_of_growing_and_shrinking_size() -> None:
    backend = TorchPagedAttention(BLOCK, "cpu")
    for seed, parts in enumerate([DECODES, MIXED, DECODES[:2], CHUNKS, DECODES]):
        step = Step(parts, Shape(), seed=seed)
        got = step.attend(backend)
        torch.testing.assert_close(
            torch.cat(got).double(), torch.cat(step.expected()), rtol=0, atol=2e-6
        )
