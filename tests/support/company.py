"""Requests beside others: each answers as it does alone, and leaves nothing behind."""

from collections.abc import Sequence as Seq
from dataclasses import asdict
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import GenerationFailed
from engine.messages import Request
from tests.support.engines import Results, assert_all_free, collect, run
from tests.support.invariants import check

_MOST_STEPS = 2000


def cramped(core: EngineCore, num_blocks: int, **config: Any) -> EngineCore:
    """An engine around the same model, and the same amateur, with little memory."""
    settings = {"block_size": core.scheduler.pool.block_size, "max_num_seqs": 16} | config
    return EngineCore(
        core.model,
        core.tokenizer,
        EngineConfig.model_validate(settings),
        num_blocks=num_blocks,
        context_len=core.lanes.tokens.shape[1],
        device="cpu",
        amateur=core.models[1] if len(core.models) > 1 else None,
    )


def run_checked(core: EngineCore, *requests: Request) -> Results:
    """Run requests together, and look at what the engine holds after every step."""
    for one in requests:
        core.submit(one)
    results = Results()
    for _ in range(_MOST_STEPS):
        if not core.has_work:
            break
        collect(results, core.step()[0])
        check(core)
    assert_all_free(core)
    return results.merge()


def assert_the_same_in_company(core: EngineCore, crowded: EngineCore, *requests: Request) -> None:
    """All requests together in `crowded` answer as each of them does alone in `core`."""
    together = run_checked(crowded, *requests)
    assert not together.failed
    for one in requests:
        for key, delta in run(core, one).choices.items():
            _assert_same(asdict(together.choices[key]), asdict(delta))


def assert_an_abort_leaves_nothing(core: EngineCore, request: Request, other: Request) -> None:
    """Aborted after any number of steps, a request gives all back, and the other one goes on."""
    want = run(core, other).choices
    for num_steps in range(1, _num_steps(core, request)):
        held, results = _start(core, request, other, num_steps)
        core.abort(request.request_id)
        check(core)
        assert core.scheduler.pool.num_free > held
        _finish(core, results)
        assert request.request_id not in results.finished | results.failed
        _assert_other(results, want, other)


def assert_an_error_leaves_nothing(core: EngineCore, request: Request, other: Request) -> None:
    """Its strategy failing after any number of steps, a request ends, and the other one goes on."""
    want = run(core, other).choices
    for num_steps in range(1, _num_steps(core, request)):
        _, results = _start(core, request, other, num_steps)
        (group,) = (one for one in core.scheduler.running if one.request is request)
        group.strategy.advance = _fail
        _finish(core, results)
        assert isinstance(results.failed[request.request_id].error, GenerationFailed)
        assert request.request_id not in results.finished
        _assert_other(results, want, other)


def _start(
    core: EngineCore, request: Request, other: Request, num_steps: int
) -> tuple[int, Results]:
    """Steps of both requests, and how many blocks are free then."""
    results = Results()
    core.submit(request)
    core.submit(other)
    for _ in range(num_steps):
        collect(results, core.step()[0])
        check(core)
    assert request.request_id not in results.finished
    return core.scheduler.pool.num_free, results


def _finish(core: EngineCore, results: Results) -> None:
    for _ in range(_MOST_STEPS):
        if not core.has_work:
            break
        collect(results, core.step()[0])
        check(core)
    assert_all_free(core)
    results.merge()


def _num_steps(core: EngineCore, request: Request) -> int:
    core.submit(request)
    for number in range(1, _MOST_STEPS):
        core.step()
        if not core.has_work:
            return number
    raise AssertionError("the engine did not finish")


def _assert_other(results: Results, want: dict[tuple[str, int], Any], other: Request) -> None:
    assert other.request_id in results.finished
    for key, delta in want.items():
        _assert_same(asdict(results.choices[key]), asdict(delta))


def _assert_same(got: Any, want: Any) -> None:
    """The same but for rounding."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for name in want:
            _assert_same(got[name], want[name])
    elif isinstance(want, Seq) and not isinstance(want, str):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            _assert_same(one, other)
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-4)
    else:
        assert got == want


def _fail(*_: Any) -> Any:
    raise ZeroDivisionError
