"""What the routes share."""

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from engine.client import AsyncEngine, EngineState
from engine.errors import EngineDead, Overloaded
from engine.prepare import ModelInfo
from engine.tokenizer import Tokenizer
from server.answers import fingerprint
from server.auth import Keys
from server.config import ServerConfig
from server.inputs import Incoming, Input, Reader, defaults_of, quick, read
from server.metrics import Metrics
from server.unanswered import Unanswered
from server.workers import Workers


@dataclass(slots=True)
class ServerState:
    """Everything a request may need. Used on the event loop only."""

    config: ServerConfig
    engine: AsyncEngine
    metrics: Metrics
    keys: Keys
    model_names: list[str]  # the first is the one replies carry
    created: int
    sampling: dict[str, Any] = field(default_factory=dict)  # the configuration's [sampling]
    warm: bool = False  # start what reads bodies before anybody needs it
    ready: bool = True  # False from the first sign of a shutdown
    draining: bool = False  # True once no new requests are taken
    num_inflight: int = 0  # POST requests that are being answered
    unanswered: set[Unanswered] = field(default_factory=set)
    body_bytes: int = 0  # of bodies in memory
    workers: Workers = field(default_factory=Workers)
    _last_number: int = 0
    _reader: Reader | None = None

    def next_number(self) -> int:
        """Tells requests from one another for the engine: clients may use the same label twice."""
        self._last_number += 1
        return self._last_number

    async def read(self, incoming: Incoming) -> Input:
        """What a body asks for. Raises ApiError, and Overloaded or EngineDead without a model."""
        reader = self.reader()
        value = quick(incoming)
        if value is not None:
            return read(incoming, reader, value)
        return await self.workers.read(incoming, reader)

    def reader(self) -> Reader:
        """What reads bodies. Raises Overloaded or EngineDead while there is no model."""
        tokenizer, info = self.model()
        if self._reader is None:
            defaults = defaults_of(self.config, info, self.sampling)
            self._reader = Reader(self.config, self.model_names, defaults, info, tokenizer)
        return self._reader

    def names(self) -> tuple[str, str]:
        """The model's name, and what tells its answers from those of any other, for answers."""
        _, info = self.model()
        name = self.model_names[0]
        return name, fingerprint(name, info)

    def drain(self) -> None:
        """Take no more requests, nor the rest of those that have not come whole."""
        self.draining = True
        for request in self.unanswered:
            if request.reading:
                request.end()

    def give_up(self) -> None:
        """End all requests whose answers have not begun."""
        for request in self.unanswered:
            request.end()

    def model(self) -> tuple[Tokenizer, ModelInfo]:
        """The loaded model. Raises Overloaded or EngineDead while there is none."""
        engine = self.engine
        if engine.state is EngineState.DEAD:
            raise EngineDead("the engine has stopped")
        if self.stalled:
            raise EngineDead("the engine does not answer")
        if self.draining:
            raise shutting_down()
        if engine.tokenizer is None or engine.info is None:
            raise Overloaded("the model is loading", "model_loading", retry_after_s=5)
        return engine.tokenizer, engine.info

    @property
    def stalled(self) -> bool:
        """Has the engine had work for too long without a step?"""
        return self.engine.stalled_for() > self.config.watchdog


def shutting_down() -> Overloaded:
    """What requests are told once the server takes no more."""
    return Overloaded("the server is shutting down", "draining", retry_after_s=10)


def state_of(request: Request) -> ServerState:
    """The server a request came to."""
    state: ServerState = request.app.state.server
    return state
