"""What the routes share."""

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from engine.client import AsyncEngine, EngineState
from engine.errors import EngineDead, Overloaded
from engine.params import SamplingParams, combinable
from engine.prepare import ModelInfo
from engine.tokenizer import Tokenizer
from server.auth import Keys
from server.config import ServerConfig
from server.metrics import Metrics
from server.unanswered import Unanswered


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
    ready: bool = True  # False from the first sign of a shutdown
    draining: bool = False  # True once no new requests are taken
    num_inflight: int = 0  # POST requests that are being answered
    unanswered: set[Unanswered] = field(default_factory=set)
    _last_id: int = 0

    def unique_id(self, label: str) -> str:
        """An id for the engine: clients may use the same label twice."""
        self._last_id += 1
        return f"{label}-{self._last_id}"

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

    def defaults(self, info: ModelInfo) -> dict[str, Any]:
        """Sampling parameters that apply where a request gives none."""
        recommended = info.sampling_defaults if self.config.generation_config else {}
        return combinable(recommended, SamplingParams.model_validate(self.sampling)) | self.sampling


def shutting_down() -> Overloaded:
    """What requests are told once the server takes no more."""
    return Overloaded("the server is shutting down", "draining", retry_after_s=10)


def state_of(request: Request) -> ServerState:
    """The server a request came to."""
    state: ServerState = request.app.state.server
    return state
