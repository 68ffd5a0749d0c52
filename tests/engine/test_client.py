"""The engine on its own thread: requests in, messages out, and every way in which it can end."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from torch import Tensor

from engine.client import AsyncEngine, EngineState, Generation, Loader
from engine.core import EngineCore
from engine.errors import (
    EngineDead,
    GenerationFailed,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
)
from engine.messages import Delta, Finished, Request, StepStats
from engine.tokenizer import Tokenizer
from tests.support.engines import assert_all_free, info, request, run, scripted_core
from tests.support.scripted import ScriptedModel

pytestmark = pytest.mark.anyio

LONG = {"max_tokens": 40, "ignore_eos": True}


class Gate(ScriptedModel):
    """Steps wait until they may go on; `fail` is raised in the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.entered = threading.Event()
        self.fail: Exception | None = None

    def forward(self, *args: Any) -> Tensor:
        self.entered.set()
        assert self.open.wait(60)
        if self.fail is not None:
            raise self.fail
        return super().forward(*args)


class Watcher:
    """Writes down what an observer is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.stats: list[StepStats] = []
        self.threads: set[threading.Thread] = set()

    def on_step(self, stats: StepStats) -> None:
        self.threads.add(threading.current_thread())
        self.stats.append(stats)

    def on_finished(self, request: Request, finished: Finished) -> None:
        assert request.request_id == finished.request_id
        self.told.append(("finished", request.request_id))

    def on_abort(self, request: Request) -> None:
        self.told.append(("abort", request.request_id))

    def on_error(self, request: Request) -> None:
        self.told.append(("error", request.request_id))


def loader(core: EngineCore) -> Loader:
    return lambda: (core, info(core))


@asynccontextmanager
async def serving(
    core: EngineCore, *, max_waiting: int = 100, observer: Watcher | None = None
) -> AsyncIterator[AsyncEngine]:
    """An engine that has loaded; stopped at the end, with its model let go."""
    engine = AsyncEngine(loader(core), max_waiting=max_waiting, observer=observer)
    engine.start()
    try:
        await asyncio.wait_for(engine.loaded(), 60)
        yield engine
    finally:
        if isinstance(core.model, Gate):
            core.model.open.set()
        await asyncio.wait_for(engine.stop(), 60)
        assert not engine._thread.is_alive()


async def read(generation: Generation) -> list[Delta | Finished]:
    async def all_of_it() -> list[Delta | Finished]:
        return [message async for message in generation]

    return await asyncio.wait_for(all_of_it(), 60)


async def until(condition: Any) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def free(stats: StepStats) -> bool:
    return (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)


@pytest.fixture
def core(tokenizer: Tokenizer) -> EngineCore:
    return scripted_core(ScriptedModel(), tokenizer, max_num_seqs=4)


@pytest.fixture
def gated(tokenizer: Tokenizer) -> Iterator[EngineCore]:
    model = Gate()
    yield scripted_core(model, tokenizer, max_num_seqs=4)
    model.open.set()


# -- requests


async def test_messages_are_those_of_the_engine(core: EngineCore) -> None:
    requests = [
        request(core, [5, 6, index], name, n=2, temperature=1.0, seed=1)
        for index, name in enumerate("abc")
    ]
    want = run(core, *requests)
    watcher = Watcher()
    async with serving(core, observer=watcher) as engine:
        messages = await read(engine.generate(requests))
        assert engine.num_open == 0
        assert engine.stalled_for() == 0.0
    choices = {(one.request_id, one.index): one for one in messages if isinstance(one, Delta)}
    assert choices == want.choices
    finished = [message.request_id for message in messages if isinstance(message, Finished)]
    assert sorted(finished) == ["a", "b", "c"]
    assert sorted(watcher.told) == [("finished", name) for name in "abc"]
    assert watcher.threads == {threading.current_thread()}
    assert watcher.stats[-1].num_running == 0


async def test_streams_of_several_readers_do_not_mix(core: EngineCore) -> None:
    prompts = {f"r{index}": [5 + index, 7] for index in range(12)}
    requests = [request(core, ids, name, stream=True, **LONG) for name, ids in prompts.items()]
    want = run(core, *requests)
    async with serving(core) as engine:
        streams = [engine.generate([one]) for one in requests]
        answers = await asyncio.gather(*(read(stream) for stream in streams))
    for one, messages in zip(requests, answers, strict=True):
        assert {message.request_id for message in messages} == {one.request_id}
        tokens = [token for delta in messages[:-1] for token in delta.tokens]  # type: ignore[union-attr]
        assert [token.id for token in tokens] == want.ids(one.request_id)
        assert isinstance(messages[-1], Finished)


async def test_closing_aborts_and_frees_everything(gated: EngineCore) -> None:
    watcher = Watcher()
    async with serving(gated, observer=watcher) as engine:
        generation = engine.generate(
            [request(gated, [5, 6, index], name, **LONG) for index, name in enumerate("abc")]
        )
        assert engine.num_open == 3
        await until(gated.model.entered.is_set)  # type: ignore[attr-defined]
        generation.close()
        generation.close()
        assert engine.num_open == 0
        gated.model.open.set()  # type: ignore[attr-defined]
        await until(lambda: watcher.stats and free(engine.stats))
        assert_all_free(gated)
    assert sorted(watcher.told) == [("abort", name) for name in "abc"]
    assert len(watcher.stats) <= 3  # the step that was running, and what told that all is free


async def test_a_reader_that_leaves_early_leaves_nothing_behind(core: EngineCore) -> None:
    async with serving(core) as engine:
        generation = engine.generate([request(core, [5, 6], stream=True, **LONG)])
        first = await anext(generation)
        assert isinstance(first, Delta)
        generation.close()
        await until(lambda: free(engine.stats))
        again = await read(engine.generate([request(core, [5, 6])]))
        assert isinstance(again[-1], Finished)


async def test_a_finished_request_is_not_aborted_by_closing(core: EngineCore) -> None:
    watcher = Watcher()
    async with serving(core, observer=watcher) as engine:
        generation = engine.generate([request(core, [5, 6])])
        await read(generation)
        generation.close()
    assert watcher.told == [("finished", "r")]


async def test_one_that_fails_raises_for_its_reader_only(tokenizer: Tokenizer) -> None:
    model = ScriptedModel()
    script = model.script
    model.script = lambda token, position: (
        script(token, position) * (float("nan") if position == 2 and token == 9 else 1.0)
    )
    core = scripted_core(model, tokenizer)
    watcher = Watcher()
    async with serving(core, observer=watcher) as engine:
        good = engine.generate([request(core, [5, 6, 7], "good")])
        bad = engine.generate([request(core, [5, 6, 9], "bad")])
        with pytest.raises(GenerationFailed):
            await read(bad)
        assert isinstance((await read(good))[-1], Finished)
        assert engine.state is EngineState.SERVING
    assert sorted(watcher.told) == [("error", "bad"), ("finished", "good")]


async def test_one_that_cannot_even_be_queued_fails_alone(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = core.submit

    def broken(one: Request) -> None:
        if one.request_id == "bad":
            raise ZeroDivisionError
        submit(one)

    monkeypatch.setattr(core, "submit", broken)
    async with serving(core) as engine:
        both = [engine.generate([request(core, [5, 6], name)]) for name in ("bad", "good")]
        with pytest.raises(GenerationFailed, match="generation failed unexpectedly"):
            await read(both[0])
        assert await read(both[1])
        assert engine.num_open == 0


async def test_whatever_an_observer_does_readers_get_their_messages(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    watcher = Watcher()
    for name in ("on_step", "on_finished", "on_error", "on_abort"):
        monkeypatch.setattr(watcher, name, broken)
    async with serving(core, observer=watcher) as engine:
        both = [engine.generate([request(core, [5, 6], name)]) for name in "ab"]
        for one in both:
            assert isinstance((await read(one))[-1], Finished)
        engine.generate([request(core, [5, 6], "gone", **LONG)]).close()
        assert engine.num_open == 0


async def test_many_requests_at_once_do_not_hold_up_a_step(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be taken in at once is taken in between the next steps."""
    monkeypatch.setattr("engine.client._RECEIVING_S", 0.0)
    async with serving(core) as engine:
        names = [str(number) for number in range(12)]
        many = engine.generate([request(core, [5, 6], name, **LONG) for name in names])
        finished = {one.request_id for one in await read(many) if isinstance(one, Finished)}
    assert finished == set(names)


async def test_messages_wait_in_order_for_a_slow_reader(core: EngineCore) -> None:
    async with serving(core) as engine:
        generation = engine.generate([request(core, [5, 6], stream=True, **LONG)])
        await until(lambda: engine.num_open == 0)
        messages = await read(generation)
    positions = [token for delta in messages[:-1] for token in delta.tokens]  # type: ignore[union-attr]
    assert [token.id for token in positions] == run(core, request(core, [5, 6], **LONG)).ids()


# -- too many


async def test_beyond_the_queue_a_request_is_refused(gated: EngineCore) -> None:
    async with serving(gated, max_waiting=2) as engine:
        first = engine.generate([request(gated, [5, 6], "a", n=3), request(gated, [5, 6], "b")])
        second = engine.generate([request(gated, [5, 6], "c", n=2)])
        for n in (1, 4):
            with pytest.raises(Overloaded) as raised:
                engine.generate([request(gated, [5, 6], "d", n=n)])
            assert (raised.value.code, raised.value.retry_after_s) == ("overloaded", 1)
        with pytest.raises(InvalidRequest, match=r"at most 6 sequences.* got 8") as refused:
            engine.generate([request(gated, [5, 6], name, n=4) for name in "de"])
        assert refused.value.param == "prompt"
        assert engine.num_open == 6
        second.close()
        third = engine.generate([request(gated, [5, 6], "e", n=2)])
        gated.model.open.set()  # type: ignore[attr-defined]
        for generation in (first, third):
            assert isinstance((await read(generation))[-1], Finished)


async def test_while_the_model_loads_requests_are_refused(core: EngineCore) -> None:
    may_load = threading.Event()

    def load() -> Any:
        assert may_load.wait(60)
        return core, info(core)

    engine = AsyncEngine(load, max_waiting=2)
    engine.start()
    assert engine.state is EngineState.LOADING
    with pytest.raises(Overloaded) as raised:
        engine.generate([request(core, [5, 6])])
    assert raised.value.code == "model_loading"
    may_load.set()
    await asyncio.wait_for(engine.loaded(), 60)
    assert (engine.state, engine.tokenizer) == (EngineState.SERVING, core.tokenizer)
    assert isinstance((await read(engine.generate([request(core, [5, 6])])))[-1], Finished)
    await engine.stop()


async def test_stopping_does_not_wait_for_a_model_that_still_loads(core: EngineCore) -> None:
    may_load = threading.Event()

    def load() -> Any:
        assert may_load.wait(60)
        return core, info(core)

    engine = AsyncEngine(load, max_waiting=2)
    engine.start()
    await asyncio.wait_for(engine.stop(), 60)
    assert engine.state is EngineState.LOADING
    may_load.set()
    await asyncio.to_thread(engine._thread.join, 60)
    assert not engine._thread.is_alive()
    await engine.loaded()  # too late
    with pytest.raises(Overloaded):
        engine.generate([request(core, [5, 6])])


# -- the end


@pytest.mark.parametrize("error", [ModelUnavailable("no such model"), RuntimeError("a bug")])
async def test_a_model_that_cannot_be_loaded_is_told_to_who_waits(
    core: EngineCore, error: Exception
) -> None:
    def load() -> Any:
        raise error

    engine = AsyncEngine(load, max_waiting=2)
    engine.start()
    expected = ModelUnavailable if isinstance(error, ModelUnavailable) else EngineDead
    with pytest.raises(expected, match=str(error)):
        await asyncio.wait_for(engine.loaded(), 60)
    assert engine.state is EngineState.DEAD
    assert await asyncio.wait_for(engine.died(), 60) is engine.error
    with pytest.raises(EngineDead):
        engine.generate([request(core, [5, 6])])
    await asyncio.wait_for(engine.stop(), 60)


async def test_a_step_that_raises_ends_everything(gated: EngineCore) -> None:
    watcher = Watcher()
    async with serving(gated, observer=watcher) as engine:
        running = engine.generate([request(gated, [5, 6], "running")])
        several = engine.generate([request(gated, [5, 6], name) for name in "ab"])
        gated.model.fail = RuntimeError("a bug")  # type: ignore[attr-defined]
        gated.model.open.set()  # type: ignore[attr-defined]
        error = await asyncio.wait_for(engine.died(), 60)
        assert isinstance(error, EngineDead)
        assert "a bug" in str(error)
        for generation in (running, several):
            with pytest.raises(EngineDead):
                await read(generation)
            generation.close()
        with pytest.raises(EngineDead):
            engine.generate([request(gated, [5, 6], "late")])
        assert (engine.state, engine.num_open) == (EngineState.DEAD, 0)
    assert sorted(watcher.told) == [("error", name) for name in ("a", "b", "running")]


async def test_stopping_ends_what_runs_with_an_error(gated: EngineCore) -> None:
    async with serving(gated) as engine:
        generation = engine.generate([request(gated, [5, 6], **LONG)])
        await until(gated.model.entered.is_set)  # type: ignore[attr-defined]
        stopping = asyncio.ensure_future(engine.stop())
        with pytest.raises(Overloaded) as raised:
            await read(generation)
        assert raised.value.code == "draining"
        gated.model.open.set()  # type: ignore[attr-defined]
        await asyncio.wait_for(stopping, 60)
        with pytest.raises(Overloaded):
            engine.generate([request(gated, [5, 6], "late")])
    assert_all_free(gated)


async def test_everything_can_be_failed_and_the_engine_goes_on(gated: EngineCore) -> None:
    async with serving(gated) as engine:
        generations = [engine.generate([request(gated, [5, 6], name, **LONG)]) for name in "abcdef"]
        await until(gated.model.entered.is_set)  # type: ignore[attr-defined]
        engine.fail_all(Overloaded("too slow", "draining"))
        gated.model.open.set()  # type: ignore[attr-defined]
        for generation in generations:
            with pytest.raises(Overloaded, match="too slow"):
                await read(generation)
            generation.close()
        assert isinstance((await read(engine.generate([request(gated, [5, 6])])))[-1], Finished)
        assert_all_free(gated)


async def test_a_loop_that_has_closed_ends_the_thread(core: EngineCore) -> None:
    threads = []

    async def leave() -> None:
        engine = AsyncEngine(loader(core), max_waiting=2)
        engine.start()
        threads.append(engine._thread)
        await engine.loaded()
        engine.generate([request(core, [5, 6], stream=True, **LONG)])

    await asyncio.to_thread(asyncio.run, leave())
    await asyncio.to_thread(threads[0].join, 60)
    assert not threads[0].is_alive()


# -- the event loop


class Sleeper(ScriptedModel):
    """A step takes half a second."""

    def forward(self, *args: Any) -> Tensor:
        time.sleep(0.5)
        return super().forward(*args)


async def test_the_loop_goes_on_while_a_step_runs(tokenizer: Tokenizer) -> None:
    core = scripted_core(Sleeper(), tokenizer)
    async with serving(core) as engine:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticker = asyncio.ensure_future(tick())
        generation = engine.generate([request(core, [5, 6], max_tokens=1)])
        messages = await read(generation)
        ticker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticker
    assert isinstance(messages[-1], Finished)
    assert ticks >= 10  # a blocked loop makes one or two


async def test_what_an_idle_engine_does_holds_up_nobody(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    monkeypatch.setattr(core, "idle", lambda: begun.set() is None)  # never done
    async with serving(core) as engine:
        assert await asyncio.to_thread(begun.wait, 60)
        messages = await read(engine.generate([request(core, [5, 6], max_tokens=2)]))
    assert isinstance(messages[-1], Finished)


async def test_an_engine_is_stalled_only_while_it_has_work(gated: EngineCore) -> None:
    async with serving(gated) as engine:
        engine.last_step_s -= 1000
        assert engine.stalled_for() == 0.0
        generation = engine.generate([request(gated, [5, 6], max_tokens=2)])
        assert engine.stalled_for() < 900  # being idle for long is no stall
        engine.last_step_s -= 1000
        assert engine.stalled_for() >= 1000
        gated.model.open.set()  # type: ignore[attr-defined]
        await read(generation)
        assert engine.stalled_for() == 0.0
