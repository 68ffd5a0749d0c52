"""The draw, and the numbers reported with it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import LogprobsMode
from engine.errors import GenerationFailed
from engine.logits import STAGES
from engine.logits.candidates import Candidates
from engine.logits.pipeline import Pipeline
from engine.messages import FinishReason
from engine.numerics import BLOCK, NEG_INF
from engine.rng import Domain, derive, gumbel, uniform
from engine.sampler import NO_VALID_TOKEN, NOT_A_NUMBER, Sampler, Samples, draw_dense
from engine.sampler import draw as draw_candidates
from engine.tokenizer import Tokenizer
from tests.support.engines import request, run, scripted_core
from tests.support.logits import (
    ROW_A,
    Spec,
    kept,
    new_lanes,
    place,
    process,
    random_rows,
    rows_of,
    sampler_for,
    several_threads,
)
from tests.support.scripted import ScriptedModel, pseudo_random

NAN = float("nan")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def draw(logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draws from whole rows."""
    return draw_dense(logits, torch.ones(len(logits)), seeds, positions)


# -- the draw


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 700, 49_152])
def test_a_draw_depends_on_nothing_but_row_seed_and_position(vocab_size: int) -> None:
    logits = random_rows(64, vocab_size)
    logits[::3, ::2] = NEG_INF
    seeds = ints(*(derive(9, index) for index in range(64)))
    positions = torch.arange(64) * 37 % 64
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    with several_threads():
        together = draw(logits, seeds, positions)
        permuted = draw(logits[order], seeds[order], positions[order])
        assert torch.equal(permuted, together[order])
        for row in range(0, 64, 5):
            alone = slice(row, row + 1)
            assert torch.equal(draw(logits[alone], seeds[alone], positions[alone]), together[alone])


def naive(logits: Tensor, seed: int, position: int) -> int:
    """A block by its mass, then a token in it, both by Gumbel noise; in float64."""
    row = logits.double()

    def noise(ids: Tensor, domain: Domain) -> Tensor:
        return gumbel(uniform(ints(seed), ints(position), ids, domain))

    masses = torch.stack([part.logsumexp(0) for part in row.split(BLOCK)])
    block = int((masses + noise(torch.arange(len(masses)), Domain.BLOCK)).argmax())
    ids = torch.arange(len(row)).split(BLOCK)[block]
    return int(ids[(row[ids] + noise(ids, Domain.TOKEN)).argmax()])


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 700])
def test_the_draw_matches_its_definition(vocab_size: int) -> None:
    logits = random_rows(100, vocab_size)
    logits[::3, ::2] = NEG_INF
    extremes = [0, -1, 42, 2**63 - 1, -(2**63)]
    seeds = [extremes[row % 5] for row in range(100)]
    positions = [row * 1009 for row in range(100)]
    got = draw(logits, ints(*seeds), ints(*positions)).tolist()
    assert got == [naive(*key) for key in zip(logits, seeds, positions, strict=True)]


def test_a_draw_at_a_temperature_is_one_of_the_divided_row() -> None:
    logits = random_rows(64, 700)
    temperature = torch.tensor([0.5, 2.0]).repeat(32)  # whose quotients are exact
    seeds, positions = torch.arange(64), torch.arange(64)
    got = draw_dense(logits, temperature, seeds, positions)
    assert torch.equal(got, draw(logits / temperature[:, None], seeds, positions))


@pytest.mark.parametrize("width", [50, 700])
def test_a_draw_of_few_candidates_gives_each_its_own_noise(width: int) -> None:
    logits = random_rows(60, 700)
    seeds, positions = torch.arange(60) - 30, torch.arange(60) * 11
    candidates = Candidates(logits, width)
    mask = candidates.logits.cumsum(1) % 3 > 1
    mask[:, 0] = True
    everywhere = torch.ones(60, 1, dtype=torch.bool)
    candidates.keep(mask, active=everywhere, inside=everywhere)

    got = draw_candidates(candidates, seeds, positions).tolist()

    for row, token_id in enumerate(got):
        ids = candidates.ids[row][mask[row]]
        noise = gumbel(uniform(seeds[row], positions[row], ids))
        assert token_id == int(ids[(logits[row, ids] + noise).argmax()])


def test_where_a_tail_is_left_the_draw_is_one_of_the_whole_row() -> None:
    logits = random_rows(40, 700)
    seeds, positions = torch.arange(40), torch.arange(40)
    candidates = Candidates(logits, 20)
    everywhere = torch.ones(40, 1, dtype=torch.bool)
    candidates.drop(torch.arange(20).expand(40, -1) < 2, sure=everywhere)
    dense = candidates.dense()
    assert (dense > NEG_INF).sum(1).tolist() == [698] * 40
    got = draw_candidates(candidates, seeds, positions)
    assert torch.equal(got, draw(dense, seeds, positions))


def test_golden_draws() -> None:
    keys = [(42, 7), (42, 8), (0, 0), (-1, 7)]
    seeds, positions = (ints(*part) for part in zip(*keys, strict=True))
    assert draw(ROW_A.expand(4, -1), seeds, positions).tolist() == [0, 1, 1, 1]


def test_golden_frequencies() -> None:
    drawn = draw(ROW_A.expand(20_000, -1), ints(42).expand(20_000), torch.arange(20_000))
    assert drawn.bincount().tolist() == [12667, 4711, 1748, 656, 218]


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """How far counts are from what probabilities promise, as a standard normal number.

    Outcomes expected fewer than 8 times are counted as one. Wilson and Hilferty's transform.
    """
    expected = probs.double() * counts.sum()
    common = expected >= 8
    expected = torch.cat((expected[common], expected[~common].sum()[None]))
    observed = torch.cat((counts[common], counts[~common].sum()[None])).double()
    observed, expected = observed[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    spread = 2 / (9 * degrees)
    return (math.cbrt(statistic / degrees) - (1 - spread)) / math.sqrt(spread)


def draws(row: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Many draws from one row, some at a time."""
    parts = zip(seeds.split(1000), positions.split(1000), strict=True)
    return torch.cat([draw(row.expand(len(part[0]), -1), *part) for part in parts])


@pytest.mark.parametrize("vocab_size", [5, 200, 700, 5000])
@pytest.mark.parametrize("keys", ["positions", "seeds", "choices"])
def test_draws_follow_the_softmax(vocab_size: int, keys: str) -> None:
    row = 1.5 * random_rows(4, vocab_size, seed=3)[1]
    row[::5] = NEG_INF
    count = 20_000
    index = torch.arange(count)
    seeds, positions = {
        "positions": (ints(7).expand(count), index),
        "seeds": (index, ints(7).expand(count)),
        "choices": (ints(*(derive(7, choice) for choice in range(count))), ints(7).expand(count)),
    }[keys]
    counts = draws(row, seeds, positions).bincount(minlength=vocab_size)
    assert chi_square(counts, row.softmax(0)) < 4
    assert chi_square(counts, (row / 1.1).softmax(0)) > 4  # it would notice


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.6},
        {"temperature": 1.4, "top_k": 60},
        {"top_p": 0.8, "logit_bias": {3: 6.0}},
        {"typical_p": 0.7},
        {"min_p": 0.05, "allowed_token_ids": list(range(0, 700, 2))},
    ],
)
def test_draws_follow_the_softmax_of_what_filters_leave(params: dict[str, Any]) -> None:
    row = random_rows(4, 700, seed=5)[2]
    processed = process(STAGES, [Spec(params)], row[None])[0]
    drawn = draws(processed, ints(11).expand(20_000), torch.arange(20_000))
    counts = drawn.bincount(minlength=700)
    assert chi_square(counts, processed.double().softmax(0)) < 4
    assert set(drawn.tolist()) <= kept(processed)


@pytest.mark.parametrize("vocab_size", [5, 700])
def test_successive_draws_are_independent(vocab_size: int) -> None:
    row = torch.full((vocab_size,), NEG_INF)
    row[torch.arange(5) * (vocab_size // 5)] = ROW_A
    drawn = draws(row, ints(3).expand(20_001), torch.arange(20_001)) // (vocab_size // 5)
    pairs = (drawn[:-1] * 5 + drawn[1:]).bincount(minlength=25)
    probs = ROW_A.double().softmax(0)
    assert chi_square(pairs, torch.outer(probs, probs).flatten()) < 4


def test_a_filter_changes_a_draw_only_if_it_drops_the_winner() -> None:
    logits = random_rows(200, 200)
    seeds, positions = torch.arange(200), torch.arange(200) % 7
    before = draw(logits, seeds, positions)
    filtered = process(STAGES, [Spec({"top_p": 0.9, "top_k": 30})] * 200, logits)
    after = draw(filtered, seeds, positions)
    survived = filtered.gather(1, before[:, None])[:, 0] > NEG_INF
    assert torch.equal(after[survived], before[survived])
    assert 0 < survived.sum() < 200


def test_a_single_token_is_always_drawn() -> None:
    for at in (0, 255, 256, 699):
        row = torch.full((700,), NEG_INF)
        row[at] = -80.0
        assert set(draws(row, torch.arange(50), torch.arange(50)).tolist()) == {at}


def test_an_infinite_entry_is_drawn_before_all_others() -> None:
    row = random_rows(1, 700)[0]
    row[[255, 600]] = float("inf")
    assert set(draws(row, torch.arange(50), torch.arange(50)).tolist()) <= {255, 600}


# -- the sampler


def sample_of(specs: Sequence[Spec], raw: Tensor, mode: str = "raw_logprobs") -> Samples:
    """What the sampler makes of these sequences' rows, which it may write to."""
    sampler, lane_ids = sampler_for(specs, raw.shape[1], LogprobsMode(mode))
    return sampler(raw, rows_of(specs, lane_ids))


def sample(specs: Sequence[Spec], raw: Tensor, mode: str = "raw_logprobs") -> Samples:
    """What the sampler makes of these sequences' rows, without changing them."""
    before = raw.clone()
    samples = sample_of(specs, raw, mode)
    assert torch.equal(raw.isnan(), before.isnan())
    assert torch.equal(raw.nan_to_num(), before.nan_to_num())
    return samples


@pytest.mark.parametrize("params", [{}, {"bad_words": ["6 7"]}, {"no_repeat_ngram_size": 1}])
def test_the_models_logits_are_kept_where_they_are_reported(params: dict[str, Any]) -> None:
    raw = random_rows(3, 300)
    ids = list(range(1, 300))
    options: dict[str, Any] = {"frequency_penalty": 1.0, "allowed_token_ids": ids} | params
    hidden = [Spec(options | {"temperature": t}, output=[3, 4, 3]) for t in (0.0, 1.0, 0.5)]
    shown = [replace(spec, logprobs=2) for spec in hidden[:1]] + hidden[1:]
    before = raw.clone()
    reported = sample(shown, raw)  # which asserts that `raw` is as it was
    assert sample_of(hidden, raw).token_ids == reported.token_ids
    assert not torch.equal(raw, before) or params  # soft bans may need it again
    own, _ = reported.logprobs[0]
    want = before[0].log_softmax(0)[reported.token_ids[0]]
    assert own == pytest.approx(float(want), abs=1e-5)


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits = (random_rows(64, 700) / 2).round()
    specs = [
        Spec({"temperature": float(row % 3)}, output=[3] * (row % 5), seed=row - 30)
        for row in range(64)
    ]
    got = sample(specs, logits).token_ids
    for row, spec in enumerate(specs):
        assert sample([spec], logits[row, None]).token_ids == [got[row]]
        if spec.request.params.greedy:
            numbers = logits[row].tolist()
            assert got[row] == numbers.index(max(numbers))  # the lowest id of equals
        else:
            scaled = logits[row] / spec.request.params.temperature
            assert got[row] == naive(scaled, spec.seed, len(spec.tokens) - 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token_and_rows_of_no_numbers_are_told_apart(temperature: float) -> None:
    specs = [Spec({"temperature": temperature}, logprobs=1)] * 4
    impossible = {"allowed_token_ids": [5]}
    specs[0] = Spec({"temperature": temperature} | impossible, logprobs=1)
    raw = torch.zeros(4, 600)
    raw[:, 300] = 50.0
    raw[0, 5] = NEG_INF
    raw[1, 7] = NAN
    raw[2] = NAN
    want = [NO_VALID_TOKEN, *[NOT_A_NUMBER] * 2, 300]
    assert sample(specs, raw).token_ids == want
    mixed = [Spec({"temperature": 1.0 - temperature} | impossible), *specs[1:]]
    assert sample(mixed, raw).token_ids == want


@pytest.mark.parametrize("mode", list(LogprobsMode))
def test_each_row_gets_the_numbers_it_asked_for(mode: LogprobsMode) -> None:
    counts = [None, 0, 2, 5, 20, None, 1000]
    raw = torch.cat((random_rows(6, 700), random_rows(1, 700).round()))
    specs = [
        Spec({"temperature": 0.7, "top_p": 0.9}, seed=row, logprobs=count)
        for row, count in enumerate(counts)
    ]
    processed = process(STAGES, specs, raw)

    got = sample(specs, raw, mode)

    assert sorted(got.logprobs) == [row for row, count in enumerate(counts) if count is not None]
    source = raw if mode.raw else processed
    values = source.double().log_softmax(1) if mode.normalised else source.double()
    for row, (own, top) in got.logprobs.items():
        assert own == pytest.approx(values[row, got.token_ids[row]].item(), abs=1e-5)
        assert len(top) == min(counts[row] or 0, 700)
        for token_id, value in top:
            assert value == pytest.approx(values[row, token_id].item(), abs=1e-5)
            if token_id == got.token_ids[row]:
                assert value == own
        best_first = source[row].sort(descending=True, stable=True).indices.tolist()
        assert [token_id for token_id, _ in top] == best_first[: len(top)]
        alone = sample([specs[row]], raw[row, None], mode)
        assert alone.logprobs == {0: (own, top)}


def test_worked_logprobs() -> None:
    specs = [Spec({"temperature": 0.0}, logprobs=3)]
    ((own, top),) = sample(specs, torch.tensor([[1000.0, 1001.0, 1002.0]])).logprobs.values()
    assert own == top[0][1]
    assert [token_id for token_id, _ in top] == [2, 1, 0]
    numbers = [value for _, value in top]
    assert numbers == pytest.approx([-0.407606, -1.407606, -2.407606], abs=1e-6)

    warm = [Spec({"temperature": 2.0}, logprobs=5)]
    for mode, want in (("raw_logprobs", -1.451914), ("processed_logprobs", -1.347101)):
        ((_, top),) = sample(warm, ROW_A[None], mode).logprobs.values()
        assert dict(top)[1] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("others", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"tfs": 0.9}])
def test_the_only_token_left_is_drawn_however_unlikely_it_became(others: dict[str, Any]) -> None:
    # DRY has lowered its logit to the end of float32, and the temperature would go beyond.
    params = {"temperature": 0.5, "dry_multiplier": 0.8, "allowed_token_ids": [6]} | others
    spec = Spec(params, prompt=(6,) * 200)
    assert sample_of([spec], random_rows(1, 700)).token_ids == [6]


def test_best_of_scores_its_sequences_unasked() -> None:
    got = sample([Spec({"n": 1, "best_of": 2}), Spec({"n": 2})], ROW_A.expand(2, -1))
    ((own, top),) = got.logprobs.values()
    assert list(got.logprobs) == [0]
    assert top == ()
    assert own == pytest.approx(ROW_A.log_softmax(0)[got.token_ids[0]].item(), abs=1e-6)


def test_a_fork_samples_like_its_parent_and_a_reused_lane_like_its_owner() -> None:
    lanes = new_lanes(2, 4)
    sampler = Sampler(lanes, Pipeline(STAGES, lanes), LogprobsMode.RAW_LOGPROBS)
    logits = random_rows(2, 300)[1].expand(2, -1).contiguous()
    drawn = naive(logits[0], 5, 0)
    specs = [Spec(seed=5), Spec({"temperature": 0.0}, logprobs=2)]
    assert drawn != logits[0].argmax()

    def chosen() -> Samples:
        return sampler(logits, rows_of(specs, [0, 1]))

    place(lanes, 0, specs[0], sampler)
    place(lanes, 1, specs[1], sampler)
    assert chosen().token_ids == [drawn, int(logits[0].argmax())]
    assert list(chosen().logprobs) == [1]
    lanes.fork([0], [1])
    sampler.fork([0], [1])
    assert chosen().token_ids == [drawn] * 2
    assert chosen().logprobs == {}
    place(lanes, 1, specs[1], sampler)
    assert list(chosen().logprobs) == [1]


# -- in the engine

BROKEN = 9  # a prompt that ends with this token breaks the model


def broken(value: float, vocab_size: int) -> ScriptedModel:
    """A model whose rows hold a strange number after one token, at ids 40 and 41."""

    def script(token: int, position: int) -> Tensor:
        row = pseudo_random(token, position, vocab_size)
        if token == BROKEN:
            row[40:42] = value
        return row

    return ScriptedModel(script)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_no_numbers_fails_its_request_alone(
    tokenizer: Tokenizer, temperature: float
) -> None:
    options: dict[str, Any] = {"temperature": temperature, "seed": 4, "logprobs": 2}
    options |= {"allowed_token_ids": list(range(10, 100))}

    def others(core: Any) -> list[Any]:
        return [request(core, [5, 6], name, max_tokens=6, **options) for name in ("a", "b")]

    core = scripted_core(broken(NAN, 128), tokenizer)
    alone = run(core, *others(core))
    core = scripted_core(broken(NAN, 128), tokenizer)
    got = run(core, *others(core), request(core, [5, BROKEN], "broken", **options))

    assert list(got.failed) == ["broken"]
    assert isinstance(got.failed["broken"].error, GenerationFailed)
    assert got.choices == alone.choices
    assert len(got.ids("a")) == 6


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 30},
        {"temperature": 0.5, "top_p": 0.9},
        {"temperature": 0.5, "min_p": 0.2},
        {"temperature": 0.5, "typical_p": 0.9},
        {"temperature": 0.5, "top_n_sigma": 1.0},
        {"temperature": 0.5, "eta_cutoff": 0.01},
        {"temperature": 0.5, "epsilon_cutoff": 0.01},
        {"temperature": 1.0, "repetition_penalty": 0.5, "logit_bias": {50: 100.0}},
    ],
)
def test_an_infinite_logit_counts_as_the_largest_number(
    tokenizer: Tokenizer, params: dict[str, Any]
) -> None:
    core = scripted_core(broken(float("inf"), 128), tokenizer)
    prompts = ([5, BROKEN], [5, 6])
    requests = [
        request(core, prompt, str(index), max_tokens=1, seed=2, logprobs=1, **params)
        for index, prompt in enumerate(prompts)
    ]
    got = run(core, *requests)
    ((token_id, logprob),) = [(token.id, token.logprob) for token in got.choices["0", 0].tokens]
    assert token_id in (40, 41)
    assert logprob == pytest.approx(-math.log(2))
    core = scripted_core(broken(float("inf"), 128), tokenizer)
    assert run(core, requests[1]).choices["1", 0] == got.choices["1", 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sequence_without_a_possible_token_stops(
    tokenizer: Tokenizer, temperature: float
) -> None:
    core = scripted_core(broken(NEG_INF, 128), tokenizer)
    options: dict[str, Any] = {"temperature": temperature, "logprobs": 1}
    only = options | {"allowed_token_ids": [40, 41]}
    got = run(
        core,
        request(core, [5, BROKEN], "stuck", **only),
        request(core, [5, 6], "free", max_tokens=3, **only),
    )
    stuck, free = got.choices["stuck", 0], got.choices["free", 0]
    assert (stuck.tokens, stuck.text) == ((), "")
    assert (stuck.finish_reason, stuck.stop_reason) == (FinishReason.STOP, "no_valid_token")
    assert (free.finish_reason, len(free.tokens)) == (FinishReason.LENGTH, 3)
