"""Repetitions of the end of a history."""

import random
from typing import Any

import pytest
import torch

from engine.kernels import native
from engine.lanes import Lanes
from engine.logits.matches import Matches, matches_of
from engine.types import Rows


def naive(tokens: list[int]) -> list[int]:
    """Token by token, from every place."""
    found = []
    for at in range(len(tokens) - 1):
        length = 0
        while length <= at and tokens[at - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        found.append(length)
    return [*found, 0]


def some_tokens(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    fixed = [[5], [5, 5], [5] * 40, [5, 6] * 20, [5, 6, 7] * 13, [*[5] * 20, 6, *[5] * 20]]
    return fixed + [rng.choices(range(rng.choice([2, 3])), k=rng.randint(1, 60)) for _ in range(60)]


def test_all_of_a_history_are_found_at_once() -> None:
    for tokens in some_tokens(1):
        assert matches_of(tokens) == naive(tokens)


@pytest.mark.parametrize("native_code", [True, False], ids=["kernels", "torch"])
def test_what_is_kept_up_is_what_a_search_finds(
    native_code: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native_code:
        monkeypatch.setattr(native, "LIBRARY", None)
    for tokens in some_tokens(2):
        lanes = Lanes(3, 128)
        matches = Matches(lanes)
        for lane in (0, 2):
            lanes.write(lane, tokens, 1, seed=0)
            matches.start(lane, wanted=lane == 2)
        length = len(tokens)
        for token in (tokens[0], tokens[-1], 1):
            matches.catch_up(Rows.build([2, 0], [length - 1] * 2, "cpu"))
            assert matches.lengths[2, :length].tolist() == naive(tokens)
            lanes.append([2], [length], [token])
            tokens = [*tokens, token]
            length += 1


@pytest.mark.parametrize("native_code", [True, False], ids=["kernels", "torch"])
def test_none_is_longer_than_its_reach_and_none_goes_on_where_it_breaks(
    native_code: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native_code:
        monkeypatch.setattr(native, "LIBRARY", None)
    lanes = Lanes(1, 16)

    def breaks(_host: Any, lane: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return lanes.tokens[lane, at] == 9

    matches = Matches(lanes, breaks, lambda _lane, _length: 2)
    lanes.write(0, [5, 5, 5, 5, 5], 1, seed=0)
    matches.start(0, wanted=True)
    matches.catch_up(Rows.build([0], [4], "cpu"))
    assert matches.lengths[0, :5].tolist() == [1, 2, 2, 2, 0]
    lanes.append([0, 0], [5, 6], [9, 9])
    matches.catch_up(Rows.build([0], [6], "cpu"))
    assert matches.lengths[0, :7].tolist() == [0] * 7
