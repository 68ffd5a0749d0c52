"""The OpenAPI document says what the validators do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.params import INT64
from tests.support.engines import tiny_core
from tests.support.servers import asgi_client, make_app


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    response = client.get("/openapi.json")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """Every object in a document."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list):
            yield from walk(child)


def test_every_route_is_described(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.")
    assert document["info"]["title"] == "logitmill"
    assert {
        (path, method) for path, methods in document["paths"].items() for method in methods
    } == {
        ("/v1/completions", "post"),
        ("/v1/chat/completions", "post"),
        ("/v1/explain", "post"),
        ("/v1/models", "get"),
        ("/v1/models/{model}", "get"),
        ("/tokenize", "post"),
        ("/v1/tokenize", "post"),
        ("/detokenize", "post"),
        ("/v1/detokenize", "post"),
        ("/tokenizer_info", "get"),
        ("/health", "get"),
        ("/ping", "get"),
        ("/ready", "get"),
        ("/live", "get"),
        ("/version", "get"),
        ("/metrics", "get"),
    }


def test_operations_have_ids_of_their_own_and_never_answer_422(document: dict[str, Any]) -> None:
    operations = [one for methods in document["paths"].values() for one in methods.values()]

    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids)
    for operation in operations:
        assert operation["responses"].keys() == {"200", "4XX", "5XX"}
        assert operation["summary"]
    assert "ValidationError" not in document["components"]["schemas"]


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    references = {node["$ref"] for node in walk(document) if "$ref" in node}

    assert references
    assert references <= {f"#/components/schemas/{name}" for name in schemas}


def test_types_are_those_of_json_schema(document: dict[str, Any]) -> None:
    known = {"string", "integer", "number", "boolean", "array", "object", "null"}
    for schema in walk(document["components"]["schemas"]):
        if isinstance(schema.get("type"), str):
            assert schema["type"] in known
        assert not schema.keys() & {"ge", "gt", "le", "lt"}


BOUNDS: dict[str, dict[str, float]] = {
    "temperature": {"minimum": 0, "maximum": 2},
    "top_p": {"minimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "typical_p": {"exclusiveMinimum": 0, "maximum": 1},
    "epsilon_cutoff": {"minimum": 0, "exclusiveMaximum": 1},
    "repetition_penalty": {"exclusiveMinimum": 0},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "n": {"minimum": 1, "maximum": 128},
    "best_of": {"minimum": 1, "maximum": 128},
    "seed": {"minimum": -INT64, "exclusiveMaximum": INT64},
    "max_tokens": {"minimum": 0},
    "allowed_token_ids": {"minItems": 1},
    "bad_words": {"maxItems": 1024},
    "stop": {"maxItems": 64},
    "cache_salt": {"maxLength": 128},
}


@pytest.mark.parametrize(("name", "bounds"), BOUNDS.items())
def test_bounds_are_those_of_the_validators(
    document: dict[str, Any], name: str, bounds: dict[str, float]
) -> None:
    field = document["components"]["schemas"]["CompletionRequest"]["properties"][name]
    alternatives = [field, *field.get("anyOf", [])]

    assert any(bounds.items() <= one.items() for one in alternatives)
    assert field["description"]


def test_all_forms_of_a_prompt_are_in_the_document(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    integers = {"type": "array", "items": {"type": "integer"}}

    forms = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    assert forms == [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        integers,
        {"type": "array", "items": integers},
    ]
    assert schemas["ChatCompletionRequest"]["required"] == ["messages"]


@pytest.mark.anyio
@pytest.mark.parametrize(("docs", "status"), [(True, 200), (False, 404)])
async def test_the_pages_can_be_switched_off(tiny_folder: Path, docs: bool, status: int) -> None:
    app = make_app(lambda: tiny_core(tiny_folder), docs=docs, api_key="k")
    async with asgi_client(app) as client:
        headers = {"Authorization": "Bearer k"}
        for path in ("/docs", "/openapi.json"):
            assert (await client.get(path, headers=headers)).status_code == status
