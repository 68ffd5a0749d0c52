"""DRY: repetitions that would go on."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import native
from engine.lanes import Lanes
from engine.logits import STAGES, dry
from engine.logits.dry import Dry
from engine.logits.matches import Matches
from engine.types import Rows
from tests.support.logits import (
    TEXTS,
    Spec,
    apply,
    bits,
    kept,
    new_lanes,
    place,
    process,
    random_rows,
    rows_of,
)

VOCAB = 12
CHOICES: dict[str, list[Any]] = {
    "dry_multiplier": [0.5, 0.8, 2.0],
    "dry_base": [1.0, 1.3, 1.75],
    "dry_allowed_length": [1, 1, 2, 3, 5],
    "dry_penalty_last_n": [-1, -1, -1, 2, 5, 9, 20, 1000],
    "dry_sequence_breakers": [[], [], ["a"], ["b"], ["b", "ca"], ["ca"], ["\n"], ["zz"]],
}


def some_specs(count: int, longest: int, seed: int = 0) -> list[Spec]:
    """Sequences of two to four kinds of tokens, so that much is repeated."""
    rng = random.Random(seed)
    specs = []
    for _ in range(count):
        params = {name: rng.choice(values) for name, values in CHOICES.items()}
        kinds = rng.sample(range(3, 10), rng.randint(2, 4))
        prompt = rng.choices(kinds, k=rng.randint(1, longest))
        specs.append(Spec(params, prompt, rng.choices(kinds, k=rng.randint(0, longest))))
    return specs


def is_broken(tokens: Sequence[int], end: int, spec: Spec) -> bool:
    """Is token `end` a breaker, or the last token of one?"""
    params = spec.request.params
    words = [word for word in spec.request.dry_breaker_ids if len(word) > 1]
    before = tuple(tokens[: end + 1])
    held = TEXTS[tokens[end]]
    return any(string in held for string in params.dry_sequence_breakers) or any(
        before[len(before) - len(word) :] == word for word in words if len(word) <= len(before)
    )


def penalties(spec: Spec) -> dict[int, float]:
    """What each token loses: every earlier place is compared with the end, token by token."""
    params, tokens = spec.request.params, spec.tokens
    last_n = params.dry_penalty_last_n
    begin = 0 if last_n < 0 else max(len(tokens) - last_n, 0)
    longest: dict[int, int] = {}
    for place_of_next in range(begin + 1, len(tokens)):
        length = 0
        while place_of_next - 1 - length >= begin:
            end = len(tokens) - 1 - length
            if tokens[place_of_next - 1 - length] != tokens[end] or is_broken(tokens, end, spec):
                break
            length += 1
        token = tokens[place_of_next]
        longest[token] = max(longest.get(token, 0), length)
    return {
        token: params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
        for token, length in longest.items()
        if length >= params.dry_allowed_length
        and not any(string in TEXTS[token] for string in params.dry_sequence_breakers)
    }


def lowered(logits: Tensor, specs: Sequence[Spec]) -> Tensor:
    """What is to come out."""
    want = logits.double()
    for row, spec in enumerate(specs):
        for token, penalty in penalties(spec).items():
            want[row, token] -= penalty
    return want.float()


def test_each_row_matches_a_naive_search_with_parameters_of_its_own() -> None:
    specs, logits = some_specs(600, 20), random_rows(600, VOCAB)
    got = apply(Dry, specs, logits)
    torch.testing.assert_close(got, lowered(logits, specs), rtol=1e-6, atol=1e-6)
    changed = (bits(got) != bits(logits)).sum(1)
    assert (changed > 0).sum() > 200
    assert (changed > 2).sum() > 30
    assert (changed == 0).sum() > 50


def test_looking_at_all_places_as_a_gpu_does_finds_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "LIBRARY", None)
    specs = some_specs(30, 40)
    logits = random_rows(len(specs), VOCAB)
    want = apply(Dry, specs, logits)
    monkeypatch.setattr(dry, "few_places", dry.all_places)
    assert torch.equal(apply(Dry, specs, logits), want)
    assert not torch.equal(want, logits)


def test_worked_numbers() -> None:
    a, b, c, y = range(6, 10)
    spec = Spec(
        {"dry_multiplier": 0.8, "dry_sequence_breakers": []},  # 1.75, 2 and all are the defaults
        prompt=(a, b, c, c, b),
        output=(c, y, a, b, c),
    )
    got: list[float] = apply(Dry, [spec], torch.zeros(1, 12))[0].tolist()
    want = {c: -0.8 * 1.75, y: -0.8}
    assert got == pytest.approx([want.get(token, 0.0) for token in range(12)])
    assert penalties(spec) == pytest.approx({c: 1.4, y: 0.8})


# -- windows and breakers


def penalised(tokens: Sequence[int], **params: Any) -> dict[int, float]:
    """The tokens that lose something, and how much."""
    given = {"dry_multiplier": 1.0, "dry_base": 2.0, "dry_allowed_length": 1}
    spec = Spec(given | {"dry_sequence_breakers": []} | params, prompt=tokens)
    (got,) = apply(Dry, [spec], torch.zeros(1, VOCAB)).tolist()
    return {token: -score for token, score in enumerate(got) if score}


@pytest.mark.parametrize(
    ("last_n", "want"),
    [
        (-1, {8: 4.0, 9: 1.0}),  # 4 6 7, and 7
        (9, {8: 2.0, 9: 1.0}),  # only 6 7 is inside
        (8, {8: 1.0, 9: 1.0}),
        (7, {9: 1.0}),
        (5, {9: 1.0}),
        (4, {}),  # the earlier 7 is outside
        (1, {}),
        (0, {}),
        (2**63 - 1, {8: 4.0, 9: 1.0}),
    ],
)
def test_only_the_latest_tokens_are_searched(last_n: int, want: dict[int, float]) -> None:
    tokens = [4, 6, 7, 8, 5, 7, 9, 4, 6, 7]
    assert penalised(tokens, dry_penalty_last_n=last_n) == pytest.approx(want)


@pytest.mark.parametrize(
    ("breakers", "tokens", "want"),
    [
        ([], [7, 8, 5, 7, 8], {5: 2.0}),
        (["b"], [4, 7, 8, 5, 4, 7, 8], {5: 1.0}),  # no further back than the breaker
        (["c"], [7, 8, 5, 7, 8], {}),  # the context ends in one
        (["c"], [7, 9, 5, 7, 9], {}),  # token 9, "ca", holds one
        (["b"], [4, 7, 5, 4], {}),  # one of a single token loses nothing
        (["a"], [4, 9, 5, 4], {}),
        (["ca"], [5, 8, 6, 4, 7, 8, 6, 4], {7: 1.0}),  # of two tokens, 8 and 6
        (["ca"], [5, 3, 6, 4, 7, 3, 6, 4], {7: 4.0}),  # 6 alone is none
        (["ca"], [5, 8, 3, 4, 8, 3], {4: 2.0}),  # and neither is 8
        (["ca"], [7, 8, 6, 4, 7, 8, 6], {}),
        (["ca"], [4, 6, 8, 4], {6: 1.0}),  # its parts can lose something
        (["zz"], [4, 6, 8, 4], {6: 1.0}),
    ],
)
def test_breakers_end_a_repetition(
    breakers: list[str], tokens: list[int], want: dict[int, float]
) -> None:
    assert penalised(tokens, dry_sequence_breakers=breakers) == pytest.approx(want)


def test_without_any_breakers_named_there_are_the_usual_ones() -> None:
    given = {"dry_multiplier": 1.0, "dry_allowed_length": 1}
    newline = [4, 7, 3, 7]  # token 3 is a line break
    for params, want in ((given, 0.0), (given | {"dry_sequence_breakers": []}, -1.0)):
        got = apply(Dry, [Spec(params, prompt=newline)], torch.zeros(1, VOCAB))
        assert got[0, 3] == want


# -- extremes


@pytest.mark.parametrize("allowed", [1, 3, 300])
def test_a_base_of_one_makes_all_lengths_alike(allowed: int) -> None:
    got = penalised([7] * 400, dry_base=1.0, dry_allowed_length=allowed, dry_multiplier=0.75)
    assert got == {7: 0.75}


@pytest.mark.parametrize("base", [1.001, 1.75, 50.0, 1e30, 1e300])
@pytest.mark.parametrize("multiplier", [0.01, 1.0, 5.0, 1e300])
def test_long_repetitions_are_no_ban(base: float, multiplier: float) -> None:
    spec = Spec({"dry_multiplier": multiplier, "dry_base": base}, prompt=[7] * 1500)
    for score in (0.0, 30.0, -3e38):
        (got,) = apply(Dry, [spec], torch.full((1, VOCAB), score))
        assert kept(got) == set(range(VOCAB))
        assert got.isfinite().all()
        assert got[7] < score or score == -3e38
    logits = torch.zeros(1, VOCAB)
    only = Spec(dict(spec.params) | {"allowed_token_ids": [7]}, prompt=spec.prompt)
    assert kept(process(STAGES, [only], logits)[0]) == {7}


def test_the_power_grows_until_float32_ends() -> None:
    def penalty(length: int) -> float:
        return penalised([7] * (length + 1), dry_base=1.75)[7]

    for length in (1, 2, 10, 100, 158):
        assert penalty(length) == pytest.approx(1.75 ** (length - 1), rel=1e-5)
    last = math.floor(math.log(torch.finfo(torch.float32).max) / math.log(1.75))
    assert penalty(200) == penalty(1000) == pytest.approx(1.75**last, rel=1e-4)


def test_a_ban_stays_one() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 8] = float("-inf")
    spec = Spec({"dry_multiplier": 1e300, "dry_allowed_length": 1}, prompt=[7, 8, 7])
    assert kept(apply(Dry, [spec], row)[0]) == set(range(VOCAB)) - {8}


def test_greedy_rows_are_penalised_too() -> None:
    params = {"dry_multiplier": 1.0, "dry_allowed_length": 1, "temperature": 0.0}
    got = process(STAGES, [Spec(params, prompt=[7, 8, 7])], torch.zeros(1, VOCAB))
    assert got[0].tolist() == [0.0] * 8 + [-1.0] + [0.0] * (VOCAB - 9)


@pytest.mark.parametrize("params", [{}, {"dry_penalty_last_n": 0}, {"dry_multiplier": 0.0}])
def test_what_has_no_effect_is_not_wanted(params: dict[str, Any]) -> None:
    given = {"dry_multiplier": 1.0} | params if params else {}
    assert not Dry(new_lanes(1, 1)).admit(0, Spec(given).request)


# -- what is kept between steps


class Growing:
    """Sequences in lanes, whose matches are kept up, step by step."""

    def __init__(self, num_lanes: int, context_len: int = 80) -> None:
        self.lanes: Lanes = new_lanes(num_lanes, context_len)
        self.stage = Dry(self.lanes)
        self.specs: dict[int, Spec] = {}

    def place(self, lane: int, spec: Spec) -> None:
        place(self.lanes, lane, spec, self.stage)
        self.specs[lane] = spec

    def append(self, lane: int, token: int) -> None:
        spec = self.specs[lane]
        self.lanes.append([lane], [len(spec.tokens)], [token])
        self.specs[lane] = Spec(spec.params, spec.prompt, [*spec.output, token])

    def fork(self, parent: int, child: int) -> None:
        self.lanes.fork([parent], [child])
        self.specs[child] = self.specs[parent]

    def check(self, lane_ids: Sequence[int], logits: Tensor) -> None:
        """Rows of these lanes in one step, against a search from scratch."""
        specs = [self.specs[lane] for lane in lane_ids]
        got = self.stage.apply(logits.clone(), rows_of(specs, list(lane_ids)))
        torch.testing.assert_close(got, lowered(logits, specs), rtol=1e-6, atol=1e-6)


def test_matches_are_the_same_after_any_number_of_appends_forks_and_new_owners() -> None:
    rng = random.Random(2)
    size = 10
    growing = Growing(size)
    fresh = iter(some_specs(400, 8, seed=3))
    for lane in range(size):
        growing.place(lane, next(fresh))
    num_changes = 0
    for step in range(150):
        for lane in range(size):
            spec = growing.specs[lane]
            what = rng.random()
            if len(spec.tokens) > 60 or what < 0.03:
                growing.place(lane, next(fresh))  # another owner
                num_changes += 1
            elif what < 0.06:
                growing.fork(lane, (lane + 1) % size)
                num_changes += 1
            elif what < 0.09:
                growing.place(lane, spec)  # the same one after a preemption
                num_changes += 1
            elif what < 0.7:
                for _ in range(rng.choice([1, 1, 1, 3])):
                    growing.append(lane, rng.choice(spec.tokens))
        lane_ids = rng.sample(range(size), rng.randint(1, size))
        growing.check(lane_ids, random_rows(len(lane_ids), VOCAB, seed=step))
    assert num_changes > 100


def test_a_fork_shares_the_past_and_not_the_future() -> None:
    growing = Growing(3)
    spec = Spec({"dry_multiplier": 1.0, "dry_allowed_length": 1}, prompt=[6, 7, 8, 6])
    growing.place(0, spec)
    growing.check([0], torch.zeros(1, VOCAB))
    growing.fork(0, 2)
    growing.append(0, 7)
    growing.append(2, 8)
    for _ in range(3):
        growing.check([2, 0], torch.zeros(2, VOCAB))
        growing.append(0, 8)
        growing.append(2, 6)


def test_a_lane_is_searched_once_and_then_kept_up(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    search = Matches._recount

    def counting(self: Matches, lane: int, position: int) -> None:
        searched.append(lane)
        search(self, lane, position)

    monkeypatch.setattr(Matches, "_recount", counting)
    growing = Growing(4)
    params = {"dry_multiplier": 1.0, "dry_allowed_length": 1}
    for lane, given in enumerate((params, params, {}, params)):
        growing.place(lane, Spec(given, prompt=[6, 7, 6, 7]))
    for step in range(40):
        growing.check([0, 1, 2], torch.zeros(3, VOCAB))
        for lane in range(3):
            growing.append(lane, 6 + (step + lane) % 3)
    assert sorted(searched) == [0, 1]  # one wants nothing, one has no row


def test_rows_far_behind_what_a_lane_holds_see_only_their_past() -> None:
    lanes = new_lanes(1, 20)
    stage = Dry(lanes)
    params = {"dry_multiplier": 1.0, "dry_allowed_length": 1, "dry_sequence_breakers": []}
    tokens = [6, 7, 6, 7, 6, 8]
    place(lanes, 0, Spec(params, prompt=tokens), stage)
    for end in range(1, len(tokens) + 1):
        spec = Spec(params, prompt=tokens[:end])
        got = stage.apply(torch.zeros(1, VOCAB), Rows.build([0], [end - 1], "cpu"))
        torch.testing.assert_close(got, lowered(torch.zeros(1, VOCAB), [spec]))
