"""What each step computes, who waits, who gives way, and what the prefix cache saves."""

import random
from collections.abc import Callable
from typing import Any

import pytest

import engine.core
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Token, TraceWish
from engine.scheduler import shares
from engine.strategies.base import Branch, Plain, Strategy, View
from engine.tokenizer import Tokenizer
from engine.types import Group, Plan, Sequence
from tests.support.engines import (
    EOS,
    Results,
    assert_all_free,
    collect,
    drain,
    record_plans,
    request,
    run,
    scripted_core,
)
from tests.support.forking import Forking
from tests.support.invariants import check
from tests.support.scripted import ScriptedModel, constant

MODEL = ScriptedModel(attentive=True)
NEVER_EOS = {"logit_bias": {str(EOS): -100}}


def core_of(tokenizer: Tokenizer, **config: Any) -> EngineCore:
    return scripted_core(MODEL, tokenizer, **config)


def prompt(length: int, first: int = 3) -> list[int]:
    """Different tokens for different beginnings, all of them ordinary ones."""
    return [3 + (first + 7 * index) % 90 for index in range(length)]


def submit(
    core: EngineCore, length: int, request_id: str = "r", first: int = 3, **options: Any
) -> Group:
    """Queue a request that does not end by itself; returns its group."""
    core.submit(request(core, prompt(length, first), request_id, **NEVER_EOS, **options))
    groups = [*core.scheduler.waiting, *core.scheduler.running]
    return next(group for group in groups if group.request.request_id == request_id)


def step(core: EngineCore, count: int = 1) -> Results:
    """Some steps, each checked."""
    results = Results()
    for _ in range(count):
        collect(results, core.step()[0])
        check(core)
    return results


def lengths(plan: Plan) -> list[tuple[str, int]]:
    """Which requests a plan computes how many tokens of."""
    return [(chunk.group.request.request_id, chunk.length) for chunk in plan.chunks]


# -- the budget


def test_a_long_prompt_is_computed_in_parts_of_the_budget(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, max_num_seqs=8, max_batch_tokens=8)
    plans = record_plans(core)
    results = run(core, request(core, prompt(30), max_tokens=3))
    assert [lengths(plan) for plan in plans] == [[("r", n)] for n in (8, 8, 8, 6, 1, 1)]
    assert len(results.ids()) == 3


def test_sequences_that_need_one_token_go_before_prompts(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, max_num_seqs=8, max_batch_tokens=8)
    submit(core, 20, "long", first=50)
    step(core)
    for name in "ab":
        submit(core, 2, name, priority=1)
    step(core, 2)  # the long prompt ends with 4 tokens, so both begin
    submit(core, 20, "late", first=20, priority=-1)
    plans = record_plans(core)

    step(core, 2)
    assert lengths(plans[0]) == [("long", 1), ("a", 1), ("b", 1), ("late", 5)]
    assert lengths(plans[1]) == [("long", 1), ("a", 1), ("b", 1), ("late", 5)]


def test_what_is_left_of_the_budget_goes_to_those_waiting_in_order(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, max_num_seqs=8, max_batch_tokens=10)
    for index, name in enumerate("abc"):
        submit(core, 6, name, first=30 * index)
    plans = record_plans(core)
    step(core, 2)
    # Each moves on, the first as far as it needs.
    assert lengths(plans[0]) == [("a", 6), ("b", 3), ("c", 1)]
    assert lengths(plans[1]) == [("a", 1), ("b", 3), ("c", 5)]


# -- the queue


@pytest.mark.parametrize(
    ("streams", "ratio", "parts"),
    [(0, 3, [60]), (1, 3, [16, 16, 16, 12]), (7, 3, [21, 21, 18]), (7, 2, [16, 16, 16, 12])],
)
def test_prompts_take_only_so_much_of_a_step_beside_running_streams(
    streams: int, ratio: int, parts: list[int], tokenizer: Tokenizer
) -> None:
    core = core_of(tokenizer, num_blocks=128, prefill_ratio=ratio)
    for number in range(streams):
        submit(core, 4, str(number), first=number, max_tokens=40)
    step(core, 2 if streams else 0)
    plans = record_plans(core)
    submit(core, 60, "long", first=50)
    step(core, len(parts))
    assert [dict(lengths(plan))["long"] for plan in plans] == parts
    assert all(len(plan.chunks) == streams + 1 for plan in plans)


def test_prompt_tokens_deep_in_their_context_are_fewer_beside_running_streams(
    tokenizer: Tokenizer,
) -> None:
    """Attention makes them dearer: at three times the depth at which they cost double, half."""
    core = core_of(tokenizer, num_blocks=128)
    core.scheduler.deep = 32
    submit(core, 4, "stream", max_tokens=60)
    step(core, 2)
    plans = record_plans(core)
    submit(core, 140, "long", first=50)
    step(core, 12)
    parts = [dict(lengths(plan))["long"] for plan in plans]
    assert parts == [16, 16, 16, 12, 11, 9, 9, 8, 7, 7, 7, 6]


def test_only_on_cpu_there_is_such_a_limit_by_default() -> None:
    config = EngineConfig()
    assert config.prompt_tokens_beside("cpu") == 2
    assert config.prompt_tokens_beside("cuda") is None
    assert EngineConfig(prefill_ratio=7).prompt_tokens_beside("cuda") == 7


def order(core: EngineCore) -> list[str]:
    """The requests in the order in which they finish."""
    return list(drain(core).finished)


def test_first_come_is_first_served(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, max_num_seqs=1)
    for name in ("a", "b", "c"):
        submit(core, 5, name)
    assert order(core) == ["a", "b", "c"]


def test_a_lower_priority_number_is_served_sooner(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, max_num_seqs=1)
    for name, priority in (("a", 1), ("b", 0), ("c", -5), ("d", 0)):
        submit(core, 5, name, priority=priority)
    assert order(core) == ["c", "b", "d", "a"]


def test_a_wide_group_waits_for_lanes_and_nobody_overtakes_it(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, max_num_seqs=3)
    submit(core, 4, "narrow", max_tokens=3)
    submit(core, 4, "wide", n=3, max_tokens=3)
    submit(core, 4, "behind", max_tokens=3)

    step(core, 2)
    assert [group.request.request_id for group in core.scheduler.running] == ["narrow"]
    assert order(core) == ["narrow", "wide", "behind"]


def test_a_request_waits_until_its_prompt_fits(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, num_blocks=8)
    submit(core, 20, "first", max_tokens=8)
    submit(core, 13, "second", first=40, max_tokens=8)
    step(core, 3)  # the first one has 6 blocks by now, and the second would need 4
    assert [group.request.request_id for group in core.scheduler.waiting] == ["second"]
    results = drain(core)
    assert list(results.finished) == ["first", "second"]
    assert results.finished["second"].num_preemptions == 0


def test_an_aborted_request_holds_nothing_wherever_it_was(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, max_num_seqs=1, max_batch_tokens=4)
    submit(core, 10, "prefilling")
    submit(core, 3, "waiting")
    step(core)
    core.abort("prefilling")
    core.abort("waiting")
    core.abort("unknown")
    assert not core.has_work
    assert_all_free(core)

    submit(core, 3, "decoding", n=1)
    step(core, 3)
    core.abort("decoding")
    assert_all_free(core)


# -- prompts beside one another


@pytest.mark.parametrize(
    ("needs", "budget", "want"),
    [
        ([], 16, []),
        ([100], 16, [16]),
        ([5], 16, [5]),
        # The oldest gets half, the others a token each, the shortest what is left.
        ([2000, 12], 16, [8, 8]),
        ([2000, 4], 16, [12, 4]),
        ([2000, 30, 12], 16, [8, 1, 7]),
        ([12, 2000], 16, [12, 4]),
        ([100, 100, 100], 64, [62, 1, 1]),
        # Where there are too many for that, the shortest go on, and the oldest.
        ([2000, *[30] * 20], 16, [8, 8, *[0] * 19]),
        ([3, 3, 3], 512, [3, 3, 3]),
        ([50, 20], 1, [1, 0]),
    ],
)
def test_a_steps_prompt_tokens_are_shared_so_that_nobody_waits_for_long(
    needs: list[int], budget: int, want: list[int]
) -> None:
    assert shares(needs, budget) == want


def test_a_short_prompt_does_not_wait_for_a_long_one(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, num_blocks=200, max_num_seqs=8)
    submit(core, 4, "stream", max_tokens=60)
    step(core)
    submit(core, 160, "long", first=50)
    step(core)
    short = submit(core, 12, "short", first=20)
    results = step(core, 2)
    assert short.first_token_s  # 8 tokens of 16, and then the other 4
    assert not any(delta.request_id == "long" for delta in results.deltas)
    plans = record_plans(core)
    results = drain(core)
    assert list(results.finished) == ["short", "long", "stream"]
    # The long one has never stopped.
    assert all("long" in dict(lengths(plan)) for plan in plans[:5])


def test_a_long_prompt_is_computed_however_many_short_ones_come(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, num_blocks=200, max_num_seqs=8, max_batch_tokens=16)
    submit(core, 160, "long", first=50, max_tokens=1)
    results = Results()
    for number in range(40):
        submit(core, 12, f"short {number}", first=number, max_tokens=1)
        collect(results, core.step()[0])
        check(core)
    assert "long" in results.finished
    assert len(results.finished) > 10


def test_prompts_of_better_priority_go_first(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, num_blocks=200, max_num_seqs=8, max_batch_tokens=8)
    submit(core, 40, "later", first=10, priority=5)
    step(core)
    submit(core, 40, "urgent", first=50, priority=-5)
    plans = record_plans(core)
    step(core, 5)
    assert [lengths(plan) for plan in plans] == [[("urgent", 8)]] * 5


def test_whoever_is_planned_already_gives_way_to_what_is_more_urgent(tokenizer: Tokenizer) -> None:
    """A long prompt of better priority does not preempt itself for streams of worse."""
    core = core_of(tokenizer, num_blocks=20, max_num_seqs=8)
    for name, first in (("a", 3), ("b", 40)):
        submit(core, 8, name, first=first, max_tokens=24, priority=5)
    step(core, 8)
    urgent = submit(core, 44, "urgent", first=70, max_tokens=20, priority=-10)
    results = Results()
    order: list[str] = []
    for _ in range(200):
        if not core.has_work:
            break
        collect(results, core.step()[0])
        check(core)
        order += [name for name in results.finished if name not in order]
    assert urgent.num_preemptions == 0
    assert order[0] == "urgent"
    assert set(order) == {"a", "b", "urgent"}
    assert any(results.finished[name].num_preemptions for name in "ab")
    for name, first in (("a", 3), ("b", 40)):
        alone = core_of(tokenizer)
        submit(alone, 8, name, first=first, max_tokens=24)
        assert results.merge().ids(name) == drain(alone).ids(name)


def test_a_prompt_is_admitted_only_beside_what_the_others_will_need(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, num_blocks=20, max_num_seqs=8, max_batch_tokens=8)
    submit(core, 40, "first", first=3, max_tokens=4)
    submit(core, 40, "second", first=50, max_tokens=4)
    submit(core, 40, "third", first=20, max_tokens=4)
    step(core)
    # Ten blocks each, of which the first has taken two by now.
    assert len(core.scheduler.running) == 2
    results = drain(core)
    assert results.finished["first"].num_preemptions == 0
    assert len(results.finished) == 3


def test_choices_come_back_from_a_preemption_sharing_their_prompt(tokenizer: Tokenizer) -> None:
    """So they need no more memory than what they were admitted with, whatever the cache has."""
    for prefix_cache in (False, True):
        core = core_of(tokenizer, num_blocks=6 + 3 * 3, prefix_cache=prefix_cache)
        group = submit(core, 26, n=3, temperature=1.0, seed=5, max_tokens=8)
        step(core, 4)
        before = [sequence.output.copy() for sequence in group.live]
        core.scheduler._preempt(group)
        # What the cache had is gone.
        pool = core.scheduler.pool
        pool.release(pool.take(pool.num_free))
        plans = record_plans(core)
        results = step(core, 3)
        assert plans[0].num_tokens >= 26
        assert not results.failed
        tables = [sequence.block_table for sequence in group.live]
        assert len({tuple(table[:6]) for table in tables}) == 1
        assert [
            one.output[: len(old)] for one, old in zip(group.live, before, strict=True)
        ] == before
        results = drain(core)
        other = core_of(tokenizer)
        submit(other, 26, n=3, temperature=1.0, seed=5, max_tokens=8)
        want = drain(other)
        # (What left before the preemption is not among what was collected since.)
        for index in range(3):
            assert results.choices["r", index].text == want.choices["r", index].text
        assert_all_free(core)


def test_scoring_and_explaining_are_spread_over_steps(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, num_blocks=200, max_num_seqs=8, max_batch_tokens=32)
    scored = request(core, prompt(64), "scored", prompt_logprobs=1, max_tokens=1)
    plans = record_plans(core)
    results = run(core, scored)
    assert [plan.num_tokens for plan in plans] == [16] * 4
    assert len(results.choices["scored", 0].prompt) == 64

    ids = prompt(40)
    options: dict[str, Any] = {"trace": TraceWish(3), "forced_len": 39, "max_tokens": 0}
    explained = request(core, ids, "e", explained=tuple(range(1, 41)), **options)
    plans = record_plans(core)
    results = run(core, explained)
    assert [position for position, _ in results.choices["e", 0].explained] == list(range(1, 41))
    # Each costs a token and four rows of logits.
    assert [plan.num_tokens for plan in plans] == [6] * 6 + [4]


# -- preemption


def test_the_last_in_the_queue_gives_way_and_gets_its_turn_again(tokenizer: Tokenizer) -> None:
    alone = {
        name: run(core_of(tokenizer), one).ids(name)
        for name, one in (
            (name, request(core_of(tokenizer), prompt(8, 30 * index), name, **NEVER_EOS))
            for index, name in enumerate("abc")
        )
    }
    core = core_of(tokenizer, num_blocks=10)
    for index, name in enumerate("abc"):
        submit(core, 8, name, first=30 * index)
    results = Results()
    waiting = []
    while core.has_work:
        collect(results, core.step()[0])
        check(core)
        waiting += [group.request.request_id for group in core.scheduler.waiting]
    results.merge()

    assert {name: results.ids(name) for name in "abc"} == alone
    assert set(waiting) == {"c"}
    assert results.finished["c"].num_preemptions > 0
    assert core.scheduler.num_preemptions == results.finished["c"].num_preemptions
    assert list(results.finished) == ["a", "b", "c"]


def test_priority_decides_who_gives_way(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, num_blocks=8)
    submit(core, 8, "patient", max_tokens=12, priority=1)
    submit(core, 8, "urgent", first=40, max_tokens=12, priority=0)
    results = drain(core)
    assert list(results.finished) == ["urgent", "patient"]
    assert results.finished["urgent"].num_preemptions == 0
    assert results.finished["patient"].num_preemptions > 0


def test_a_preempted_sequence_comes_back_mostly_from_the_cache(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer)
    group = submit(core, 12, max_tokens=10)
    step(core, 5)  # 16 tokens computed, one more sampled
    core.scheduler._preempt(group)
    check(core)
    assert (group.live[0].lane, core.stats().kv_usage) == (-1, 0.0)

    plans = record_plans(core)
    step(core)
    assert [(chunk.start, chunk.length) for chunk in plans[0].chunks] == [(16, 1)]


def test_the_sequences_of_a_group_reach_their_ends_in_the_same_step(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, max_num_seqs=3, max_batch_tokens=4, prefix_cache=False)
    group = submit(core, 6, n=3, temperature=1.0, seed=5, max_tokens=6)
    step(core, 4)
    core.scheduler._preempt(group)
    plans = record_plans(core)  # each checked: all ends or none

    before = [sequence.num_generated for sequence in group.live]
    for _ in range(20):
        step(core)
        generated = [sequence.num_generated for sequence in group.live]
        if generated != before:
            break
    assert generated == [count + 1 for count in before]
    # First the prompt once for all, then what is behind it of each.
    assert [len(plan.chunks) for plan in plans[:2]] == [1, 1]
    assert sum(plan.num_tokens for plan in plans[:2]) == 6
    assert len(plans) > 3
    assert len(plans[-1].chunks) == 3
    drain(core)
    assert_all_free(core)


# -- forks


@pytest.mark.parametrize(
    ("n", "prompt_len", "copies"), [(2, 6, 1), (4, 6, 3), (4, 8, 0), (3, 1, 2)]
)
def test_only_a_shared_block_with_room_is_copied_and_one_writer_keeps_it(
    tokenizer: Tokenizer, n: int, prompt_len: int, copies: int
) -> None:
    core = core_of(tokenizer)
    group = submit(core, prompt_len, n=n, temperature=1.0, seed=1)
    plans = record_plans(core)
    step(core, 3)

    assert [len(plan.copies) for plan in plans] == [0, copies, 0]
    full = prompt_len // 4
    tables = [sequence.block_table for sequence in group.live]
    assert len({tuple(table[:full]) for table in tables}) == 1
    assert len({table[full] for table in tables}) == n


@pytest.mark.parametrize("options", [{"n": 4}, {"n": 2, "best_of": 4}])
def test_choices_share_the_blocks_and_the_prefill_of_the_prompt(
    tokenizer: Tokenizer, options: dict[str, int]
) -> None:
    core = core_of(tokenizer)
    submit(core, 16, temperature=1.0, seed=1, **options)
    plans = record_plans(core)
    pool = core.scheduler.pool

    step(core)
    assert (plans[0].num_tokens, pool.num_blocks - pool.num_free) == (16, 4)
    step(core)
    assert (plans[1].num_tokens, pool.num_blocks - pool.num_free) == (4, 8)


class Scripted(Plain):
    """A strategy that does at each step what a list of functions says."""

    def __init__(self, width: int, *steps: Callable[[list[Sequence]], list[Branch]]) -> None:
        self.width = self.copies = width
        self.steps = list(steps)

    def advance(self, live: list[Sequence], _view: View) -> list[Branch]:
        return self.steps.pop(0)(live)

    def rank(self, finished: list[Sequence]) -> list[Sequence]:
        return finished


def branch(parent: Sequence, *token_ids: int) -> Branch:
    return Branch(parent, tuple(Token(token_id, "") for token_id in token_ids))


def tails(group: Group) -> list[list[int]]:
    return [sequence.token_ids[sequence.prompt_len :] for sequence in group.live]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Strategy], None]:
    """Give requests that are submitted from now on this strategy."""

    def choose(strategy: Strategy) -> None:
        monkeypatch.setattr(engine.core, "choose", lambda _params: strategy)

    return choose


def start(live: list[Sequence]) -> list[Branch]:
    return [branch(sequence, 10 + index) for index, sequence in enumerate(live)]


def test_a_fork_takes_the_lane_of_one_that_is_dropped(
    tokenizer: Tokenizer, use: Callable[[Strategy], None]
) -> None:
    core = core_of(tokenizer, max_num_seqs=2)
    use(Scripted(2, start, lambda live: [branch(live[0], 20), branch(live[0], 21)]))
    group = submit(core, 5)
    step(core, 2)
    assert tails(group) == [[10, 20], [10, 21]]
    assert core.lanes.free == []


def test_a_fork_takes_the_place_of_a_parent_that_ends(
    tokenizer: Tokenizer, use: Callable[[Strategy], None]
) -> None:
    core = core_of(tokenizer, max_num_seqs=2)
    use(
        Scripted(
            2,
            start,
            lambda live: [branch(live[0], 20), branch(live[1], 21), branch(live[0], EOS)],
            lambda live: [branch(live[1], EOS), branch(live[0], EOS), branch(live[0], 30)],
            lambda live: [branch(live[0], EOS)],
        )
    )
    group = submit(core, 5)
    step(core, 2)
    assert tails(group) == [[10, 20], [11, 21]]
    results = step(core)
    assert tails(group) == [[10, 20, 30]]
    assert results.deltas == []

    results = drain(core).merge()
    assert [results.ids(index=index) for index in range(4)] == [
        [10, EOS],
        [11, 21, EOS],
        [10, 20, EOS],
        [10, 20, 30, EOS],
    ]
    assert results.finished["r"].completion_tokens == 2 + 3 + 3 + 4
    assert results.finished["r"].longest_tokens == 4
    assert_all_free(core)


def test_live_sequences_keep_the_order_of_the_branches(
    tokenizer: Tokenizer, use: Callable[[Strategy], None]
) -> None:
    core = core_of(tokenizer)
    use(
        Scripted(
            4,
            start,
            lambda live: [
                branch(live[2], 20),
                branch(live[0], 21),
                branch(live[2], 22, 23),
                branch(live[1], 24),
            ],
        )
    )
    group = submit(core, 5)
    step(core, 2)
    assert tails(group) == [[12, 20], [10, 21], [12, 22, 23], [11, 24]]


def test_a_branch_of_several_tokens_is_computed_before_the_group_goes_on(
    tokenizer: Tokenizer, use: Callable[[Strategy], None]
) -> None:
    core = core_of(tokenizer, max_num_seqs=2, max_batch_tokens=3)
    use(
        Scripted(
            2,
            start,
            lambda live: [branch(live[0], 20, 21, 22, 23, 24, 25), branch(live[1], 26)],
            lambda live: [branch(sequence, EOS) for sequence in live],
        )
    )
    submit(core, 3)
    plans = record_plans(core)
    results = drain(core)
    assert results.ids() == [10, 20, 21, 22, 23, 24, 25, EOS]
    assert results.ids(index=1) == [11, 26, EOS]
    assert [plan.num_tokens for plan in plans] == [3, 2, 3, 2, 2]
    assert_all_free(core)


def dropping_all(_live: list[Sequence]) -> list[Branch]:
    return []


def beyond_its_width(live: list[Sequence]) -> list[Branch]:
    return [branch(live[0], 20 + index) for index in range(3)]


def of_a_stranger(live: list[Sequence]) -> list[Branch]:
    stranger = Sequence(0, 0, [1], 1, live[0].stream.fork())
    return [branch(live[0], 20), branch(stranger, 21)]


@pytest.mark.parametrize("bad", [dropping_all, beyond_its_width, of_a_stranger])
def test_branches_that_cannot_be_fail_their_request_and_leave_nothing_behind(
    tokenizer: Tokenizer,
    use: Callable[[Strategy], None],
    bad: Callable[[list[Sequence]], list[Branch]],
) -> None:
    core = core_of(tokenizer, max_num_seqs=4)
    submit(core, 6, "good")
    use(Scripted(2, start, bad))
    submit(core, 6, "bad", first=40)
    results = drain(core)
    assert set(results.failed) == {"bad"}
    assert len(results.ids("good")) == 8
    assert_all_free(core)


def test_forks_go_on_from_what_their_parent_has_in_the_cache(
    tokenizer: Tokenizer, use: Callable[[Strategy], None]
) -> None:
    core = core_of(tokenizer, max_num_seqs=4)
    use(Forking(4, 4, MODEL.vocab_size))
    submit(core, 5, temperature=1.0, seed=3, max_tokens=12)
    plans = record_plans(core)
    while core.has_work:
        step(core)
    assert sum(len(plan.copies) for plan in plans) > 5
    assert_all_free(core)


# -- the prefix cache


def test_a_second_prompt_takes_its_beginning_from_the_cache(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer)
    first = run(core, request(core, prompt(11), "first", max_tokens=1))
    plans = record_plans(core)
    second = run(core, request(core, [*prompt(9), 77, 78], "second", max_tokens=1))

    assert first.finished["first"].cached_tokens == 0
    assert second.finished["second"].cached_tokens == 8
    assert plans[0].num_tokens == 3
    stats = core.stats()
    assert (stats.cache_queries, stats.cache_hits) == (22, 8)


def test_generated_tokens_are_cached_too(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer)
    submit(core, 6, max_tokens=8)
    ids = drain(core).ids()
    results = run(core, request(core, [*prompt(6), *ids, 5], "next"))
    assert results.finished["next"].cached_tokens == 12  # the last token was never computed


@pytest.mark.parametrize(("length", "cached"), [(8, 4), (9, 8), (4, 0), (1, 0)])
def test_the_last_token_of_a_prompt_is_always_computed(
    tokenizer: Tokenizer, length: int, cached: int
) -> None:
    core = core_of(tokenizer)
    run(core, request(core, prompt(length), "first"))
    plans = record_plans(core)
    again = run(core, request(core, prompt(length), "again", max_tokens=1))
    assert again.finished["again"].cached_tokens == cached
    assert plans[0].num_tokens == length - cached


def test_only_requests_of_equal_salt_share(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer)
    cached = {
        name: run(core, request(core, prompt(9), name, cache_salt=salt)).finished[name]
        for name, salt in (("a", ""), ("b", "x"), ("c", "y"), ("d", "x"), ("e", ""))
    }
    assert [cached[name].cached_tokens for name in "abcde"] == [0, 0, 0, 8, 8]


def test_prompt_logprobs_are_computed_not_cached_but_fill_the_cache(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer)
    run(core, request(core, prompt(9), "first"))
    results = run(core, request(core, prompt(9), "scored", prompt_logprobs=0))
    assert results.finished["scored"].cached_tokens == 0
    assert len(results.choices["scored", 0].prompt) == 9

    other = core_of(tokenizer)
    run(other, request(other, prompt(9), "scored", prompt_logprobs=0))
    assert run(other, request(other, prompt(9))).finished["r"].cached_tokens == 8


def test_the_cache_can_be_off(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, prefix_cache=False)
    for name in "ab":
        assert run(core, request(core, prompt(9), name)).finished[name].cached_tokens == 0
    assert core.stats().cache_hits == 0
    assert core.scheduler.pool.by_hash == {}


def test_under_pressure_the_end_of_an_old_prompt_goes_before_its_beginning(
    tokenizer: Tokenizer,
) -> None:
    core = core_of(tokenizer, num_blocks=8)
    run(core, request(core, prompt(17), "old", max_tokens=1))  # 4 full blocks, and one started
    run(core, request(core, prompt(20, first=40), "new", max_tokens=1))  # 3 unused, 2 of the old
    again = run(core, request(core, prompt(17), "again", max_tokens=1))
    assert again.finished["again"].cached_tokens == 12


def test_a_request_beside_another_with_the_same_prompt_takes_what_is_there(
    tokenizer: Tokenizer,
) -> None:
    """Also what is there only once it has been admitted."""
    core = core_of(tokenizer, max_num_seqs=4, max_batch_tokens=8)
    submit(core, 16, "first")
    step(core)
    submit(core, 16, "second")
    plans = record_plans(core)
    step(core)
    # The first one's 8 are there; of the others each computes some.
    assert lengths(plans[0]) == [("first", 7), ("second", 1)]
    results = drain(core)
    assert results.finished["second"].cached_tokens == 8 + 3
    assert len(results.ids("second")) == 8


def test_prompts_that_begin_alike_are_not_computed_twice(tokenizer: Tokenizer) -> None:
    """Whoever comes later waits for what the first one computes, and goes on from there."""
    core = core_of(tokenizer, max_num_seqs=8, max_batch_tokens=32)
    shared = prompt(120)
    for name, last in zip("abc", (20, 21, 22), strict=True):
        core.submit(request(core, [*shared, last, last + 3], name, max_tokens=2))
    other = submit(core, 5, "other", first=60, max_tokens=2)
    plans = record_plans(core)
    results = drain(core)
    assert sum(plan.num_tokens for plan in plans) < 120 + 3 * 4 + 64 + 5 + 8
    assert results.finished["a"].cached_tokens == 0
    assert all(results.finished[name].cached_tokens >= 120 - 64 for name in "bc")
    assert other.first_token_s <= min(results.finished[name].first_token_s for name in "abc")
    for name, last in zip("abc", (20, 21, 22), strict=True):
        alone = core_of(tokenizer)
        want = run(alone, request(alone, [*shared, last, last + 3], name, max_tokens=2))
        assert results.ids(name) == want.ids(name)


def test_every_row_without_a_valid_token_frees_its_place(tokenizer: Tokenizer) -> None:
    nothing = scripted_core(ScriptedModel(constant([float("-inf")] * 128)), tokenizer)
    results = run(nothing, request(nothing, prompt(5), n=2))
    assert [results.choices["r", index].stop_reason for index in range(2)] == ["no_valid_token"] * 2
    assert_all_free(nothing)


@pytest.mark.parametrize("seed", range(6))
def test_storms_of_preemptions_of_many_priorities_keep_every_account(
    tokenizer: Tokenizer, seed: int
) -> None:
    """Also of those that give way in the step in which they would have been planned."""
    rng = random.Random(seed)
    core = core_of(tokenizer, num_blocks=20, max_num_seqs=8, max_batch_tokens=12)
    results, submitted = Results(), 0
    for _ in range(600):
        if submitted < 24 and rng.random() < 0.5:
            size, first = rng.choice([16, 24]), rng.randrange(90)
            options = {"max_tokens": rng.randint(1, 24), "n": rng.choice([1, 1, 2])}
            submit(core, size, str(submitted), first, priority=rng.randint(-2, 2), **options)
            submitted += 1
        if core.has_work:
            collect(results, core.step()[0])
            check(core)
    assert not core.has_work
    assert len(results.finished) == 24
    assert sum(one.num_preemptions for one in results.finished.values()) > 3
    assert_all_free(core)
