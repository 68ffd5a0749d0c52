"""Nucleus sampling."""

import pytest
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from engine.logits.top_p import TopP
from engine.numerics import NEG_INF
from tests.support.logits import DIST_P, Spec, apply, assert_filters_like, kept, one_row


def oracle(value: float, scores: Tensor) -> Tensor:
    want: Tensor = TopPLogitsWarper(value)(None, scores)
    return want


@pytest.mark.parametrize("rule", ["strict", "inclusive"])
@pytest.mark.parametrize("vocab_size", [5, 256, 257, 1000])
def test_each_row_matches_transformers_at_its_own_value(vocab_size: int, rule: str) -> None:
    values = [0.05, 0.5, 0.8, 0.9, 0.95]
    assert_filters_like(TopP, "top_p", values, oracle, vocab_size, top_p_rule=rule)


def test_strict_stops_where_a_prefix_has_exactly_p_and_inclusive_takes_one_more() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    cases = [(0.5, "strict"), (0.5, "inclusive"), (0.75, "strict"), (0.75, "inclusive")]
    specs = [Spec({"top_p": p, "top_p_rule": rule}) for p, rule in cases]

    got = apply(TopP, specs, logits.expand(4, -1))

    probs = [[1.0], [2 / 3, 1 / 3], [2 / 3, 1 / 3], [0.571429, 0.285714, 0.142857]]
    want = [torch.tensor(row + [0.0] * (4 - len(row))) for row in probs]
    torch.testing.assert_close(got.softmax(1), torch.stack(want), rtol=0, atol=1e-6)


def test_worked_numbers() -> None:
    got = one_row(TopP, torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15]).log(), top_p=0.8).softmax(0)
    want = torch.tensor([0.0, 0.222222, 0.333333, 0.277778, 0.166667])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert kept(one_row(TopP, DIST_P, top_p=0.8)) == {0, 1, 2}


@pytest.mark.parametrize("half", [3, 256, 512])  # 256 is where only some candidates are looked at
@pytest.mark.parametrize(("rule", "more"), [("strict", 0), ("inclusive", 1)])
def test_of_equal_tokens_those_with_the_lowest_ids_stay(half: int, rule: str, more: int) -> None:
    got = one_row(TopP, torch.zeros(2 * half), top_p=0.5, top_p_rule=rule)
    assert kept(got) == set(range(half + more))


@pytest.mark.parametrize("rule", ["strict", "inclusive"])
def test_zero_keeps_only_the_best_and_of_equals_the_first(rule: str) -> None:
    logits = torch.full((700,), -3.0)
    logits[[400, 600]] = 9.0
    assert kept(one_row(TopP, logits, top_p=0.0, top_p_rule=rule)) == {400}


def test_dropped_tokens_have_no_mass() -> None:
    padded = torch.full((900,), NEG_INF)
    padded[[3, 300, 600, 700, 899]] = DIST_P
    assert kept(one_row(TopP, padded, top_p=0.8)) == {3, 300, 600}
    assert kept(one_row(TopP, padded, top_p=0.999999)) == {3, 300, 600, 700, 899}
