"""Lanes and what is kept there."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.types import Rows


def rows(*lanes: int) -> Rows:
    return Rows.build(list(lanes), [0] * len(lanes), "cpu")


def entries(read: tuple[Tensor, ...]) -> list[tuple[float, ...]]:
    """Those of some rows, one after the other."""
    return list(zip(*(one.tolist() for one in read), strict=False))


def _fail(*_: Any) -> Any:
    raise ZeroDivisionError


def test_a_column_is_read_in_the_order_of_the_rows() -> None:
    column = Lanes(5, 4).column(torch.float32, neutral=0.5)
    column[3], column[0] = 7.0, 2.0
    assert column.at(rows(3, 1, 0)).tolist() == [[7.0], [0.5], [2.0]]
    assert column.at(rows()).shape == (0, 1)


def test_lists_are_read_by_row_and_replaced_by_lane() -> None:
    ragged = Lanes(5, 4).ragged()
    ragged.write(4, [10, 11], [0.25, 0.5])
    ragged.write(1, [12], [0.75])
    ragged.write(2, [13], [1.0])
    ragged.write(4, [14], [1.25])
    assert entries(ragged.at(rows(1, 3, 4))) == [(0, 12, 0.75), (2, 14, 1.25)]
    assert entries(ragged.at(rows(4, 1))) == [(0, 14, 1.25), (1, 12, 0.75)]
    ragged.write(4, [])
    assert ragged.at(rows(1, 3, 4))[1].tolist() == [12]
    assert ragged.at(rows())[0].tolist() == []


def test_lists_without_values_hold_ids_alone() -> None:
    ragged = Lanes(2, 4).ragged()
    assert ragged.at(rows(0, 1))[0].tolist() == []
    ragged.write(1, frozenset({3}))
    row, token_id, values = ragged.at(rows(1))
    assert (row.tolist(), token_id.tolist(), values.shape) == ([0], [3], (0,))


def test_what_a_list_costs_is_what_its_rows_hold() -> None:
    """Not what other lanes hold, nor what a lane once held; and copies share it."""
    lanes = Lanes(4, 8)
    ragged = lanes.ragged()
    many, few = list(range(10_000)), [1]
    ragged.write(0, many)
    ragged.write(1, many)
    ragged.write(2, few)
    assert len(ragged.at(rows(2))[1]) == 1
    first, second = (ragged.kept.get(lane) for lane in (0, 1))
    assert first is second  # it was read once
    lanes.fork([0], [3])
    assert ragged.kept.get(3) is first
    for lane in (0, 1, 3):
        lanes.release(lane)
    assert ragged.at(rows(0, 1, 2, 3))[1].tolist() == few
    assert len(ragged.kept) == 1


def test_a_list_that_cannot_be_forgotten_keeps_no_lane(caplog: pytest.LogCaptureFixture) -> None:
    lanes = Lanes(2, 4)
    broken, other = lanes.ragged(), lanes.ragged()
    lane = lanes.take()
    other.write(lane, [5])
    broken.kept.write = _fail  # type: ignore[method-assign]
    lanes.release(lane)
    assert sorted(lanes.free) == [0, 1]
    assert lane not in [row for row, *_ in entries(other.at(rows(0, 1)))]
    assert "could not be forgotten" in caplog.text


def test_every_lane_is_handed_out_once() -> None:
    lanes = Lanes(3, 4)
    taken = {lanes.take() for _ in range(3)}
    assert taken == {0, 1, 2}
    lanes.release(1)
    assert lanes.take() == 1


def test_histories_are_written_and_appended_to() -> None:
    lanes = Lanes(3, 6)
    lanes.write(2, [7, 8, 9], prompt_len=2, seed=-(2**63))
    lanes.write(0, [5], prompt_len=1, seed=2**63 - 1)
    lanes.append([2, 0, 2], [3, 1, 4], [10, 11, 12])
    lanes.append([], [], [])
    assert lanes.tokens[2, :5].tolist() == [7, 8, 9, 10, 12]
    assert lanes.tokens[0, :2].tolist() == [5, 11]
    assert lanes.prompt_lengths.tolist() == [1, 0, 2]
    assert lanes.seeds.tolist() == [2**63 - 1, 0, -(2**63)]


def test_a_fork_copies_history_columns_and_lists() -> None:
    lanes = Lanes(3, 6)
    column, ragged = lanes.column(torch.int64, neutral=0), lanes.ragged(torch.int64)
    lanes.write(1, [7, 8, 9], prompt_len=2, seed=5)
    column[1] = 2**63 - 1
    ragged.write(1, [4, 6], [1, 2])
    ragged.write(2, [0], [0])  # an earlier owner's

    lanes.fork([1], [2])

    assert lanes.tokens[2, :3].tolist() == [7, 8, 9]
    assert (lanes.prompt_lengths[2].item(), lanes.seeds[2].item()) == (2, 5)
    assert column.at(rows(2)).tolist() == [[2**63 - 1]]
    _, token_id, values = ragged.at(rows(2))
    assert (token_id.tolist(), values.tolist()) == ([4, 6], [1, 2])
    ragged.write(1, [9], [9])
    lanes.append([1], [2], [0])
    assert ragged.at(rows(2))[1].tolist() == [4, 6]
    assert lanes.tokens[2, 2] == 9


def test_rows_know_the_longest_sequence_and_can_be_selected_from() -> None:
    both = Rows.build([4, 2, 7], [0, 9, 3], "cpu")
    assert (len(both), both.max_len) == (3, 10)
    some = both.select([2, 0], torch.tensor([2, 0]))
    assert some.host_lanes == some.lanes.tolist() == [7, 4]
    assert some.positions.tolist() == [3, 0]
    assert some.max_len == 10
