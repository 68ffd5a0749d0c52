"""Models and tokenizer over HTTP."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.tokenizer import Tokenizer
from server.app import create_app
from server.config import ServerConfig
from tests.support.engines import tiny_core
from tests.support.servers import asgi_client

NAMES = ["tiny", "org/tiny-alias"]
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def aliased(tiny_folder: Path) -> Any:
    """A client of a server with two names for its model."""
    config = ServerConfig(drain_delay=0)
    async with asgi_client(create_app(lambda: tiny_core(tiny_folder), config, NAMES)) as client:
        yield client


@pytest.mark.anyio
async def test_every_name_is_listed_and_can_be_retrieved(aliased: httpx.AsyncClient) -> None:
    listed = (await aliased.get("/v1/models")).json()

    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == NAMES
    for entry in listed["data"]:
        assert entry.pop("created") > 1_700_000_000
        assert entry == {
            "id": entry["id"],
            "object": "model",
            "owned_by": "logitmill",
            "root": "tiny",
            "parent": None,
            "max_model_len": 256,
        }
        retrieved = await aliased.get(f"/v1/models/{entry['id']}")
        assert retrieved.status_code == 200
        assert retrieved.json() | {"created": 0} == entry | {"created": 0}


@pytest.mark.anyio
async def test_both_names_are_served_and_the_first_one_answers(aliased: httpx.AsyncClient) -> None:
    for name in (*NAMES, None):
        body = {"model": name, "prompt": "a", "max_tokens": 1}
        assert (await aliased.post("/v1/completions", json=body)).json()["model"] == "tiny"
    wrong = await aliased.post("/v1/completions", json={"model": "tiny-alias", "prompt": "a"})
    assert wrong.status_code == 404
    assert "org/tiny-alias" in wrong.json()["error"]["message"]


def test_another_model_is_not_found(client: httpx.Client) -> None:
    for name in ("other", "org/other", "tin"):
        response = client.get(f"/v1/models/{name}")
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("model", "model_not_found")


# -- the tokenizer


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_text_becomes_tokens(client: httpx.Client, tokenizer: Tokenizer, path: str) -> None:
    body: dict[str, Any] = {"prompt": "the hé"}
    expected = {
        "count": 6,
        "max_model_len": 256,
        "tokens": tokenizer.encode("the hé"),
        "token_strs": None,
    }

    assert client.post(path, json=body).json() == expected
    assert client.post(path, json=body | {"model": "tiny"}).json() == expected
    strings = client.post(path, json=body | {"return_token_strs": True}).json()["token_strs"]
    assert strings == ["th", "e", " ", "h", "\ufffd", "\ufffd"]


def test_messages_become_tokens(client: httpx.Client, tokenizer: Tokenizer) -> None:
    for extra, text in (
        ({}, "user: hi\nassistant: "),
        ({"add_generation_prompt": False}, "user: hi\n"),
    ):
        answer = client.post("/tokenize", json={"messages": HELLO} | extra).json()
        assert tokenizer.decode(answer["tokens"]) == text
        assert answer["count"] == len(answer["tokens"])


def test_a_text_longer_than_the_context_can_be_tokenized(client: httpx.Client) -> None:
    assert client.post("/tokenize", json={"prompt": "ab" * 30_000}).json()["count"] == 60_000
    assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


@pytest.mark.parametrize(
    "body", [{}, {"prompt": None}, {"prompt": "a", "messages": HELLO}, {"model": "tiny"}]
)
def test_exactly_one_of_text_and_messages_is_needed(
    client: httpx.Client, body: dict[str, Any]
) -> None:
    response = client.post("/tokenize", json=body)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert "messages" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
def test_tokens_become_text(client: httpx.Client, tokenizer: Tokenizer, path: str) -> None:
    for text in ("the hen", "a😀é</s>", ""):
        tokens = tokenizer.encode(text)
        assert client.post(path, json={"tokens": tokens}).json() == {"prompt": text}
        floats = {"tokens": [float(token) for token in tokens]}
        assert client.post(path, json=floats).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("tokens", "param", "code"),
    [
        ([5, 128], "tokens[1]", "invalid_token_id"),
        ([-1], "tokens[0]", "invalid_token_id"),
        ([10**30], "tokens[0]", "invalid_token_id"),
        ([5, "6"], "tokens[1]", "invalid_type"),
        ([1.5], "tokens[0]", "invalid_type"),
        ([True], "tokens[0]", "invalid_type"),
        ("5", "tokens", "invalid_type"),
        (None, "tokens", "missing_required_parameter"),
    ],
)
def test_what_is_not_a_token_id_is_refused(
    client: httpx.Client, tokens: Any, param: str, code: str
) -> None:
    response = client.post("/detokenize", json={"tokens": tokens})

    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)


def test_a_remote_tokenizer_learns_what_it_needs(client: httpx.Client) -> None:
    answer = client.get("/tokenizer_info").json()

    assert answer["tokenizer_class"]
    assert answer["chat_template"].startswith("{% for message in messages %}")
    assert (answer["bos_token"], answer["eos_token"], answer["pad_token"]) == (
        "<s>",
        "</s>",
        "<pad>",
    )


def test_the_version_is_shown(client: httpx.Client) -> None:
    version = client.get("/version").json()["version"]

    assert version.count(".") == 2
