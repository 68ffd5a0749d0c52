"""The engine on its own thread, behind an async interface.

The event loop sends messages through an inbox and gets its answers in one delivery a
step. Nothing mutable is shared, so there are no locks.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol

from engine.core import EngineCore, Message
from engine.errors import EngineDead, EngineError, GenerationFailed, InvalidRequest, Overloaded
from engine.messages import Delta, Failed, Finished, Request, StepStats
from engine.prepare import ModelInfo
from engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_RECEIVING_S = 0.002  # between two steps


class EngineState(StrEnum):
    """Where the engine is in its life."""

    LOADING = "loading"
    SERVING = "serving"
    DEAD = "dead"


Loader = Callable[[], tuple[EngineCore, ModelInfo]]


class _Stop:
    pass


_STOP = _Stop()


class Generation:
    """What comes of submitted requests, to be iterated over until each has Finished.

    Iterating raises whatever made one of them fail. Close it, whether or not it was iterated: that
    aborts what has not finished. If the reader is slow, messages wait here in order.
    """

    def __init__(self, request_ids: set[str], abort: Callable[[str], None]) -> None:
        self._open_ids = request_ids
        self._abort = abort
        self._messages: deque[Message] = deque()
        self._arrived = asyncio.Event()

    def put(self, message: Message) -> None:
        """Deliver; called by the engine's side."""
        if not isinstance(message, Delta):
            self._open_ids.discard(message.request_id)
        self._messages.append(message)
        self._arrived.set()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Delta | Finished:
        while not self._messages:
            if not self._open_ids:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        message = self._messages.popleft()
        if isinstance(message, Failed):
            raise message.error
        return message

    def close(self) -> None:
        """Abort what has not finished; closing again does nothing."""
        for request_id in self._open_ids:
            self._abort(request_id)
        self._open_ids = set()
        self._messages.clear()


class Observer(Protocol):
    """Is told what happens, on the event loop."""

    def on_step(self, stats: StepStats) -> None: ...
    def on_finished(self, request: Request, finished: Finished) -> None: ...
    def on_abort(self, request: Request) -> None: ...
    def on_error(self, request: Request) -> None: ...


class AsyncEngine:
    """Runs an engine loop in a thread. All methods are for the event loop's thread.

    `tokenizer` and `info` are set once the model is loaded; `stats` is the latest step's.
    """

    def __init__(self, load: Loader, *, max_waiting: int, observer: Observer | None = None) -> None:
        self._load = load
        self._observer = observer
        self._max_waiting = max_waiting
        self._inbox: queue.SimpleQueue[Request | str | _Stop] = queue.SimpleQueue()
        self._open: dict[str, tuple[Request, Generation]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopped = False
        self._loaded = asyncio.Event()
        self._dead = asyncio.Event()
        self.state = EngineState.LOADING
        self.error: EngineError | None = None
        self.tokenizer: Tokenizer | None = None
        self.info: ModelInfo | None = None
        self.stats = StepStats()
        self.last_step_s = time.monotonic()

    # -- life

    def start(self) -> None:
        """Begin to load the model; returns at once."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def loaded(self) -> None:
        """Wait until the model serves. Raises what made loading fail."""
        await self._loaded.wait()
        if self.error is not None:
            raise self.error

    async def died(self) -> EngineError:
        """Wait until the engine cannot go on; returns what happened."""
        await self._dead.wait()
        assert self.error is not None
        return self.error

    async def stop(self) -> None:
        """Abort what is running and end the thread, or leave it behind if it is still loading."""
        self._stopped = True
        self.fail_all(_shutting_down())
        self._inbox.put(_STOP)
        if self.state is not EngineState.LOADING:
            await asyncio.to_thread(self._thread.join)

    def fail_all(self, error: EngineError) -> None:
        """End everything that is running or waiting with an error."""
        for request_id in list(self._open):
            self._post(Failed(request_id, error))
            self._inbox.put(request_id)

    def stalled_for(self) -> float:
        """Seconds since the last step, if there is work; 0 otherwise."""
        return time.monotonic() - self.last_step_s if self._open else 0.0

    @property
    def num_open(self) -> int:
        """Sequences running or waiting."""
        return sum(request.params.num_sequences for request, _ in self._open.values())

    # -- requests

    def generate(self, requests: Sequence[Request]) -> Generation:
        """Submit requests. Raises Overloaded if the queue is full or the model still loading.

        Raises InvalidRequest for more sequences than it could ever hold.
        """
        if self._stopped:
            raise _shutting_down()
        if self.state is EngineState.LOADING:
            raise Overloaded("the model is loading", "model_loading", retry_after_s=5)
        if self.state is EngineState.DEAD or self.info is None:
            raise EngineDead("the engine has stopped")
        width = sum(request.params.num_sequences for request in requests)
        most = self.info.num_lanes + self._max_waiting
        if width > most:
            raise InvalidRequest(
                f"prompts times choices must be at most {most} sequences, running and waiting, "
                f"got {width}",
                "prompt",
            )
        if self.num_open + width > most:
            raise Overloaded(f"the queue is full: {self.num_open} sequences are ahead")
        if not self._open:
            self.last_step_s = time.monotonic()
        generation = Generation({request.request_id for request in requests}, self._abort)
        for request in requests:
            self._open[request.request_id] = (request, generation)
            self._inbox.put(request)
        return generation

    def _abort(self, request_id: str) -> None:
        request, _ = self._open.pop(request_id)
        self._inbox.put(request_id)
        self._tell(lambda observer: observer.on_abort(request))

    # -- from the engine thread, run on the event loop

    def _post(self, message: Message) -> None:
        if message.request_id not in self._open:  # its reader has gone
            return
        request, generation = self._open[message.request_id]
        generation.put(message)
        if isinstance(message, Delta):
            return
        del self._open[message.request_id]
        if isinstance(message, Finished):
            self._tell(lambda observer: observer.on_finished(request, message))
        else:
            self._tell(lambda observer: observer.on_error(request))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        """Let the observer know. Whatever it makes of it, readers get their messages."""
        if self._observer is None:
            return
        try:
            what(self._observer)
        except Exception:
            log.exception("what happened cannot be observed")

    def _on_step(self, messages: list[Message], stats: StepStats) -> None:
        self.last_step_s = time.monotonic()
        self.stats = stats
        for message in messages:
            self._post(message)
        self._tell(lambda observer: observer.on_step(stats))

    def _on_loaded(self, tokenizer: Tokenizer, info: ModelInfo) -> None:
        self.tokenizer, self.info = tokenizer, info
        self.state = EngineState.SERVING
        self._loaded.set()

    def _on_death(self, error: EngineError) -> None:
        self.state = EngineState.DEAD
        self.error = error
        self.fail_all(EngineDead("the engine has stopped"))
        self._loaded.set()
        self._dead.set()

    # -- the engine thread

    def _run(self) -> None:
        assert self._loop is not None
        call = self._loop.call_soon_threadsafe
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to tell
            try:
                core, info = self._load()
                call(self._on_loaded, core.tokenizer, info)
                while self._receive(core):
                    messages, stats = core.step()
                    call(self._on_step, messages, stats)
            except EngineError as error:
                call(self._on_death, error)
            except Exception as error:
                log.critical("the engine has stopped", exc_info=error)
                call(self._on_death, EngineDead(f"the engine has stopped: {error!r}"))

    def _receive(self, core: EngineCore) -> bool:
        """Take in what has arrived, waiting if there is nothing else to do; False to stop.

        No more at once than streams can wait for: the rest comes with the next step.
        """
        assert self._loop is not None
        call = self._loop.call_soon_threadsafe
        until = time.monotonic() + _RECEIVING_S
        while not (core.has_work and time.monotonic() > until):
            try:
                message = self._inbox.get(block=not (core.has_work or core.idle()))
            except queue.Empty:
                if core.has_work:
                    return True
                continue
            if isinstance(message, _Stop):
                return False
            if isinstance(message, Request):
                if failed := _submit(core, message):
                    call(self._on_step, failed, core.stats())
            else:
                core.abort(message)
                if not core.has_work:  # no step will tell that everything is free again
                    call(self._on_step, [], core.stats())
        return True


def _submit(core: EngineCore, request: Request) -> list[Message]:
    """Queue a request; what its reader is told if even that fails."""
    try:
        core.submit(request)
    except Exception:
        log.exception("request %s cannot be queued", request.request_id)
        return [Failed(request.request_id, GenerationFailed("generation failed unexpectedly"))]
    return []


def _shutting_down() -> Overloaded:
    return Overloaded("the server is shutting down", "draining")
