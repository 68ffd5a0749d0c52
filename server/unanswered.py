"""A request whose answer has not begun: how long it may take, and what may end it sooner."""

import asyncio

from server.config import ServerConfig
from server.errors import ApiError


class Unanswered:
    """The time that a request has until its answer begins, and within that, its body to arrive.

    `limit` surrounds the handling of the request and ends it. Times are of the loop's clock.
    """

    def __init__(self, limit: asyncio.Timeout, config: ServerConfig) -> None:
        now = asyncio.get_running_loop().time()
        self.reading = False  # its body
        self.deadline = now + config.request_timeout if config.request_timeout else None
        self._config = config
        self._limit = limit
        self._body_deadline = now + config.body_timeout
        self._end_by(self.deadline)

    def begin_reading(self) -> None:
        """The body is awaited."""
        self.reading = True
        self._end_by(self._body_deadline if self._body_first else self.deadline)

    def end_reading(self) -> None:
        """The body is there."""
        self.reading = False
        self._end_by(self.deadline)

    def begin_answer(self) -> None:
        """Time no longer ends it: a stream that has begun minds its deadline itself."""
        self._end_by(None)

    def end(self) -> None:
        """End its handling at once."""
        self._end_by(0.0)

    def why(self) -> ApiError:
        """What to tell a client whose request ran out of time."""
        if self.reading and self._body_first:
            return ApiError(
                408,
                "The body of the request was not complete within "
                f"{self._config.body_timeout:g} seconds.",
                code="request_timeout",
                headers={"Connection": "close"},
            )
        return deadline_exceeded(self._config.request_timeout)

    @property
    def _body_first(self) -> bool:
        return self.deadline is None or self._body_deadline < self.deadline

    def _end_by(self, when: float | None) -> None:
        if not self._limit.expired():
            self._limit.reschedule(when)


def deadline_exceeded(limit_s: float) -> ApiError:
    """What a client is told whose request took longer than --request-timeout."""
    return ApiError(
        504,
        f"The request was not done within the {limit_s:g} seconds this server allows.",
        "server_error",
        code="deadline_exceeded",
    )
