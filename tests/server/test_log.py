"""The request log: one line of JSON for each request."""

import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.engines import tiny_core
from tests.support.servers import asgi_client, make_app
from tests.support.wire import CHAT, COMPLETIONS

LOGGER = "logitmill.request"
BODY = {"max_tokens": 4, "ignore_eos": True}


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.DEBUG, logger=LOGGER):
        yield


@pytest.fixture
async def client(tiny_folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Without a socket: a line is written after the answer, but before the client has it."""
    async with asgi_client(make_app(lambda: tiny_core(tiny_folder))) as client:
        yield client


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[dict[str, Any]]:
    """What the log says, parsed."""
    records = [one for one in caplog.records if one.name == LOGGER and one.levelno == level]
    messages = [record.getMessage() for record in records]
    assert not any("\n" in message for message in messages)
    return [json.loads(message) for message in messages]


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_line_tells_what_a_request_was_and_took(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    prompts = [[5] * 9, [6] * 3]
    body = BODY | {"prompt": prompts, "n": 2, "stream": stream, "cache_salt": f"log {stream}"}
    response = await client.post(COMPLETIONS, json=body)

    (line,) = lines(caplog)
    times = {name: line.pop(name) for name in ("seconds", "queue_s", "prefill_s", "decode_s")}
    assert all(isinstance(time, float) and time >= 0 for time in times.values())
    assert line == {
        "id": response.headers["x-request-id"],
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "prompt_tokens": 12,
        "cached_tokens": 0,
        "completion_tokens": 16,
        "finish_reason": ["length"],
    }


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", COMPLETIONS, {"prompt": [5], "temperature": 9}, 400),
        ("POST", CHAT, {"model": "other"}, 404),
        ("GET", "/v1/models", None, 200),
        ("GET", COMPLETIONS, None, 405),
        ("POST", "/tokenize", {"prompt": "a"}, 200),
    ],
)
async def test_other_requests_are_logged_with_their_status(
    client: httpx.AsyncClient,
    caplog: pytest.LogCaptureFixture,
    method: str,
    path: str,
    body: Any,
    status: int,
) -> None:
    await client.request(method, path, json=body, headers={"X-Request-Id": "mine"})

    (line,) = lines(caplog)
    assert line.pop("seconds") >= 0
    assert line == {"id": "mine", "method": method, "path": path, "status": status}


@pytest.mark.anyio
async def test_nothing_that_a_client_wrote_is_logged(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    await client.post(COMPLETIONS, json=BODY | {"prompt": "secret", "user": "secret", "secret": 1})
    await client.get("/secret")

    assert [line["path"] for line in lines(caplog)] == [COMPLETIONS, "unmatched"]
    assert "secret" not in "".join(record.getMessage() for record in caplog.records)


@pytest.mark.anyio
async def test_probes_do_not_fill_the_log(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("/health", "/live", "/ready", "/ping", "/version", "/metrics"):
        await client.get(path)

    assert lines(caplog) == []
    assert len(lines(caplog, logging.DEBUG)) == 6
