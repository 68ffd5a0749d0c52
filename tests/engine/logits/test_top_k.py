"""Top-k."""

import pytest
import torch
from transformers import TopKLogitsWarper

from engine.logits.top_k import TopK
from engine.numerics import NEG_INF, scan
from tests.support.logits import Spec, apply, bits, hard_rows, kept, one_row, random_rows


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 1000])
def test_each_row_matches_transformers_at_its_own_value(vocab_size: int) -> None:
    values = [(-1, 0, 1, 2, 40, 255, 256, 257, 600, 2**40)[row % 10] for row in range(300)]
    # Ranks instead of the random numbers themselves, so that there are no ties.
    logits = random_rows(300, vocab_size).argsort(dim=1).argsort(dim=1) / 10

    got = apply(TopK, [Spec({"top_k": value}) for value in values], logits)

    for row, value in enumerate(values):
        if value > 0:
            assert torch.equal(got[row], TopKLogitsWarper(value)(None, logits[row, None])[0])
        else:
            assert torch.equal(bits(got[row]), bits(logits[row]))


def test_worked_numbers() -> None:
    assert kept(one_row(TopK, torch.tensor([3.0, 2.0, 2.0, 1.0]), top_k=2)) == {0, 1}


@pytest.mark.parametrize("k", [1, 2, 100, 256, 257, 699])
def test_of_equal_tokens_exactly_k_stay_those_with_the_lowest_ids(k: int) -> None:
    assert kept(one_row(TopK, torch.zeros(700), top_k=k)) == set(range(k))
    coarse = (random_rows(4, 700)[2] / 4).round()
    best_first = sorted(range(700), key=lambda token_id: (-coarse[token_id].item(), token_id))
    assert kept(one_row(TopK, coarse, top_k=k)) == set(best_first[:k])


def test_one_keeps_what_greedy_takes() -> None:
    logits = torch.cat((hard_rows(700), (random_rows(40, 700) / 2).round()))
    got = apply(TopK, [Spec({"top_k": 1})] * len(logits), logits)
    assert [kept(row) for row in got] == [{token_id} for token_id in scan(logits)[1].tolist()]


def test_dropped_tokens_are_not_counted() -> None:
    logits = torch.tensor([NEG_INF, 1.0, NEG_INF, 2.0, NEG_INF])
    assert kept(one_row(TopK, logits, top_k=4)) == {1, 3}
