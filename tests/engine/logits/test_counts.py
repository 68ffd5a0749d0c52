"""Counts of tokens that are kept up instead of counted."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engine.logits import STAGES
from engine.logits.counts import TokenCounts
from engine.logits.penalties import Penalties
from engine.logits.pipeline import Pipeline
from engine.types import Rows
from tests.support.logits import Spec, new_lanes, place, process, random_rows, rows_of

VOCAB = 12
WINDOWS = [-1, -1, 0, 1, 2, 3, 7, 20, 1000, 2**63 - 1]


class Counted:
    """Sequences in lanes, and what their counts have to be."""

    def __init__(self, num_lanes: int, context_len: int = 70) -> None:
        self.lanes = new_lanes(num_lanes, context_len)
        self.counts = TokenCounts(self.lanes)
        self.sequences: dict[int, tuple[list[int], int, int]] = {}  # tokens, prompt_len, window

    def start(self, lane: int, tokens: Sequence[int], prompt_len: int, window: int) -> None:
        self.lanes.write(lane, list(tokens), prompt_len, 0)
        self.counts.start(lane, window)
        self.sequences[lane] = ([*tokens], prompt_len, window)

    def append(self, lane: int, token: int) -> None:
        tokens, _, _ = self.sequences[lane]
        self.lanes.append([lane], [len(tokens)], [token])
        tokens.append(token)

    def fork(self, parent: int, child: int) -> None:
        self.lanes.fork([parent], [child])
        tokens, prompt_len, window = self.sequences[parent]
        self.sequences[child] = (tokens.copy(), prompt_len, window)

    def check(self, lane_ids: Sequence[int]) -> None:
        """Rows of these lanes in one step, against counting from scratch."""
        ends = [len(self.sequences[lane][0]) - 1 for lane in lane_ids]
        columns = self.counts.at(Rows.build(list(lane_ids), ends, "cpu"), VOCAB)
        for lane, *row in zip(lane_ids, *(column.tolist() for column in columns), strict=True):
            tokens, prompt_len, window = self.sequences[lane]
            begin = 0 if window < 0 else max(len(tokens) - window, 0)
            seen = Counter(tokens[begin:])
            generated = Counter(tokens[max(begin, prompt_len) :])
            got = list(zip(*row, strict=True))
            assert {entry[0] for entry in got} == set(tokens)
            for token, times, times_generated in got:
                assert (times, times_generated) == (seen[token], generated[token]), lane


def test_counts_are_right_after_any_number_of_appends_forks_and_new_owners() -> None:
    rng = random.Random(0)
    size = 8
    some = Counted(size)

    def start(lane: int) -> None:
        tokens = rng.choices(range(VOCAB), k=rng.randint(1, 20))
        some.start(lane, tokens, rng.randint(1, len(tokens)), rng.choice(WINDOWS))

    for lane in range(size):
        start(lane)
    changes: Counter[str] = Counter()
    for _ in range(400):
        for lane in range(size):
            tokens, prompt_len, window = some.sequences[lane]
            what = rng.random()
            if len(tokens) > 60 or what < 0.02:
                start(lane)
                changes["owner"] += 1
            elif what < 0.04:
                some.fork(lane, (lane + 1) % size)
                changes["fork"] += 1
            elif what < 0.06:
                some.start(lane, tokens, prompt_len, window)  # back after a preemption
                changes["again"] += 1
            elif what < 0.7:
                for _ in range(rng.choice([1, 1, 1, 4])):
                    some.append(lane, rng.randrange(VOCAB))
                    changes["token"] += 1
        some.check(rng.sample(range(size), rng.randint(1, size)))
    assert min(changes.values()) > 40


@pytest.mark.parametrize(
    ("window", "want"),
    [
        (-1, {5: (3, 1), 6: (1, 0), 7: (1, 1)}),
        (3, {5: (2, 1), 6: (0, 0), 7: (1, 1)}),
        (2, {5: (1, 1), 6: (0, 0), 7: (1, 1)}),
        (1, {5: (0, 0), 6: (0, 0), 7: (1, 1)}),
        (0, {5: (0, 0), 6: (0, 0), 7: (0, 0)}),
    ],
)
@pytest.mark.parametrize("num_first", [1, 3, 5])
def test_a_window_and_the_end_of_the_prompt(
    window: int, want: dict[int, tuple[int, int]], num_first: int
) -> None:
    """The same, however much of it stands there at first."""
    tokens = [5, 6, 5, 5, 7]  # of which three are the prompt
    some = Counted(2)
    some.start(1, tokens[:num_first], 3, window)
    for token in tokens[num_first:]:
        some.check([1])
        some.append(1, token)
    ids, seen, generated = (
        column[0].tolist() for column in some.counts.at(Rows.build([1], [4], "cpu"), VOCAB)
    )
    got = {token: its for token, *its in zip(ids, seen, generated, strict=True)}
    assert got == {token: list(its) for token, its in want.items()}


def test_several_tokens_at_once_count_like_one_after_the_other() -> None:
    some = Counted(3)
    for lane in range(3):
        some.start(lane, [3, 4, 3], 2, 6 - lane)
    some.check([0, 1, 2])
    for lane, tokens in enumerate(([5], [5, 3, 5, 5], [4] * 30)):
        for token in tokens:
            some.append(lane, token)
    some.check([2, 0, 1])


def test_lanes_without_a_row_are_counted_when_they_have_one() -> None:
    some = Counted(2)
    some.start(0, [3], 1, 4)
    some.start(1, [3, 4], 1, -1)
    some.check([0])
    for token in range(9):
        some.append(0, token)
        some.append(1, token % 2)
        some.check([0])
    some.check([1, 0])


def test_forks_before_and_after_the_first_count() -> None:
    some = Counted(4)
    some.start(0, [3, 4, 4], 2, 3)
    some.fork(0, 1)  # nothing has been counted yet
    some.append(1, 5)
    some.check([0, 1])
    some.append(0, 6)
    some.fork(0, 2)  # token 6 has not been counted yet
    some.append(0, 3)
    some.append(2, 4)
    some.append(2, 4)
    some.check([0, 1, 2])
    some.start(3, [7] * 9, 9, -1)
    some.check([3])
    some.fork(1, 3)
    some.check([3, 2, 1, 0])


# -- the work it is


class Watched:
    """How often a table of counts is begun, and added to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recounted: list[int] = []
        self.appended: list[int] = []
        recount, append = TokenCounts._recount, TokenCounts._append

        def recounting(counts: TokenCounts, lane: int, position: int) -> None:
            self.recounted.append(lane)
            recount(counts, lane, position)

        def appending(counts: TokenCounts, lanes: Any, positions: Any) -> None:
            self.appended.append(len(lanes))
            append(counts, lanes, positions)

        monkeypatch.setattr(TokenCounts, "_recount", recounting)
        monkeypatch.setattr(TokenCounts, "_append", appending)


def test_a_lane_is_counted_once_and_then_a_token_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched(monkeypatch)
    some = Counted(4)
    for lane in range(3):
        some.start(lane, [3 + lane] * 30, 30, (-1, 5, 40)[lane])
    some.check([0, 1, 2])
    assert sorted(watched.recounted) == [0, 1, 2]
    assert watched.appended == []
    for step in range(30):
        for lane in range(3):
            some.append(lane, step % VOCAB)
        some.check([0, 1, 2])
        assert watched.appended == [3] * (step + 1)  # one for all rows
        some.check([0, 1, 2])  # nothing is new
    some.fork(0, 3)
    some.check([3, 0])
    assert watched.appended == [3] * 30
    assert len(watched.recounted) == 3


def test_penalties_of_a_long_output_recount_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    params = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "penalty_last_n": 9}
    specs = [Spec(params, [3, 4], [5]), Spec({}, [3]), Spec(params, [6] * 8, [7, 7])]
    lanes = new_lanes(3, 60)
    pipeline = Pipeline(STAGES, lanes)
    for lane, spec in enumerate(specs):
        place(lanes, lane, spec, pipeline)
    for step in range(40):
        logits = random_rows(3, VOCAB, seed=step)
        got = pipeline.transform(logits, rows_of(specs, [0, 1, 2]))
        want = logits.clone()
        for row, spec in enumerate(specs):
            want[row] = process([Penalties], [spec], logits[row, None])[0]
        assert torch.equal(got, want)
        token = step % VOCAB
        lanes.append([0, 1, 2], [len(spec.tokens) for spec in specs], [token] * 3)
        specs = [Spec(spec.params, spec.prompt, [*spec.output, token]) for spec in specs]
    assert len(watched.appended) == 39
    for_comparison = 2 * 40
    assert len(watched.recounted) == 2 + for_comparison


def test_nothing_is_kept_until_a_lane_counts() -> None:
    some = Counted(3)
    assert some.counts._slots is None
    some.start(0, [3], 1, -1)
    assert some.counts._slots is None
    some.check([0])
    assert some.counts._slots is not None
