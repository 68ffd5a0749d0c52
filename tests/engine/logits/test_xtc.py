"""XTC: dropping the obvious now and then."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.logits.pipeline import run_filters
from engine.logits.top_k import TopK
from engine.logits.xtc import Xtc
from engine.rng import Domain, uniform
from engine.types import Rows
from tests.support.logits import (
    DIST_P,
    END,
    WORDS,
    Spec,
    apply,
    assert_filters_like,
    bits,
    kept,
    likeliest,
    new_lanes,
    one_row,
    only,
    place,
    process,
    random_rows,
    run_stage,
    softmax,
)

NEWLINE = WORDS.texts.index("\n")


def oracle(threshold: float, scores: Tensor) -> Tensor:
    """The formula with a coin that always falls on the same side."""
    (row,) = scores
    probs = softmax(row)
    above = [token_id for token_id in likeliest(probs) if probs[token_id] >= threshold]
    gone = set(above[:-1])
    if gone & {END, NEWLINE}:
        gone = set()
    return only(row, [i for i in range(len(row)) if i not in gone])[None]


@pytest.mark.parametrize("vocab_size", [5, 257, 600])
def test_each_row_matches_a_naive_loop_at_its_own_value(vocab_size: int) -> None:
    values = [0.0015, 0.02, 0.1, 0.2, 0.45]
    assert_filters_like(Xtc, "xtc_threshold", values, oracle, vocab_size, xtc_probability=1.0)


@pytest.mark.parametrize(
    ("threshold", "want"),
    [
        (0.12, [0.0, 0.0, 0.5, 0.333333, 0.166667]),
        (0.2, [0.0, 0.5, 0.25, 0.166667, 0.083333]),
        (0.35, [0.4, 0.3, 0.15, 0.1, 0.05]),
    ],
)
def test_worked_numbers(threshold: float, want: list[float]) -> None:
    spec = Spec({"xtc_probability": 1.0, "xtc_threshold": threshold}, ends=())
    got = apply(Xtc, [spec], DIST_P[None])[0].softmax(0)
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("threshold", "survivors"), [(0.5, {1}), (0.500001, {0, 1}), (1.0, {0})])
def test_at_most_two_tokens_can_have_half(threshold: float, survivors: set[int]) -> None:
    row = torch.tensor([0.0, -100.0] if threshold == 1.0 else [0.0, 0.0])
    if threshold == 1.0:
        row[1] = float("-inf")
    got = one_row(Xtc, row, xtc_probability=1.0, xtc_threshold=threshold)
    assert kept(got) == survivors


# -- the coin


def coins(probability: float, seeds: list[int], positions: list[int]) -> list[bool]:
    """Whether it acts, at each of these seeds and positions."""
    lanes = new_lanes(len(seeds), 1)
    stage = Xtc(lanes)
    params = {"xtc_probability": probability, "xtc_threshold": 0.12}
    for lane, seed in enumerate(seeds):
        place(lanes, lane, Spec(params, seed=seed, ends=()), stage)
    rows = Rows.build(list(range(len(seeds))), positions, "cpu")
    got = run_stage(stage, DIST_P.expand(len(seeds), -1).contiguous(), rows)
    assert {len(kept(row)) for row in got} <= {3, 5}
    return [len(kept(row)) == 3 for row in got]


def test_the_coin_is_that_of_the_rows_seed_and_position() -> None:
    assert coins(0.4124, [42], [7]) == [True]  # its coin there is 0.412373
    assert coins(0.4123, [42], [7]) == [False]
    seeds = [row * 7919 - 500 for row in range(300)]
    positions = [row % 11 for row in range(300)]
    zeros = torch.zeros(300, dtype=torch.int64)
    drawn = uniform(torch.tensor(seeds), torch.tensor(positions), zeros, Domain.COIN)
    want = (drawn < 0.3).tolist()
    assert coins(0.3, seeds, positions) == want
    assert coins(0.3, seeds[::-1], positions[::-1]) == want[::-1]


@pytest.mark.parametrize("keys", ["seeds", "positions"])
@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_it_acts_as_often_as_asked(probability: float, keys: str) -> None:
    count = 2000
    index, same = list(range(count)), [7] * count
    acted = sum(coins(probability, *((index, same) if keys == "seeds" else (same, index))))
    spread = math.sqrt(count * probability * (1 - probability))
    assert abs(acted - count * probability) < 4 * spread


@pytest.mark.parametrize("params", [{"xtc_probability": 0.0}, {}, {"xtc_threshold": 0.1}])
def test_without_a_probability_it_never_acts(params: dict[str, Any]) -> None:
    lanes = new_lanes(1, 1)
    assert not Xtc(lanes).admit(0, Spec(params).request)
    assert torch.equal(bits(one_row(Xtc, DIST_P, **params)), bits(DIST_P))


# -- the end and line breaks


@pytest.mark.parametrize("ends", [(), (7,), (0,), (7, 9), (9, 8, 0), (0, 7, 8, 9)])
@pytest.mark.parametrize("order", [(0, 1, 4, 5, 6), (4, 0, 1, 5, 6), (1, 4, 0, 5, 6)])
def test_nothing_happens_where_an_end_of_sequence_token_would_go(
    ends: tuple[int, ...], order: tuple[int, ...]
) -> None:
    row = torch.full((10,), -30.0)
    row[list(order)] = DIST_P
    spec = Spec({"xtc_probability": 1.0, "xtc_threshold": 0.12}, ends=ends)
    (got,) = apply(Xtc, [spec], row[None])
    gone = set(order[:2])  # and the third, the least likely of those above, stays
    assert kept(got) == set(range(10)) - (set() if gone & set(ends) else gone)


@pytest.mark.parametrize(("place_of_newline", "acts"), [(0, False), (1, False), (2, True)])
def test_nothing_happens_where_a_line_break_would_go(place_of_newline: int, acts: bool) -> None:
    order = [6, 7, 8, 9, 4]
    order[place_of_newline] = NEWLINE
    row = torch.full((10,), -30.0)
    row[order] = DIST_P
    got = one_row(Xtc, row, xtc_probability=1.0, xtc_threshold=0.12)
    assert kept(got) == set(range(10)) - (set(order[:2]) if acts else set())


def test_rows_with_ends_of_their_own_do_not_mix() -> None:
    ends = [(), (0,), (1,), (2,), (0, 1), (3, 4)]
    params = {"xtc_probability": 1.0, "xtc_threshold": 0.12}
    specs = [Spec(params, ends=its) for its in ends]
    got = apply(Xtc, specs, DIST_P.expand(6, -1))
    spared = [bool({0, 1} & set(its)) for its in ends]
    assert [len(kept(row)) == 5 for row in got] == spared


# -- what is left


def test_all_tokens_below_the_threshold_stay() -> None:
    row = random_rows(1, 3000)[0].clamp(max=2.0)
    row[[2000, 2500, 2900]] = torch.tensor([12.0, 11.0, 10.5])
    got = one_row(Xtc, row, xtc_probability=1.0, xtc_threshold=0.1)
    assert kept(got) == set(range(3000)) - {2000, 2500}
    left = sorted(kept(got))
    assert torch.equal(bits(got[left]), bits(row[left]))


def test_only_rows_with_very_many_likely_tokens_are_looked_at_whole() -> None:
    lanes = new_lanes(3, 1)
    stage = Xtc(lanes)
    logits = torch.zeros(3, 700)
    logits[1, :3] = 20.0
    for lane, threshold in enumerate((0.001, 0.1, 0.1)):
        params = {"xtc_probability": 1.0, "xtc_threshold": threshold}
        place(lanes, lane, Spec(params, ends=()), stage)
    rows = Rows.build([0, 1, 2], [0, 0, 0], "cpu")
    logits[0, NEWLINE] = -30.0

    _, again = run_filters([stage], logits, rows)

    assert again.subset == [0]
    got = run_stage(stage, logits, rows)
    assert kept(got[0]) == {NEWLINE, 699}  # the last of equals, and the one below
    assert kept(got[1]) == set(range(2, 700))
    assert kept(got[2]) == set(range(700))


def test_it_sees_what_other_filters_have_left() -> None:
    params = {"xtc_probability": 1.0, "xtc_threshold": 0.17, "top_k": 3}
    without_top_k = {name: value for name, value in params.items() if name != "top_k"}
    specs = [Spec(params, ends=()), Spec(without_top_k, ends=())]
    got = process([TopK, Xtc], specs, DIST_P.expand(2, -1))
    assert [kept(row) for row in got] == [{2}, {1, 2, 3, 4}]
