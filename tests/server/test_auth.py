"""API keys: who gets in, and to what."""

import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.auth import Keys
from server.settings import BadOption
from tests.support.engines import tiny_core
from tests.support.servers import asgi_client, make_app
from tests.support.wire import CHAT, COMPLETIONS

GUARDED = [
    ("POST", COMPLETIONS),
    ("POST", CHAT),
    ("POST", "/tokenize"),
    ("POST", "/v1/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/nowhere"),
]
OPEN = ["/health", "/ready", "/live", "/ping", "/version", "/docs", "/openapi.json", "/metrics"]


@pytest.fixture
async def locked(tiny_folder: Path) -> Any:
    """A client without a key of a server that knows two."""
    app = make_app(lambda: tiny_core(tiny_folder), api_key="Secret-1, other")
    async with asgi_client(app) as client:
        yield client


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_everything_that_uses_the_model_needs_a_key(
    locked: httpx.AsyncClient, method: str, path: str
) -> None:
    for headers in ({}, {"Authorization": "Bearer my-guess"}):
        response = await locked.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert (error["param"], error["code"]) == (None, "invalid_api_key")
        assert "my-guess" not in error["message"]
    known = await locked.request(method, path, headers={"Authorization": "Bearer other"})
    assert known.status_code != 401


@pytest.mark.anyio
async def test_probes_and_pages_are_open(locked: httpx.AsyncClient) -> None:
    for path in OPEN:
        assert (await locked.get(path)).status_code == 200
    for path in ("/health", COMPLETIONS):
        assert (await locked.options(path)).status_code == 405  # not 401


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer Secret-1", 200),
        ("Bearer other", 200),
        ("bearer Secret-1", 200),
        ("BEARER Secret-1", 200),
        ("Bearer  Secret-1 ", 200),
        ("Bearer secret-1", 401),
        ("Bearer Secret-", 401),
        ("Bearer Secret-1x", 401),
        ("Bearer Secret-1, other", 401),
        ("Bearer ", 401),
        ("Bearer", 401),
        ("Basic Secret-1", 401),
        ("Secret-1", 401),
        ("", 401),
    ],
)
async def test_keys_are_case_sensitive_and_the_scheme_is_not(
    locked: httpx.AsyncClient, header: str, status: int
) -> None:
    response = await locked.get("/v1/models", headers={"Authorization": header})

    assert response.status_code == status


@pytest.mark.anyio
async def test_without_keys_everyone_gets_in(tiny_folder: Path) -> None:
    async with asgi_client(make_app(lambda: tiny_core(tiny_folder))) as client:
        for header in ("", "Bearer ", "Bearer anything", "Basic x"):
            response = await client.get("/v1/models", headers={"Authorization": header})
            assert response.status_code == 200


@pytest.mark.anyio
async def test_metrics_can_be_guarded_too(tiny_folder: Path) -> None:
    app = make_app(lambda: tiny_core(tiny_folder), api_key="k", protect_metrics=True)
    async with asgi_client(app) as client:
        assert (await client.get("/metrics")).status_code == 401
        headers = {"Authorization": "Bearer k"}
        assert (await client.get("/metrics", headers=headers)).status_code == 200


# -- keys from a file


def test_a_file_of_keys_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n  second  \n")
    keys = Keys(["fixed"], str(file))

    assert [keys.allow(f"Bearer {key}") for key in ("first", "second", "fixed")] == [True] * 3
    assert not keys.allow("Bearer # ours")
    assert not keys.allow("Bearer ")

    file.write_text("third\n")
    _touch(file, 5)
    assert [keys.allow(f"Bearer {key}") for key in ("third", "first", "fixed")] == [
        True,
        False,
        True,
    ]


def test_an_empty_file_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n")

    assert not Keys([], str(file)).allow("Bearer ")
    assert not Keys([], str(file)).allow(None)


def test_while_the_file_is_away_its_last_keys_stay_good(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first")
    keys = Keys([], str(file))

    file.unlink()
    assert keys.allow("Bearer first")
    file.write_bytes(b"\xff")  # not text
    _touch(file, 5)
    assert keys.allow("Bearer first")
    file.write_text("second")
    _touch(file, 9)
    assert not keys.allow("Bearer first")
    assert keys.allow("Bearer second")


def test_a_file_that_cannot_be_read_is_a_bad_option(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="--api-key-file"):
        Keys([], str(tmp_path / "missing"))


@pytest.mark.anyio
async def test_a_request_may_use_a_key_that_was_just_added(
    tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("first")
    app = make_app(lambda: tiny_core(tiny_folder), api_key_file=str(file))
    async with asgi_client(app) as client:
        headers = {"Authorization": "Bearer second"}
        before = await client.get("/v1/models", headers=headers)
        file.write_text("first\nsecond")
        _touch(file, 5)
        after = await client.get("/v1/models", headers=headers)

    assert (before.status_code, after.status_code) == (401, 200)


def _touch(file: Path, seconds: int) -> None:
    """Let the file look changed, however coarse the clock of the file system is."""
    changed = file.stat().st_mtime + seconds
    os.utime(file, (changed, changed))
