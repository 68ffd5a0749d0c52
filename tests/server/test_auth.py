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


@pytest.mark.anyio
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
async def test_a_key_may_hold_any_characters(tiny_folder: Path, encoding: str) -> None:
    """curl sends the bytes of the terminal, some libraries Latin-1."""
    app = make_app(lambda: tiny_core(tiny_folder), api_key="schlüssel")
    async with asgi_client(app) as client:
        for key, status in (("schlüssel", 200), ("schlossel", 401), ("schlÜssel", 401)):
            header = f"Bearer {key}".encode(encoding)
            response = await client.get("/v1/models", headers={b"Authorization": header})
            assert response.status_code == status


# -- keys from a file


def lets_in(keys: Keys, *given: str) -> list[bool]:
    return [keys.identify(f"Bearer {key}") is not None for key in given]


def test_a_file_of_keys_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n  second  \n")
    keys = Keys(["fixed"], str(file))

    assert lets_in(keys, "first", "second", "fixed") == [True] * 3
    assert lets_in(keys, "# ours", "") == [False] * 2

    file.write_text("third\n")
    assert lets_in(keys, "third", "first", "fixed") == [True, False, True]


def test_in_a_file_a_line_is_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes("\ufefffirst\r\na,b\n# c\nd # e\nschlüssel\n".encode())
    keys = Keys([], str(file))

    assert lets_in(keys, "first", "a,b", "d # e") == [True] * 3
    assert keys.identify("Bearer schlüssel".encode().decode("latin-1"))
    assert lets_in(keys, "a", "b", "# c", "d", "\ufefffirst") == [False] * 5


@pytest.mark.parametrize("same_size", [True, False])
def test_a_replaced_file_is_read_whatever_its_times_say(tmp_path: Path, same_size: bool) -> None:
    file, new = tmp_path / "keys", tmp_path / "new"
    file.write_text("first")
    os.utime(file, (1_000_000, 1_000_000))
    keys = Keys([], str(file))
    assert lets_in(keys, "first") == [True]

    new.write_text("third" if same_size else "a third")
    os.utime(new, (1_000_000, 1_000_000))
    new.replace(file)
    assert lets_in(keys, "first", "third", "a third") == [False, same_size, not same_size]

    file.write_text("forth" if same_size else "a forth")  # in place, and back in time
    os.utime(file, (1_000_000, 1_000_000))
    assert lets_in(keys, "forth" if same_size else "a forth", "third") == [True, False]


def test_a_file_without_keys_lets_nobody_in_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("\n# none yet\n")
    keys = Keys([], str(file))

    assert lets_in(keys, "", "x") == [False] * 2
    assert keys.identify(None) is None
    (record,) = caplog.records
    assert str(file) in record.getMessage()
    assert "nobody gets in" in record.getMessage()
    file.write_text("x")
    assert lets_in(keys, "", "x") == [False, True]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"secret\xff", "UTF-8"),
        (b"secret\n" * 200_000, "larger than 1048576 bytes"),
    ],
)
def test_while_the_file_cannot_be_read_its_last_keys_stay_good_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None, says: str
) -> None:
    file = tmp_path / "keys"
    file.write_text("first")
    keys = Keys([], str(file))
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)

    assert lets_in(keys, "first", "secret", "first") == [True, False, True]
    (record,) = caplog.records  # once, not with each request
    assert record.levelname == "WARNING"
    assert str(file) in record.getMessage()
    assert says in record.getMessage()
    assert "secret" not in record.getMessage()

    file.write_text("second")
    assert lets_in(keys, "first", "second") == [False, True]


def test_keys_from_a_pipe_are_read_once() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"first\n")
    os.close(writing)
    keys = Keys([], f"/dev/fd/{reading}")

    assert lets_in(keys, "first", "first", "other") == [True, True, False]
    os.close(reading)
    assert lets_in(keys, "first") == [True]


@pytest.mark.parametrize("content", [None, b"secret\xff", b"secret" * 200_000])
def test_a_file_that_cannot_be_read_is_a_bad_option(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadOption, match=r"--api-key-file: cannot read .*/file: ") as caught:
        Keys([], str(file))

    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


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
        after = await client.get("/v1/models", headers=headers)

    assert (before.status_code, after.status_code) == (401, 200)


# -- whose key it was


def test_a_key_has_an_id_that_stays_and_tells_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first\nsecond")
    keys = Keys(["fixed", "fixed"], str(file))
    ids = [keys.identify(f"Bearer {key}") for key in ("fixed", "first", "second")]

    assert len(set(ids)) == 3
    assert all(one is not None and len(one) == 32 for one in ids)
    file.write_text("third\nsecond\nfirst")
    assert [keys.identify(f"Bearer {key}") for key in ("fixed", "first", "second")] == ids
    assert Keys([], None).identify(None) == ""


async def cached(client: httpx.AsyncClient, key: str, body: dict[str, Any]) -> int:
    """How many tokens of a prompt came from the cache."""
    headers = {"Authorization": f"Bearer {key}"}
    prompt = {"prompt": [7] * 64, "max_tokens": 1}
    answer = (await client.post(COMPLETIONS, json=prompt | body, headers=headers)).json()
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


@pytest.mark.anyio
async def test_what_one_key_has_sent_no_other_can_find_out(tiny_folder: Path) -> None:
    app = make_app(lambda: tiny_core(tiny_folder), api_key="one,two")
    async with asgi_client(app) as client:
        assert await cached(client, "one", {}) == 0
        assert await cached(client, "one", {}) > 0
        assert await cached(client, "two", {}) == 0
        assert await cached(client, "two", {"cache_salt": "s"}) == 0
        assert await cached(client, "one", {"cache_salt": "s"}) == 0
        assert await cached(client, "one", {"cache_salt": "s"}) > 0
        # Nor by a salt that looks like the other key's.
        one, two = (app.state.server.keys.identify(f"Bearer {key}") for key in ("one", "two"))
        for salt in (one, one + "s", one[:-1], two + one):
            assert await cached(client, "two", {"cache_salt": salt}) == 0

        chat = {"messages": [{"role": "user", "content": "the hen and the egg " * 8}]}
        explained = {"prompt": [9] * 64}
        for path, body in ((CHAT, chat | {"max_tokens": 1}), ("/v1/explain", explained)):
            for key in ("one", "two"):
                headers = {"Authorization": f"Bearer {key}"}
                answer = (await client.post(path, json=body, headers=headers)).json()
                assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert await cached(client, "one", {"prompt": [9] * 64}) > 0  # what it has had explained
        assert await cached(client, "two", {"prompt": [9] * 65, "cache_salt": one}) == 0


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ({"api_key": "one,two", "share_prefix_cache": True}, True),
        ({"api_key": "one,one"}, True),
        ({"api_key": "one"}, True),
        ({"api_key": "one", "api_key_file": "keys"}, False),
    ],
)
async def test_keys_share_their_prefixes_if_they_may(
    tiny_folder: Path, tmp_path: Path, options: dict[str, Any], shared: bool
) -> None:
    if "api_key_file" in options:
        options["api_key_file"] = str(tmp_path / "keys")
        (tmp_path / "keys").write_text("two")
    app = make_app(lambda: tiny_core(tiny_folder), **options)
    async with asgi_client(app) as client:
        assert await cached(client, "one", {}) == 0
        other = "two" if "two" in str(options) or not shared else "one"
        assert (await cached(client, other, {}) > 0) is shared
