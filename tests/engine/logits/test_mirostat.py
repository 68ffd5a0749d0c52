"""Mirostat: the limit, and how it follows what is drawn."""

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import LogprobsMode
from engine.lanes import Lanes
from engine.logits import ORDERS, STAGES
from engine.logits.mirostat import Mirostat
from engine.logits.pipeline import Pipeline, run_filters
from engine.numerics import NEG_INF
from engine.sampler import Sampler
from engine.tokenizer import Tokenizer
from tests.support.engines import Results, request, run, scripted_core
from tests.support.logits import (
    DIST_P,
    Spec,
    assert_filters_like,
    kept,
    likeliest,
    new_lanes,
    one_row,
    only,
    place,
    random_rows,
    rows_of,
    softmax,
)
from tests.support.scripted import ScriptedModel

VERSIONS = pytest.mark.parametrize("version", [1, 2])


def count_allowed(probs: list[float], mu: float) -> float:
    """How many tokens version 1 allows, before it is made a whole number."""
    ranks = likeliest(probs)[:100]
    pairs = list(pairwise(ranks))
    steps = [math.log((i + 2) / (i + 1)) for i in range(len(pairs))]
    drops = [math.log(probs[a] / probs[b]) for a, b in pairs]
    both = math.fsum(t * b for t, b in zip(steps, drops, strict=True))
    slope = both / math.fsum(t * t for t in steps)
    epsilon = slope - 1.0
    return float((epsilon * 2.0**mu / (1.0 - len(probs) ** -epsilon)) ** (1.0 / slope))


def survivors(version: int, mu: float, row: Tensor) -> list[int]:
    """What a limit leaves of a row, likeliest first."""
    probs = softmax(row)
    ranks = likeliest(probs)
    if version == 1:
        return ranks[: max(int(min(count_allowed(probs, mu), len(ranks))), 1)]
    return [i for i in ranks if -math.log2(probs[i]) <= mu] or ranks[:1]


@pytest.mark.parametrize("vocab_size", [5, 99, 257, 700])
@VERSIONS
def test_each_row_matches_a_naive_loop_at_its_own_limit(version: int, vocab_size: int) -> None:
    def oracle(tau: float, scores: Tensor) -> Tensor:
        return only(scores[0], survivors(version, 2.0 * tau, scores[0]))[None]

    taus = [0.2, 0.9, 1.7, 3.1, 4.6]
    assert_filters_like(Mirostat, "mirostat_tau", taus, oracle, vocab_size, mirostat=version)


def test_worked_numbers_of_the_estimate() -> None:
    probs = DIST_P.exp().double().tolist()
    assert count_allowed(probs, 3.0) == pytest.approx(5.107, abs=5e-4)
    assert count_allowed(probs, 2.0) == pytest.approx(2.494, abs=5e-4)
    for tau, count in ((1.5, 5), (1.0, 2)):
        got = one_row(Mirostat, DIST_P, mirostat=1, mirostat_tau=tau)
        assert kept(got) == set(range(count))


def test_worked_numbers_of_the_limit() -> None:
    lanes = new_lanes(3, 2)
    stage = Mirostat(lanes)
    specs = [Spec({"mirostat": 2, "mirostat_tau": 1.5, "mirostat_eta": 0.1})] * 3
    for lane, spec in enumerate(specs):
        place(lanes, lane, spec, stage)
    assert stage.mu.values.tolist() == [3.0] * 3
    rows = rows_of(specs, [0, 1, 2])
    (part,) = run_filters([stage], DIST_P.repeat(3, 1), rows)
    assert kept(part.candidates.dense()[0]) == {0, 1, 2}
    stage.observe(part.candidates, rows, torch.tensor([0, 1, 2]))
    assert stage.mu.values.tolist() == pytest.approx([3.041254, 2.999750, 2.899750], abs=1e-6)


# -- rows of special kinds


@VERSIONS
@pytest.mark.parametrize("tau", [1e-300, 0.01, 1e300, 1.7e308])
def test_from_one_token_to_all_of_them(version: int, tau: float) -> None:
    row = random_rows(2, 700)[1]
    got = one_row(Mirostat, row, mirostat=version, mirostat_tau=tau)
    assert kept(got) == (set(range(700)) if tau > 1 else {int(row.argmax())})


@pytest.mark.parametrize(("mu", "count"), [(6.0, 9), (8.0, 37), (1.0, 1)])
def test_zipfs_own_distribution_has_a_limit_of_its_own(mu: float, count: int) -> None:
    """With an exponent of 1 the sum that the formula approximates is a logarithm."""
    row = -torch.arange(1.0, 1001.0).log()
    got = one_row(Mirostat, row, mirostat=1, mirostat_tau=mu / 2)
    assert count == max(int(2**mu / math.log(1000)), 1)
    assert kept(got) == set(range(count))
    two = torch.full((1000,), NEG_INF)
    two[[5, 900]] = torch.tensor([2.0, 1.0]).log()
    got = one_row(Mirostat, two, mirostat=1, mirostat_tau=mu / 2)
    assert kept(got) == ({5} if count == 1 else {5, 900})


@pytest.mark.parametrize(
    ("vocab_size", "mu", "all_of_it"),
    [(5, 3.0, True), (5, 1.0, False), (700, 9.5, True), (700, 9.4, False)],
)
def test_a_flat_row_is_allowed_whole_or_not_at_all(
    vocab_size: int, mu: float, all_of_it: bool
) -> None:
    """Its exponent is 0: what is under the root is above 1, or it is not."""
    got = one_row(Mirostat, torch.zeros(vocab_size), mirostat=1, mirostat_tau=mu / 2)
    assert kept(got) == (set(range(vocab_size)) if all_of_it else {0})


@VERSIONS
@pytest.mark.parametrize("alive", [[0], [699], [3, 400]])
def test_rows_of_one_or_two_tokens(version: int, alive: list[int]) -> None:
    row = torch.full((700,), NEG_INF)
    row[alive] = torch.tensor([2.0, -1.0])[: len(alive)]
    for tau in (0.01, 5.0):
        got = one_row(Mirostat, row, mirostat=version, mirostat_tau=tau)
        assert alive[0] in kept(got) <= set(alive)


# -- through the sampler


class Run:
    """Sequences that draw from one random row after another."""

    def __init__(self, specs: list[Spec], context_len: int = 64) -> None:
        self.specs = specs
        self.lanes: Lanes = new_lanes(len(specs) + 2, context_len)
        self.pipeline = Pipeline(STAGES, self.lanes, ORDERS)
        self.sampler = Sampler(self.lanes, self.pipeline, LogprobsMode.RAW_LOGPROBS)
        self.lane_ids = [self.lanes.take() for _ in specs]
        for lane, spec in zip(self.lane_ids, specs, strict=True):
            place(self.lanes, lane, spec, self.sampler)

    def step(self, logits: Tensor) -> list[int]:
        tokens = self.sampler(logits, rows_of(self.specs, self.lane_ids)).token_ids
        positions = [len(spec.tokens) for spec in self.specs]
        self.lanes.append(self.lane_ids, positions, tokens)
        self.specs = [
            replace(spec, output=[*spec.output, token])
            for spec, token in zip(self.specs, tokens, strict=True)
        ]
        return tokens

    @property
    def limits(self) -> list[float]:
        stage = next(stage for stage in self.pipeline.stages if isinstance(stage, Mirostat))
        return [float(stage.mu.values[lane]) for lane in self.lane_ids]


def following(version: int, tau: float, eta: float, **others: Any) -> dict[str, Any]:
    return {"mirostat": version, "mirostat_tau": tau, "mirostat_eta": eta} | others


@pytest.mark.parametrize("order", ["vllm", "hf", "llama.cpp"])
def test_the_limit_follows_each_draw_as_the_formula_says(order: str) -> None:
    rng = random.Random(1)
    params = [
        following(
            row % 3,
            rng.choice([1.0, 2.0, 4.0]),
            rng.choice([0.1, 1.0]),
            temperature=rng.choice([0.7, 1.0, 1.5]),
            sampler_order=order,
        )
        for row in range(24)
    ]
    some = Run([Spec(one, seed=row) for row, one in enumerate(params)])
    want = some.limits
    cut = 0
    for step in range(25):
        logits = random_rows(24, 700, seed=step)
        tokens = some.step(logits)
        for row, (one, token) in enumerate(zip(params, tokens, strict=True)):
            if not one["mirostat"]:
                continue
            probs = softmax(logits[row] / one["temperature"])
            left = survivors(one["mirostat"], want[row], logits[row] / one["temperature"])
            assert token in left
            cut += len(left) < 700
            mass = math.fsum(probs[i] for i in left)
            error = -math.log2(probs[token] / mass) - one["mirostat_tau"]
            want[row] -= one["mirostat_eta"] * error
        assert some.limits == pytest.approx(want, rel=1e-5, abs=1e-5)
        want = some.limits
    assert cut > 200


def test_a_draw_from_the_worked_distribution_moves_the_limit() -> None:
    worked = {0: 3.041254, 1: 2.999750, 2: 2.899750}
    seen = set()
    for seed in range(30):
        one = Run([Spec(following(2, 1.5, 0.1), seed=seed)])
        (token,) = one.step(DIST_P[None])
        assert one.limits == pytest.approx([worked[token]], abs=1e-6)
        seen.add(token)
    assert seen == set(worked)


@VERSIONS
def test_a_row_that_needs_more_tokens_moves_the_limit_once(version: int) -> None:
    row = torch.zeros(700)
    row[300] = 0.5
    one = Run([Spec(following(version, 5.0, 0.1)), Spec(following(version, 0.1, 0.1))])
    left, probs = survivors(version, 10.0, row), softmax(row)
    assert len(left) > 600  # far more than are looked at first
    (token, best) = one.step(row.expand(2, -1).contiguous())
    error = -math.log2(probs[token] / math.fsum(probs[i] for i in left)) - 5.0
    assert (token in left, best) == (True, 300)
    assert one.limits == pytest.approx([10.0 - 0.1 * error, 0.2 + 0.1 * 0.1], abs=1e-6)


def test_over_many_draws_the_surprise_comes_near_the_target() -> None:
    some = Run([Spec(following(2, 3.0, 0.2), seed=row) for row in range(20)], 140)
    row = random_rows(2, 700, seed=4)[1]
    probs = softmax(row)
    for _ in range(60):
        some.step(row.repeat(20, 1))
    total = 0.0
    for _ in range(60):
        limits = some.limits
        for token, mu in zip(some.step(row.repeat(20, 1)), limits, strict=True):
            mass = math.fsum(probs[i] for i in survivors(2, mu, row))
            total -= math.log2(probs[token] / mass)
    assert total / (20 * 60) == pytest.approx(3.0, abs=0.15)


def test_greedy_rows_have_no_part_in_it() -> None:
    some = Run([Spec(following(2, 1.0, 1.0, temperature=0.0)), Spec(following(2, 1.0, 1.0))])
    logits = random_rows(2, 700)
    tokens = some.step(logits)
    assert tokens[0] == int(logits[0].argmax())
    assert some.limits[0] == 2.0
    assert some.limits[1] != 2.0


@VERSIONS
@pytest.mark.parametrize("eta", [1e300, 1.7e308])
def test_huge_steps_leave_a_limit_that_is_a_number(version: int, eta: float) -> None:
    some = Run([Spec(following(version, 3.0, eta), seed=row) for row in range(12)])
    for step in range(20):
        logits = random_rows(12, 700, seed=step)
        tokens = some.step(logits)
        assert all(math.isfinite(mu) for mu in some.limits)
        assert all(token >= 0 for token in tokens)
    assert max(some.limits) > 1e290


# -- forks and preemption


def test_a_fork_takes_the_limit_along_and_then_goes_its_own_way() -> None:
    some = Run([Spec(following(2, 2.0, 0.5), seed=row) for row in range(2)])
    for step in range(5):
        some.step(random_rows(2, 700, seed=step))
    child = some.lanes.take()
    some.lanes.fork([some.lane_ids[0]], [child])
    some.sampler.fork([some.lane_ids[0]], [child])
    some.lane_ids.append(child)
    some.specs.append(replace(some.specs[0], seed=99))
    assert some.limits[2] == some.limits[0]
    assert some.limits[2] not in (4.0, some.limits[1])
    some.lanes.seeds[child] = 99
    for step in range(5, 10):
        row = random_rows(2, 700, seed=step)[1]
        some.step(row.expand(3, -1).contiguous())
    assert len(set(some.limits)) == 3


def test_a_saved_state_gives_another_lane_the_same_limit() -> None:
    some = Run([Spec(following(2, 2.0, 0.5), seed=5)])
    for step in range(5):
        some.step(random_rows(1, 700, seed=step))
    (before,), (lane,), (spec,) = some.limits, some.lane_ids, some.specs
    state = some.lanes.save(lane)
    some.lanes.release(lane)
    place(some.lanes, lane, Spec(following(1, 9.0, 0.5)), some.sampler)  # another owner
    other = some.lanes.num_lanes - 1
    place(some.lanes, other, spec, some.sampler)
    some.lanes.restore(other, state)
    some.lane_ids = [other]
    assert some.limits == [before]


VOCAB = 24


def crowded(tokenizer: Tokenizer, num_blocks: int) -> tuple[Results, int]:
    """Requests of both versions, some of several sequences; and how many were preempted."""
    model = ScriptedModel(vocab_size=VOCAB, context_len=32, attentive=True)
    core = scripted_core(model, tokenizer, num_blocks=num_blocks)
    requests = [
        request(
            core,
            [5 + index, 6, 7],
            f"{index}",
            max_tokens=22,
            temperature=1.3,
            ignore_eos=True,
            seed=index,
            n=1 + index % 2,
            **following(1 + index // 2 % 2, 2.0, 0.8),
        )
        for index in range(6)
    ]
    return run(core, *requests), core.scheduler.num_preemptions


def tokens_of(results: Results) -> dict[tuple[str, int], list[int]]:
    return {key: [token.id for token in delta.tokens] for key, delta in results.choices.items()}


def test_the_limit_survives_a_preemption(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, num_preempted = crowded(tokenizer, num_blocks=128)
    assert num_preempted == 0
    got, num_preempted = crowded(tokenizer, num_blocks=18)
    assert num_preempted > 2
    assert tokens_of(got) == tokens_of(want)
    monkeypatch.setattr(Lanes, "restore", lambda *_: None)
    forgetful, _ = crowded(tokenizer, num_blocks=18)
    assert tokens_of(forgetful) != tokens_of(want)  # it would notice


def test_each_choice_has_a_limit_of_its_own(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(vocab_size=VOCAB, context_len=64, attentive=True)
    core = scripted_core(model, tokenizer, num_blocks=128)
    options: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True, "seed": 3, "max_tokens": 30}
    options |= following(2, 1.5, 1.0)
    several = run(core, request(core, [5, 6], n=4, **options))
    alone = run(core, request(core, [5, 6], **options))
    assert several.ids(index=0) == alone.ids()
    assert len({tuple(several.ids(index=index)) for index in range(4)}) == 4
