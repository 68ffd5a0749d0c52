"""Rows with common filters, on whichever way they go."""

from engine.config import LogprobsMode
from engine.numerics import NEG_INF
from tests.support.logits import Spec, random_rows, rows_of, sampler_for


def test_who_wants_to_see_what_filters_leave_has_them_run() -> None:
    specs = [Spec({"temperature": 0.8, "top_k": 2}, logprobs=3, seed=seed) for seed in range(4)]
    sampler, lane_ids = sampler_for(specs, 300, LogprobsMode.PROCESSED_LOGITS)
    got = sampler(random_rows(4, 300), rows_of(specs, lane_ids))
    for own, top in got.logprobs.values():
        assert own > NEG_INF
        assert [value for _, value in top][2] == NEG_INF


def test_a_fork_is_chosen_for_like_its_parent() -> None:
    specs = [Spec({"temperature": 0.8, "top_k": 5}, seed=3), Spec({"temperature": 0.0})]
    logits = random_rows(1, 300).expand(2, -1).contiguous()
    sampler, lane_ids = sampler_for(specs, 300)
    before = sampler(logits, rows_of(specs, lane_ids)).token_ids
    sampler.lanes.fork(lane_ids[:1], lane_ids[1:])
    sampler.fork(lane_ids[:1], lane_ids[1:])
    assert sampler(logits, rows_of(specs, lane_ids)).token_ids == [before[0]] * 2
