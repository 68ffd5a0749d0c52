"""Exceptions where none should be: they end the request they belong to, and nothing else."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engine.core import EngineCore
from engine.errors import GenerationFailed, InvalidRequest
from engine.lanes import PerLane
from engine.logits import STAGES
from engine.logits.stage import Filter, Stage
from engine.messages import Request, TraceWish
from engine.strategies.sampling import Sampling
from engine.text import TextStream
from engine.tokenizer import Tokenizer
from tests.support.company import _assert_other, run_checked
from tests.support.engines import (
    Results,
    assert_all_free,
    collect,
    request,
    run,
    scripted_core,
    tiny_core,
)
from tests.support.invariants import check
from tests.support.logits import examples
from tests.support.scripted import ScriptedModel

BAD = "bad"


class Broken(Exception):
    """What is injected."""


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> EngineCore:
    core, _ = tiny_core(tiny_folder, ("small", tiny_folder), max_num_seqs=24, prefix_cache=False)
    return core


def neighbours(core: EngineCore) -> list[Request]:
    """Requests of several kinds, some of which keep something between steps."""
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "sampled": {"temperature": 1.0, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.3},
        "mirostat": {"temperature": 1.0, "seed": 4, "mirostat": 2, "mirostat_tau": 2.0},
        "dry": {"temperature": 1.0, "seed": 5, "dry_multiplier": 0.8, "n": 2, "logprobs": 2},
        "beams": {"use_beam_search": True, "beam_width": 3},
    }
    return [
        request(core, [7, 9, 7, 9, 7, 20 + at], name, **({"max_tokens": 6} | options))
        for at, (name, options) in enumerate(kinds.items())
    ]


@torch.inference_mode()
def wanting(core: EngineCore, stage: type[Stage]) -> Request:
    """A request that a stage acts on, from its first token to its twelfth."""
    own = core.sampler.pipeline.stage(stage)
    known = {"amateur": "small", "amateur_context_len": 256}
    # With one filter more than the common ones, so that no other pass does a stage's work.
    for more, params in product(({"epsilon_cutoff": 1e-9}, {}), examples(stage.fields, 50)):
        given = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True} | more | params
        try:
            one = request(core, [7, 9, 7, 30], BAD, known=known, **given)
        except (InvalidRequest, ValidationError):
            continue
        if own.admit(0, one) and not (issubclass(stage, Filter) and one.params.greedy):
            return one
    raise AssertionError("no example makes it act")


def assert_only_it_fails(
    core: EngineCore, bad: Request, breaks: Callable[[], None], steps_before: int = 0
) -> None:
    """With `breaks` called after some steps, `bad` ends, and its neighbours answer as ever."""
    others = neighbours(core)
    want = run(core, *others).choices
    for one in (*others, bad):
        core.submit(one)
    results = Results()
    for _ in range(steps_before):
        collect(results, core.step()[0])
    breaks()
    for _ in range(200):
        if not core.has_work:
            break
        collect(results, core.step()[0])
        check(core)
    assert not core.has_work
    assert_all_free(core)
    results.merge()
    assert list(results.failed) == [BAD]
    error = results.failed[BAD].error
    assert isinstance(error, GenerationFailed)
    assert "Broken" not in str(error)
    for one in others:
        own = {key: delta for key, delta in want.items() if key[0] == one.request_id}
        _assert_other(results, own, one)


def lanes_of(core: EngineCore, request_id: str = BAD) -> set[int]:
    return {
        sequence.lane
        for group in core.scheduler.running
        if group.request.request_id == request_id
        for sequence in group.live
    }


# -- stages


def break_apply(core: EngineCore, stage: Stage, patch: pytest.MonkeyPatch) -> None:
    apply = stage.apply  # type: ignore[attr-defined]

    def broken(logits: Any, rows: Any) -> Any:
        if lanes_of(core) & set(rows.host_lanes):
            raise Broken
        return apply(logits, rows)

    patch.setattr(stage, "apply", broken)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
@pytest.mark.parametrize("steps_before", [0, 3], ids=["at once", "later"])
def test_a_stage_that_cannot_be_applied(
    tiny: EngineCore, stage: type[Stage], steps_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tiny.sampler.pipeline.stage(stage)
    breaks = partial(break_apply, tiny, own, monkeypatch)
    assert_only_it_fails(tiny, wanting(tiny, stage), breaks, steps_before)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_a_stage_that_cannot_admit(
    tiny: EngineCore, stage: type[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tiny.sampler.pipeline.stage(stage)
    admit = own.admit

    def broken(lane: int, one: Request) -> bool:
        if one.request_id == BAD:
            raise Broken
        return admit(lane, one)

    bad = request(tiny, [7, 9, 7, 30], BAD, n=2)
    assert_only_it_fails(tiny, bad, lambda: monkeypatch.setattr(own, "admit", broken))


OBSERVING = [
    stage for stage in STAGES if getattr(stage, "observe", Filter.observe) is not Filter.observe
]


@pytest.mark.parametrize("stage", OBSERVING, ids=lambda stage: stage.__name__)
def test_a_stage_that_cannot_observe(
    tiny: EngineCore, stage: type[Filter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has: what the others learned from the same draw they have not learned twice."""
    own = tiny.sampler.pipeline.stage(stage)
    observe = own.observe

    def broken(candidates: Any, rows: Any, tokens: Any) -> None:
        observe(candidates, rows, tokens)
        if lanes_of(tiny) & set(rows.host_lanes):
            raise Broken

    params = {"temperature": 1.0, "mirostat": 2, "max_tokens": 12}
    bad = request(tiny, [7, 9, 7, 30], BAD, **params)
    assert_only_it_fails(tiny, bad, lambda: monkeypatch.setattr(own, "observe", broken), 2)


@pytest.mark.parametrize("kind", ["copies", "beams"])
def test_lanes_that_cannot_be_forked(
    tiny: EngineCore, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = tiny.sampler.fork

    def broken(parents: list[int], children: list[int]) -> None:
        fork(parents, children)
        if lanes_of(tiny) & set(parents):
            raise Broken

    options = {"n": 3, "temperature": 1.0} if kind == "copies" else {
        "use_beam_search": True, "beam_width": 4}  # fmt: skip
    bad = request(tiny, [7, 9, 7, 30], BAD, max_tokens=8, **options)
    assert_only_it_fails(tiny, bad, lambda: monkeypatch.setattr(tiny.sampler, "fork", broken))


def test_what_cannot_be_forgotten_ends_nobody(
    tiny: EngineCore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that gives its lane back has its answer already."""
    write = PerLane.write

    def broken(self: Any, lane: int, value: Any) -> None:
        if value is None and lane in self._values:
            raise Broken
        write(self, lane, value)

    monkeypatch.setattr(PerLane, "write", broken)
    one = request(tiny, [7, 9], "one", logit_bias={"5": 1.0}, bad_words=["ab"], max_tokens=3)
    results = run_checked(tiny, one)
    assert list(results.finished) == ["one"]
    assert "could not be forgotten" in caplog.text


# -- the rest of a step


def test_a_sampler_that_cannot_take_a_row(
    tiny: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tiny.sampler._report

    def broken(raw: Any, processed: Any, chosen: Any, rows: Any) -> Any:
        if lanes_of(tiny) & set(rows.host_lanes):
            raise Broken
        return report(raw, processed, chosen, rows)

    bad = request(tiny, [7, 9, 7, 30], BAD, logprobs=3, max_tokens=12)
    assert_only_it_fails(tiny, bad, lambda: monkeypatch.setattr(tiny.sampler, "_report", broken), 2)


def test_a_trace_that_cannot_be_made(tiny: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = request(tiny, [7, 9, 7, 30], BAD, trace=TraceWish(3, (0, 1)), max_tokens=12)
    breaks = partial(monkeypatch.setattr, "engine.core.likeliest", _broken)
    assert_only_it_fails(tiny, bad, breaks, 2)


def test_a_strategy_that_fails(tiny: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Sampling.advance

    def broken(self: Sampling, live: Any, view: Any) -> Any:
        if self.width == 7:
            raise Broken
        return advance(self, live, view)

    bad = request(tiny, [7, 9, 7, 30], BAD, n=7, max_tokens=12)
    assert_only_it_fails(tiny, bad, lambda: monkeypatch.setattr(Sampling, "advance", broken), 2)


def test_text_that_cannot_be_made(tiny: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    take = TextStream.take

    def broken(self: TextStream, final: bool = False) -> Any:
        if self._keep_stop:
            raise Broken
        return take(self, final)

    bad = request(tiny, [7, 9, 7], BAD, stop=["zzz"], include_stop_str_in_output=True, max_tokens=4)
    assert_only_it_fails(tiny, bad, lambda: monkeypatch.setattr(TextStream, "take", broken))


def test_scores_of_a_prompt_that_cannot_be_told(
    tiny: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = request(tiny, [7, 9, 7, 30], BAD, prompt_logprobs=2, max_tokens=0)
    assert_only_it_fails(tiny, bad, lambda: monkeypatch.setattr(tiny, "_deliver", _only_bad(tiny)))


def _only_bad(core: EngineCore) -> Any:
    deliver = core._deliver

    def broken(group: Any, sequences: Any) -> Any:
        if group.request.request_id == BAD:
            raise Broken
        return deliver(group, sequences)

    return broken


def _broken(*_: Any, **__: Any) -> Any:
    raise Broken


# -- the model


class Failing(ScriptedModel):
    """A scripted model whose forward pass, or logits, raise some times."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.forwards_to_fail = self.logits_to_fail = 0

    def forward(self, *args: Any) -> torch.Tensor:
        if self.forwards_to_fail:
            self.forwards_to_fail -= 1
            raise Broken
        return super().forward(*args)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.logits_to_fail:
            self.logits_to_fail -= 1
            raise Broken
        return super().logits(hidden)


def test_a_forward_pass_that_fails_ends_those_it_was_for(tokenizer: Tokenizer) -> None:
    model = Failing(attentive=True)
    core = scripted_core(model, tokenizer, max_num_seqs=2)
    ones = [request(core, [5, 6, at], str(at), max_tokens=6) for at in (7, 8, 9)]
    want = run(core, ones[2])
    for one in ones:
        core.submit(one)
    core.step()
    check(core)
    model.forwards_to_fail = 1
    messages, stats = core.step()
    results = Results()
    collect(results, messages)
    check(core)
    # The third had no lane yet, and goes on as if nothing had been.
    assert list(results.failed) == ["7", "8"]
    assert stats.num_waiting == 1
    while core.has_work:
        collect(results, core.step()[0])
        check(core)
    assert_all_free(core)
    assert results.merge().ids("9") == want.ids("9")
    again = run(core, ones[0])
    assert list(again.finished) == ["7"]


def test_logits_that_fail_once_are_computed_again(tokenizer: Tokenizer) -> None:
    model = Failing(attentive=True)
    core = scripted_core(model, tokenizer)
    ones = [request(core, [5, 6, at], str(at), max_tokens=6) for at in (7, 8)]
    want = [run(core, one).ids(one.request_id) for one in ones]
    for one in ones:
        core.submit(one)
    results = Results()
    collect(results, core.step()[0])
    model.logits_to_fail = 1
    while core.has_work:
        collect(results, core.step()[0])
        check(core)
    assert not results.failed
    assert [results.merge().ids(one.request_id) for one in ones] == want


@pytest.mark.parametrize("what", ["forwards_to_fail", "logits_to_fail"])
def test_a_model_that_fails_for_good_ends_the_engine(tokenizer: Tokenizer, what: str) -> None:
    model = Failing(attentive=True)
    core = scripted_core(model, tokenizer)
    core.submit(request(core, [5, 6], max_tokens=6))
    core.step()
    setattr(model, what, 1000)
    with pytest.raises(Broken):
        core.step()


def test_what_a_failed_pass_left_in_the_cache_is_never_found(tokenizer: Tokenizer) -> None:
    model = Failing(attentive=True)
    core = scripted_core(model, tokenizer)
    ids = list(range(5, 25))
    model.forwards_to_fail = 1
    assert list(run(core, request(core, ids, "first")).failed) == ["first"]
    again = run(core, request(core, ids, "again"))
    assert again.finished["again"].cached_tokens == 0
