"""Best-first and A* search find what a search level by level finds, with no more expansions."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from engine.core import EngineCore
from engine.strategies.base import Branch
from engine.strategies.search import A_STAR, BEST_FIRST, BREADTH, Parts, Search
from engine.tokenizer import Tokenizer
from engine.types import Group
from tests.support import tiny
from tests.support.beams import (
    ENDS,
    START,
    TOY,
    A,
    B,
    E,
    beams,
    hypotheses,
    prompts_of,
    toy_core,
)
from tests.support.engines import (
    EOS,
    Results,
    assert_all_free,
    collect,
    request,
    run,
    scripted_core,
    tiny_core,
)
from tests.support.invariants import check
from tests.support.scripted import ScriptedModel

Ids = tuple[int, ...]
Following = Callable[[list[Ids]], list[dict[int, float]]]  # outputs to the next tokens' logprobs


# -- a search level by level, in which what has ended keeps its place


@dataclass(frozen=True)
class Found:
    ids: Ids
    total: float
    ended: bool = False


def level_by_level(
    following: Following,
    ends: Sequence[int],
    width: int,
    max_tokens: int,
    key: Callable[[Found], float] = lambda one: one.total,
) -> tuple[list[Found], int]:
    """The beam of the last level, best first, and how many hypotheses were expanded."""
    beam = [Found((), 0.0)]
    num_expansions = 0
    for length in range(1, max_tokens + 1):
        candidates = [one for one in beam if one.ended]
        going = [one for one in beam if not one.ended]
        num_expansions += len(going)
        for one, logprobs in zip(going, following([one.ids for one in going]), strict=True):
            for token, logprob in logprobs.items():
                ended = token in ends or length == max_tokens
                candidates.append(Found((*one.ids, token), one.total + logprob, ended))
        beam = sorted(candidates, key=key, reverse=True)[:width]
        if all(one.ended for one in beam):
            break
    return beam, num_expansions


def of_toy(outputs: list[Ids]) -> list[dict[int, float]]:
    lasts = [(START, *ids)[-1] for ids in outputs]
    return [{token: math.log(prob) for token, prob in TOY[last].items()} for last in lasts]


class Tiny:
    """A tiny model, whose tokens `ENDS` end a text, in the engine and outside of it."""

    def __init__(self, core: EngineCore, model: Any) -> None:
        self.core = core
        self.model = model

    def following(self, prompt: list[int]) -> Following:
        def logprobs(outputs: list[Ids]) -> list[dict[int, float]]:
            if not outputs:
                return []
            with torch.inference_mode():
                logits = self.model(torch.tensor([[*prompt, *ids] for ids in outputs])).logits
            rows = logits[:, -1].double().log_softmax(-1).tolist()
            return [dict(enumerate(row)) for row in rows]

        return logprobs

    def search(self, prompts: list[list[int]], **options: Any) -> Results:
        made = [
            beams(self.core, prompt, str(index), ENDS, **options)
            for index, prompt in enumerate(prompts)
        ]
        results = run(self.core, *made)
        assert not results.failed
        assert_all_free(self.core)
        return results


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("search")
    tiny.save(tiny.hf_model("llama", initializer_range=0.15), folder)
    return Tiny(tiny_core(folder, prefix_cache=True)[0], tiny.load(folder))


@pytest.fixture
def searched_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Parts], None]:
    """Lets requests be searched for with other parts than they can name."""

    def use(parts: Parts) -> None:
        monkeypatch.setattr("engine.core.choose", lambda request: Search(request, parts))

    return use


def expansions(results: Results, request_id: str = "r") -> int:
    """How many were expanded, as every choice says."""
    counts = {
        delta.report["num_expansions"]
        for (name, _), delta in results.choices.items()
        if name == request_id
    }
    assert len(counts) == 1
    return int(counts.pop())


# -- worked numbers


@pytest.mark.parametrize(
    ("width", "n", "want", "num_expansions"),
    [
        (2, 1, [([B, E], -1.021651)], 3),  # the start, A and B
        (1, 1, [([A, E], -1.609438)], 2),
        (2, 2, [([B, E], -1.021651), ([A, E], -1.609438)], 3),
    ],
)
@pytest.mark.parametrize("strategy", ["best_first", "astar"])
def test_worked_example(
    tokenizer: Tokenizer,
    strategy: str,
    width: int,
    n: int,
    want: list[tuple[list[int], float]],
    num_expansions: int,
) -> None:
    core = toy_core(tokenizer)
    options = {"beam_width": width, "n": n, "max_tokens": 3, "length_penalty": 0.0}
    results = run(core, beams(core, [START], beam_strategy=strategy, **options))
    got = hypotheses(results)
    assert [ids for ids, _ in got] == [ids for ids, _ in want]
    assert [score for _, score in got] == pytest.approx([score for _, score in want], abs=1e-5)
    assert expansions(results) == num_expansions
    assert core.model.num_rows == num_expansions  # and none was computed in vain
    assert_all_free(core)


def test_a_star_favours_length_where_the_score_does(tokenizer: Tokenizer) -> None:
    """Σ ln p / 3² of A B E is -0.222498, Σ ln p / 2² of B E -0.255413."""
    core = toy_core(tokenizer)
    options = {"beam_width": 3, "n": 2, "max_tokens": 3, "length_penalty": 2.0}
    results = run(core, beams(core, [START], beam_strategy="astar", **options))
    found, _ = level_by_level(of_toy, [E], 3, 3, key=bound_of(2.0, 3))
    assert [tuple(ids) for ids, _ in hypotheses(results)] == [one.ids for one in found[:2]]
    assert hypotheses(results)[0] == ([A, B, E], pytest.approx(-0.222498, abs=1e-5))
    assert results.choices["r", 0].report["cumulative_logprob"] == pytest.approx(-2.002481)


@pytest.mark.parametrize(
    ("memory", "want", "num_expansions"),
    # B waits while A is expanded. Room for two is taken by what follows A.
    [(3, [B, E], 3), (2, [A, E], 2), (1, [A, E], 2)],
)
def test_the_shortest_are_forgotten_first(
    tokenizer: Tokenizer, memory: int, want: list[int], num_expansions: int
) -> None:
    core = toy_core(tokenizer)
    options = {"beam_width": 2, "n": 1, "max_tokens": 3, "beam_memory": memory}
    results = run(core, beams(core, [START], beam_strategy="best_first", **options))
    assert results.ids() == want
    assert expansions(results) == num_expansions


# -- the same as level by level


def bound_of(penalty: float, max_tokens: int) -> Callable[[Found], float]:
    """The most that a hypothesis can still score."""

    def bound(one: Found) -> float:
        grows = not one.ended and penalty > 0.0
        return float(one.total / (max_tokens if grows else max(len(one.ids), 1)) ** penalty)

    return bound


@pytest.mark.parametrize(
    ("strategy", "penalty"),
    [("best_first", 0.0), ("best_first", 1.0), ("astar", 0.0), ("astar", 1.0), ("astar", -0.5)],
)
@pytest.mark.parametrize(("width", "n"), [(1, 1), (2, 2), (3, 1), (4, 4), (8, 5)])
def test_finds_what_a_search_level_by_level_finds(
    small: Tiny, strategy: str, penalty: float, width: int, n: int
) -> None:
    max_tokens = 7
    prompts = prompts_of(4, seed=width)
    results = small.search(
        prompts,
        beam_strategy=strategy,
        beam_width=width,
        n=n,
        max_tokens=max_tokens,
        length_penalty=penalty,
    )
    astar = strategy == "astar"
    key = bound_of(penalty, max_tokens) if astar else bound_of(0.0, max_tokens)
    for index, prompt in enumerate(prompts):
        naive = level_by_level(small.following(prompt), ENDS, width, max_tokens, key)
        found, num_expansions = naive
        choices = [results.choices[str(index), place] for place in range(n)]
        assert [results.ids(str(index), i) for i in range(n)] == [list(f.ids) for f in found[:n]]
        totals = [choice.report["cumulative_logprob"] for choice in choices]
        assert totals == pytest.approx([one.total for one in found[:n]], abs=2e-4)
        scores = [choice.report["sequence_score"] for choice in choices]
        lengths = [len(one.ids) for one in found[:n]]
        assert scores == pytest.approx(
            [total / length**penalty for total, length in zip(totals, lengths, strict=True)]
        )
        assert all(a >= b for a, b in pairwise(scores if astar else totals))
        assert expansions(results, str(index)) <= num_expansions


def test_saves_expansions(small: Tiny) -> None:
    """So that the bound of the test above is not met by equality alone."""
    prompts = prompts_of(12, seed=3)
    options = {"beam_width": 4, "max_tokens": 7, "length_penalty": 0.0}
    results = small.search(prompts, beam_strategy="best_first", **options)
    naive = [level_by_level(small.following(prompt), ENDS, 4, 7)[1] for prompt in prompts]
    ours = [expansions(results, str(index)) for index in range(len(prompts))]
    assert sum(a < b for a, b in zip(ours, naive, strict=True)) >= 8
    assert sum(ours) < 0.8 * sum(naive)


CONSTRAINTS: list[dict[str, Any]] = [
    {},
    {"stop": ["e", "th", "3"], "logprobs": 2},
    {"min_tokens": 4, "no_repeat_ngram_size": 1, "repetition_penalty": 1.3},
    {"allowed_token_ids": list(range(3, 40)), "logit_bias": {"7": 3.0, "20": -2.0}},
    {"stop_token_ids": list(range(40, 60)), "bad_words": ["a", "on"], "presence_penalty": 0.4},
]


@pytest.mark.parametrize("options", CONSTRAINTS, ids=lambda options: "-".join(options) or "none")
def test_beam_search_is_one_setting_of_it(
    small: Tiny, searched_with: Callable[[Parts], None], options: dict[str, Any]
) -> None:
    """With the same parts but the order, the results are the same; so are all the constraints'."""
    prompts = prompts_of(6, seed=9)
    counts: dict[str, list[int]] = {}
    answers: dict[str, list[list[tuple[list[int], str, Any]]]] = {}
    for name, parts in {"breadth": BREADTH, "best": BEST_FIRST, "astar": A_STAR}.items():
        searched_with(parts)
        results = small.search(
            prompts, beam_width=4, n=4, max_tokens=7, length_penalty=0.0, **options
        )
        counts[name] = [expansions(results, str(i)) for i in range(len(prompts))]
        answers[name] = [
            [
                (results.ids(str(i), place), delta.text, delta.stop_reason)
                for place in range(4)
                for delta in [results.choices[str(i), place]]
            ]
            for i in range(len(prompts))
        ]
    assert answers["best"] == answers["breadth"] == answers["astar"]
    assert all(a <= b for a, b in zip(counts["best"], counts["breadth"], strict=True))
    if not options:
        naive = [level_by_level(small.following(prompt), ENDS, 4, 7) for prompt in prompts]
        assert counts["breadth"] == [num_expansions for _, num_expansions in naive]
        found = [[list(one.ids) for one in beam] for beam, _ in naive]
        assert [[ids for ids, _, _ in one] for one in answers["breadth"]] == found


def test_the_best_hypothesis_is_that_of_the_beams_served_by_default(small: Tiny) -> None:
    prompts = prompts_of(12, seed=5)
    options = {"beam_width": 4, "max_tokens": 7, "length_penalty": 0.0}
    wide = small.search(prompts, early_stopping="never", **options)
    first = small.search(prompts, beam_strategy="best_first", **options)
    for index in range(len(prompts)):
        assert first.ids(str(index)) == wide.ids(str(index))


def all_of_toy(max_tokens: int) -> Iterator[Found]:
    """All that the chain can say."""
    waiting = [Found((), 0.0)]
    while waiting:
        one = waiting.pop()
        for token, logprob in of_toy([one.ids])[0].items():
            ids = (*one.ids, token)
            ended = token == E or len(ids) == max_tokens
            longer = Found(ids, one.total + logprob, ended)
            if ended:
                yield longer
            else:
                waiting.append(longer)


@pytest.mark.parametrize(
    ("parts", "penalty"), [(BEST_FIRST, 0.0), (A_STAR, 1.0), (A_STAR, 0.5), (A_STAR, 2.0)]
)
def test_without_a_limit_the_best_of_all_are_found(
    tokenizer: Tokenizer,
    searched_with: Callable[[Parts], None],
    parts: Parts,
    penalty: float,
) -> None:
    by_score = parts is A_STAR
    searched_with(replace(parts, limited=False))
    core = toy_core(tokenizer)
    options = {"beam_width": 4, "n": 4, "max_tokens": 5, "length_penalty": penalty}
    results = run(core, beams(core, [START], **options))
    every = sorted((bound_of(penalty, 5)(one) for one in all_of_toy(5)), reverse=True)
    key = "sequence_score" if by_score else "cumulative_logprob"
    got = sorted((results.choices["r", i].report[key] for i in range(4)), reverse=True)
    assert got == pytest.approx(every[:4], abs=1e-5)


# -- memory


@pytest.mark.parametrize("memory", [1, 3, 6])
def test_no_more_wait_than_there_is_memory_for(small: Tiny, memory: int) -> None:
    core = small.core
    for prompt in prompts_of(3, seed=memory):
        options = {"beam_width": 4, "n": 1, "max_tokens": 9, "beam_memory": memory}
        core.submit(beams(core, prompt, ends=ENDS, beam_strategy="best_first", **options))
        results = Results()
        for _ in range(100):
            collect(results, core.step()[0])
            check(core)
            if not core.has_work:
                break
            (group,) = core.scheduler.running
            strategy = group.strategy
            assert isinstance(strategy, Search)
            assert len(strategy.waiting) <= memory
            assert len(group.asleep) <= memory
        assert results.merge().finished
        assert_all_free(core)
        if memory == 1:  # nothing is left to come back to
            greedy = run(core, beams(core, prompt, ends=ENDS, max_tokens=9, beam_width=1))
            assert results.ids() == greedy.ids()


def test_without_a_number_there_is_memory_for_so_many_tokens(
    small: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"beam_strategy": "best_first", "beam_width": 4, "n": 3, "max_tokens": 7}
    prompts = prompts_of(6, seed=8)
    limited = small.search(prompts, **options, beam_memory=3)
    monkeypatch.setattr("engine.params.MAX_WAITING_TOKENS", 3 * 7)
    assert small.search(prompts, **options).choices == limited.choices


def test_a_step_touches_only_what_it_changes(small: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sleep, and however many hypotheses wait."""
    numbers: list[tuple[int, int]] = []
    commit = small.core.scheduler.commit

    def counting(group: Group, branches: list[Branch]) -> None:
        numbers.append((len(branches), len(group.asleep)))
        commit(group, branches)

    monkeypatch.setattr(small.core.scheduler, "commit", counting)
    options = {"beam_strategy": "best_first", "beam_width": 48, "n": 48, "max_tokens": 12}
    small.search(prompts_of(1, seed=4), **options, ignore_eos=True)
    touched, sleeping = zip(*numbers, strict=True)
    assert max(sleeping) > 20
    # What it takes up, whose parent and itself may sleep; each sleeper is dropped once.
    assert sum(touched) <= 4 * len(numbers)


def test_enough_memory_changes_nothing(small: Tiny) -> None:
    prompts = prompts_of(6, seed=8)
    options = {"beam_strategy": "best_first", "beam_width": 4, "n": 3, "max_tokens": 7}
    unlimited = small.search(prompts, **options)
    limited = small.search(prompts, **options, beam_memory=4 * 7)
    assert limited.choices == unlimited.choices


def test_sleepers_keep_no_blocks_from_other_requests(tokenizer: Tokenizer) -> None:
    """Neither from one that runs, which had to give way to them, nor from one that waits."""
    core = scripted_core(ScriptedModel(attentive=True), tokenizer, num_blocks=24)
    options = {"beam_strategy": "best_first", "beam_width": 8, "n": 8, "max_tokens": 24}
    core.submit(beams(core, [30, 31, 32], "search", **options, ignore_eos=True))
    results = Results()

    def step() -> None:
        collect(results, core.step()[0])
        check(core)

    while core.scheduler.pool.num_free > 2:
        step()
    assert len(core.scheduler.running[0].asleep) > 4
    short = request(core, [3] * 9, "short", max_tokens=24, logit_bias={str(EOS): -100})
    core.submit(short)
    num_steps = 0
    while "short" not in results.finished:
        step()
        num_steps += 1
    assert num_steps == 24
    assert results.finished["short"].num_preemptions == 0


def test_sleepers_that_lose_their_blocks_are_computed_again(tokenizer: Tokenizer) -> None:
    """What is reserved is enough for one sequence; sleepers keep blocks while nobody needs them."""
    prompt = [30, 31, 32]
    options = {"beam_strategy": "best_first", "beam_width": 6, "n": 6, "max_tokens": 12}
    answers = []
    for num_blocks in (64, 5):
        model = ScriptedModel(attentive=True)
        core = scripted_core(model, tokenizer, num_blocks=num_blocks, prefix_cache=False)
        core.submit(beams(core, prompt, ends=ENDS, **options))
        results, num_lost = Results(), 0
        for _ in range(500):
            collect(results, core.step()[0])
            check(core)
            if not core.has_work:
                break
            (group,) = core.scheduler.running
            num_lost += sum(one.num_computed == 0 for one in group.asleep)
        assert (num_lost > 0) == (num_blocks == 5)
        assert_all_free(core)
        answers.append(results.merge().choices)
    assert len(answers[0]) == 6
    assert answers[0] == answers[1]
