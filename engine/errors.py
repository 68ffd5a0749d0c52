"""Everything the engine raises on purpose.

EngineError
├── InvalidRequest      the request cannot be run: its fields clash, or this model cannot do it
├── Overloaded          the engine cannot take the request now
├── GenerationFailed    one request failed; the others go on
├── EngineDead          the step loop raised; nothing can run any more
└── ModelUnavailable    the model cannot be found, read or served
"""


class EngineError(Exception):
    """Base of all errors the engine raises deliberately."""


class InvalidRequest(EngineError):
    """A request that no retry can save.

    `param` is the JSON path of the offending field, `code` the machine-readable reason.
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Overloaded(EngineError):
    """The engine is loading, draining, or its queue is full; worth another try later."""

    def __init__(self, message: str, code: str = "overloaded", retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class GenerationFailed(EngineError):
    """One request failed inside the engine (NaN logits, say); its resources are free again."""


class EngineDead(EngineError):
    """The engine thread has stopped after an unexpected exception."""


class ModelUnavailable(EngineError):
    """The model cannot be found, downloaded, read or served; the message says why, in a line."""
