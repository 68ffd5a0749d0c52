"""What goes over the wire: events read strictly, and chunks put together to a whole answer."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import httpx

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
REPORTS = ("cumulative_logprob", "sequence_score", "num_expansions", "cot", "sed")


def events(content: bytes) -> list[dict[str, Any]]:
    """The chunks of a whole stream, which must be in the form that every client understands."""
    assert content.endswith(b"\n\n")
    *blocks, end = content.removesuffix(b"\n\n").split(b"\n\n")
    assert end == b"data: [DONE]"
    blocks = [block for block in blocks if block != b": keep-alive"]
    assert all(block.startswith(b"data: {") and b"\n" not in block for block in blocks)
    return [json.loads(block.removeprefix(b"data: ")) for block in blocks]


def post_stream(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Ask for a stream and read it to its end."""
    response = client.post(path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    return events(response.content)


def assembled(chunks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Chunks as the answer they stand for, having checked what must hold of each of them.

    Left out are `object` and, if the stream carried no usage, `usage`.
    """
    chunks = list(chunks)
    for name in ("id", "object", "created", "model", "system_fingerprint"):
        assert len({chunk[name] for chunk in chunks}) == 1
    whole: dict[str, Any] = {
        name: chunks[0][name] for name in ("id", "created", "model", "system_fingerprint")
    }
    if "prompt_token_ids" in chunks[0]:
        whole["prompt_token_ids"] = chunks[0]["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    last = chunks[-1]
    if not last["choices"]:
        whole["usage"] = last["usage"]
        chunks.pop()
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    parts: dict[int, list[dict[str, Any]]] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        parts.setdefault(choice["index"], []).append(choice)
    is_chat = last["object"] == "chat.completion.chunk"
    join = _chat_choice if is_chat else _completion_choice
    whole["choices"] = [_joined(parts[index], join) for index in sorted(parts)]
    return whole


def comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """An unstreamed answer without what differs between two answers to the same request."""
    return {name: value for name, value in answer.items() if name not in ("id", "created")} | {
        "object": None
    }


def _joined(
    parts: list[dict[str, Any]], join: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> dict[str, Any]:
    assert [part["finish_reason"] is not None for part in parts] == [False] * (len(parts) - 1) + [
        True
    ]
    choice = {
        "index": parts[0]["index"],
        "finish_reason": parts[-1]["finish_reason"],
        "stop_reason": parts[-1]["stop_reason"],
        **join(parts),
    }
    assert not any(name in part for part in parts[:-1] for name in REPORTS)
    choice |= {name: parts[-1][name] for name in REPORTS if name in parts[-1]}
    if any("token_ids" in part for part in parts):
        choice["token_ids"] = [i for part in parts for i in part.get("token_ids", [])]
    return choice


def _completion_choice(parts: list[dict[str, Any]]) -> dict[str, Any]:
    for part in parts:
        tokens = part.get("token_ids") or (part["logprobs"] and part["logprobs"]["tokens"])
        assert part["text"] or part["finish_reason"] or tokens, "a chunk without news"
    first, *others = parts
    assert not any("prompt_token_ids" in part for part in others)
    kept = {name: first[name] for name in ("prompt_token_ids",) if name in first}
    listed = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    logprobs = {name: [entry for one in listed for entry in one[name]] for name in names}
    return kept | {
        "text": "".join(part["text"] for part in parts),
        "logprobs": logprobs if listed else None,
    }


def _chat_choice(parts: list[dict[str, Any]]) -> dict[str, Any]:
    first, *middle, end = parts
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert end["delta"] == {}
    for part in middle:
        tokens = part.get("token_ids") or (part["logprobs"] and part["logprobs"]["content"])
        assert part["delta"].keys() == {"content"}
        assert part["delta"]["content"] or tokens, "a chunk without news"
    listed = [part["logprobs"]["content"] for part in middle if part["logprobs"] is not None]
    return {
        "message": {
            "role": "assistant",
            "content": "".join(part["delta"]["content"] for part in middle),
            "refusal": None,
        },
        "logprobs": {"content": [entry for one in listed for entry in one], "refusal": None}
        if listed
        else None,
    }
