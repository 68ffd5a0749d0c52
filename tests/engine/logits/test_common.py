"""Rows with common filters, on whichever way they go."""

from engine.config import LogprobsMode
from engine.logits import ORDERS, STAGES
from engine.logits.pipeline import Pipeline
from engine.numerics import NEG_INF
from engine.sampler import Sampler
from tests.support.logits import Spec, lanes_for, place, random_rows, rows_of


def test_who_wants_to_see_what_filters_leave_has_them_run() -> None:
    specs = [Spec({"temperature": 0.8, "top_k": 2}, logprobs=3, seed=seed) for seed in range(4)]
    lanes, lane_ids = lanes_for(specs, 300)
    sampler = Sampler(lanes, Pipeline(STAGES, lanes), LogprobsMode.PROCESSED_LOGITS)
    for lane, spec in zip(lane_ids, specs, strict=True):
        place(lanes, lane, spec, sampler)
    got = sampler(random_rows(4, 300), rows_of(specs, lane_ids))
    for own, top in got.logprobs.values():
        assert own > NEG_INF
        assert [value for _, value in top][2] == NEG_INF


def test_a_fork_is_chosen_for_like_its_parent() -> None:
    specs = [Spec({"temperature": 0.8, "top_k": 5}, seed=3), Spec({"temperature": 0.0})]
    logits = random_rows(1, 300).expand(2, -1).contiguous()
    lanes, lane_ids = lanes_for(specs, 300)
    sampler = Sampler(lanes, Pipeline(STAGES, lanes, ORDERS), LogprobsMode.RAW_LOGPROBS)
    for lane, spec in zip(lane_ids, specs, strict=True):
        place(lanes, lane, spec, sampler)
    before = sampler(logits, rows_of(specs, lane_ids)).token_ids
    lanes.fork(lane_ids[:1], lane_ids[1:])
    sampler.fork(lane_ids[:1], lane_ids[1:])
    assert sampler(logits, rows_of(specs, lane_ids)).token_ids == [before[0]] * 2
