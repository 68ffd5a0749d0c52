"""Top-H sampling."""

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import TopHLogitsWarper

from engine.logits.top_h import TopH
from engine.numerics import NEG_INF
from tests.support.logits import DIST_P, assert_filters_like, bits, kept, one_row, random_rows


def oracle(value: float, scores: Tensor) -> Tensor:
    want: Tensor = TopHLogitsWarper(value)(None, scores)
    return want


@pytest.mark.parametrize("vocab_size", [5, 99, 100, 101, 257, 1000])
def test_each_row_matches_transformers_at_its_own_value(vocab_size: int) -> None:
    assert_filters_like(TopH, "top_h", [0.05, 0.2, 0.4, 0.7, 0.95], oracle, vocab_size)


@pytest.mark.parametrize(
    ("top_h", "survivors"), [(0.5, {0}), (0.2, {0}), (0.53, {0, 1}), (0.73, {0, 1, 2}), (1.0, None)]
)
def test_worked_numbers(top_h: float, survivors: set[int] | None) -> None:
    # -p ln p, added up: 0.366516, 0.727708, 1.012275, 1.242534, 1.392321.
    assert kept(one_row(TopH, DIST_P, top_h=top_h)) == (survivors or set(range(5)))


@pytest.mark.parametrize("vocab_size", [100, 101, 700])
def test_at_most_a_hundred_tokens_stay(vocab_size: int) -> None:
    row = random_rows(1, vocab_size)[0]
    best = set(row.sort(descending=True).indices[:100].tolist())
    assert kept(one_row(TopH, row, top_h=1.0)) == best
    assert len(kept(one_row(TopH, torch.zeros(vocab_size), top_h=1.0))) == 100


@pytest.mark.parametrize("top_h", [1e-300, 0.3, 1.0])
def test_a_single_token_stays(top_h: float) -> None:
    row = torch.full((700,), NEG_INF)
    row[300] = -4.0
    assert torch.equal(bits(one_row(TopH, row, top_h=top_h)), bits(row))
    row[:] = 0.0
    assert kept(one_row(TopH, row, top_h=1e-300)) == {0}


def test_dropped_tokens_have_no_entropy() -> None:
    padded = torch.full((900,), NEG_INF)
    padded[[3, 300, 600, 700, 899]] = DIST_P
    assert kept(one_row(TopH, padded, top_h=0.73)) == {3, 300, 600}
