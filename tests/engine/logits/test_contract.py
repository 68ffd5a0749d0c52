"""What every stage owes the others; a stage is covered as soon as it is listed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.logits import STAGES
from engine.logits.pipeline import Pipeline
from engine.logits.stage import Stage
from engine.messages import Request
from engine.numerics import NEG_INF
from tests.support.logits import (
    EXAMPLES,
    Spec,
    apply,
    bits,
    examples,
    hard_rows,
    histories,
    kept,
    lanes_for,
    new_lanes,
    place,
    process,
    random_rows,
    rows_of,
    run_pipeline,
    run_stage,
    several_threads,
)

VOCAB = 700  # several blocks of 256, the last one not full
ROWS = 60
FIELDS = tuple(name for stage in STAGES for name in stage.fields)
EACH_STAGE = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
Run = Callable[[Sequence[Spec], Tensor], Tensor]


def runs() -> list[Any]:
    """Each stage by itself, and all of them as a pipeline, with the fields to vary."""
    return [
        *(
            pytest.param(stage.fields, lambda *a, s=stage: apply(s, *a), id=stage.__name__)
            for stage in STAGES
        ),
        pytest.param(FIELDS, lambda *a: process(STAGES, *a), id="all"),
    ]


EACH_RUN = pytest.mark.parametrize(("fields", "run"), runs())


def sequences(fields: Sequence[str]) -> list[Spec]:
    """Sequences with example values of these fields, every fourth without any."""
    return [
        Spec({} if row % 4 == 3 else params, *history)
        for row, (params, history) in enumerate(
            zip(examples(fields, ROWS), histories(ROWS), strict=True)
        )
    ]


def some_logits() -> Tensor:
    hard = hard_rows(VOCAB).repeat(3, 1)
    return torch.cat((hard, random_rows(ROWS - len(hard), VOCAB)))


def test_there_are_example_values_of_every_field_and_no_field_is_claimed_twice() -> None:
    assert sorted(FIELDS) == sorted(EXAMPLES)


@EACH_RUN
def test_a_row_in_a_mixed_batch_is_the_row_alone(fields: Sequence[str], run: Run) -> None:
    specs, logits = sequences(fields), some_logits()
    together = run(specs, logits)
    for row, spec in enumerate(specs):
        alone = run([spec], logits[row, None])[0]
        assert torch.equal(bits(alone), bits(together[row])), (row, spec)


@EACH_RUN
def test_so_it_is_where_several_threads_share_a_row(fields: Sequence[str], run: Run) -> None:
    specs, logits = sequences(fields)[:20], random_rows(20, 40_003)
    with several_threads():
        together = run(specs, logits)
        for row in range(0, 20, 3):
            alone = run([specs[row]], logits[row, None])[0]
            assert torch.equal(bits(alone), bits(together[row])), (row, specs[row])


@EACH_RUN
def test_permuting_the_rows_permutes_the_result(fields: Sequence[str], run: Run) -> None:
    specs, logits = sequences(fields), some_logits()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    permuted = run([specs[row] for row in order.tolist()], logits[order])
    assert torch.equal(bits(permuted), bits(run(specs, logits)[order]))


@EACH_RUN
def test_neutral_rows_come_out_bit_for_bit_as_they_went_in(fields: Sequence[str], run: Run) -> None:
    specs, logits = sequences(fields), some_logits()
    got = run(specs, logits)
    neutral = [not spec.params for spec in specs]
    assert torch.equal(bits(got[neutral]), bits(logits[neutral]))
    changed = (bits(got) != bits(logits)).any(1)
    assert changed.sum() > 5  # or the other tests of this file would show nothing
    assert not changed[neutral].any()


@EACH_STAGE
def test_a_stage_that_does_not_want_a_row_does_not_change_it(stage: type[Stage]) -> None:
    specs, logits = sequences(stage.fields), some_logits()
    got = apply(stage, specs, logits)
    one = stage(new_lanes(1, 1))
    unwanted = [not one.admit(0, spec.request) for spec in specs]
    assert torch.equal(bits(got[unwanted]), bits(logits[unwanted]))


@EACH_STAGE
def test_at_least_one_token_is_left_and_no_dropped_one_comes_back(stage: type[Stage]) -> None:
    specs = [spec for spec in sequences(stage.fields) if spec.params]
    hard = hard_rows(VOCAB)
    logits = torch.cat((hard.repeat_interleave(len(specs), 0), random_rows(len(specs), VOCAB)))
    got = process([stage], specs * (len(hard) + 1), logits)
    assert not got.isnan().any()
    assert (got > NEG_INF).any(1).all()
    assert not ((got > NEG_INF) & (logits == NEG_INF)).any()


@EACH_RUN
def test_a_row_without_a_token_stays_without(fields: Sequence[str], run: Run) -> None:
    specs = sequences(fields)
    got = run(specs, torch.full((len(specs), VOCAB), NEG_INF))
    assert all(not kept(row) for row in got)


@EACH_STAGE
def test_a_lane_forgets_its_former_owner(stage: type[Stage]) -> None:
    specs, logits = sequences(stage.fields), some_logits()
    lanes, lane_ids = lanes_for(specs, VOCAB)
    one = stage(lanes)
    owners = [*reversed(specs), *specs]
    for lane, spec in zip(lane_ids * 2, owners, strict=True):
        place(lanes, lane, spec, one)
    got = run_stage(one, logits, rows_of(specs, lane_ids))
    assert torch.equal(bits(got), bits(apply(stage, specs, logits)))


@EACH_STAGE
def test_a_fork_copies_a_lane_and_then_goes_its_own_way(stage: type[Stage]) -> None:
    specs, logits = sequences(stage.fields)[:12], random_rows(12, VOCAB)
    want = apply(stage, specs, logits)
    lanes = new_lanes(2 * len(specs), 100)
    pipeline = Pipeline([stage], lanes)
    children = list(range(len(specs), 2 * len(specs)))
    for child, spec in zip(children, reversed(specs), strict=True):
        place(lanes, child, spec, pipeline)  # an earlier owner
    for parent, spec in enumerate(specs):
        place(lanes, parent, spec, pipeline)
        lanes.fork([parent], [children[parent]])
        pipeline.fork([parent], [children[parent]])

    def got(lane_ids: list[int]) -> Tensor:
        return run_pipeline(pipeline, specs, logits, lane_ids)

    assert torch.equal(bits(got(children)), bits(want))
    assert torch.equal(bits(got(list(range(len(specs))))), bits(want))
    for parent in range(len(specs)):
        place(lanes, parent, Spec(), pipeline)
    assert torch.equal(bits(got(children)), bits(want))


@EACH_STAGE
def test_a_stage_reads_no_other_fields_than_its_own(stage: type[Stage]) -> None:
    class Watched:
        def __init__(self, request: Request) -> None:
            self.params = request.params
            self.read: set[str] = set()

        def __getattr__(self, name: str) -> Any:
            self.read.add({"greedy": "temperature"}.get(name, name))
            return getattr(self.params, name)

    one = stage(new_lanes(1, 1))
    for spec in sequences(stage.fields):
        watched = Watched(spec.request)
        request = replace(spec.request, params=watched)  # type: ignore[arg-type]
        watched.read.clear()  # what the request itself has looked at
        one.admit(0, request)
        assert watched.read <= set(stage.fields)


@EACH_STAGE
def test_example_values_are_wanted_and_defaults_are_not(stage: type[Stage]) -> None:
    one = stage(new_lanes(1, 1))
    assert not one.admit(0, Spec().request)
    wanted = [one.admit(0, spec.request) for spec in sequences(stage.fields) if spec.params]
    assert sum(wanted) > len(wanted) / 2
