"""JSON that is written a little at a time is the JSON that it would be at once."""

import json
import random
from typing import Any

import httpx
import pytest

from server.whole import Each, parts_of, pieces
from tests.support.wire import CHAT, COMPLETIONS, post_stream

ALPHABET = ["a", '"', "\\", "é", "😀", "\n", "\x00", "/"]


def some_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 4 else 5)
    match kind:
        case 0:
            return rng.choice([None, True, False])
        case 1:
            return rng.randint(-(10**12), 10**12)
        case 2:
            return rng.gauss(0, 10 ** rng.randint(-8, 8))
        case 3 | 4:
            return "".join(rng.choices(ALPHABET, k=rng.randint(0, 5)))
        case 5:
            return [rng.randint(0, 9) for _ in range(rng.choice([0, 1, 5, 3000]))]
        case 6:
            return [some_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
        case _:
            return {str(key): some_value(rng, depth + 1) for key in range(rng.randint(0, 4))}


@pytest.mark.parametrize("seed", range(300))
def test_pieces_are_the_whole(seed: int) -> None:
    value = {"value": some_value(random.Random(seed))}
    want = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert "".join(pieces(value)) == want


def test_entries_are_made_as_they_are_written() -> None:
    made: list[int] = []

    def entries() -> Any:
        for number in range(5):
            made.append(number)
            yield {"number": number}

    written = pieces({"a": Each(entries), "b": Each(lambda: [])})
    for _ in range(3):
        next(written)
    assert made == [0]
    rest = "".join(written)
    assert made == [0, 1, 2, 3, 4]
    assert rest.endswith('{"number":4}],"b":[]}')


def test_what_json_cannot_hold_is_an_error() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(pieces({"a": float("nan")}))


@pytest.mark.anyio
async def test_long_answers_come_in_parts() -> None:
    parts = await parts_of({"numbers": list(range(100_000)), "é": "é" * 10})
    assert len(parts) > 5
    assert json.loads(b"".join(parts))["numbers"][-1] == 99_999


def test_a_long_answer_is_the_same_streamed_or_not(client: httpx.Client) -> None:
    """Prompt and output are longer than what is formatted in one go."""
    body = {"prompt": [5, 6, 7] * 30, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    body |= {"echo": True, "logprobs": 5, "return_token_ids": True, "n": 2, "trace": {"top": 3}}
    response = client.post(COMPLETIONS, json=body)
    assert response.status_code == 200
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.headers["content-type"] == "application/json"
    whole = response.json()["choices"]
    chunks = post_stream(client, COMPLETIONS, body)
    for index in range(2):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        for name in names:
            parts = [one["logprobs"][name] for one in own if one["logprobs"]]
            assert [entry for part in parts for entry in part] == whole[index]["logprobs"][name]
        assert len(whole[index]["logprobs"]["tokens"]) == 150
        traces = [trace for one in own for trace in one["trace"]]
        assert traces == whole[index]["trace"]


@pytest.mark.parametrize("few", [0, 30, 10_000])
@pytest.mark.parametrize("chat", [False, True])
def test_tokens_that_list_much_are_written_a_little_at_a_time(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, chat: bool, few: int
) -> None:
    """Streamed or not, the same as in one go."""
    listed = {"trace": {"top": 20, "layers": [0, 1]}, "temperature": 0, "max_tokens": 3}
    if chat:
        path, body = CHAT, {"messages": [{"role": "user", "content": "a"}], "logprobs": True}
        body |= {"top_logprobs": 4}
    else:
        path, body = COMPLETIONS, {"prompt": "a", "logprobs": 4}
    want = client.post(path, json=body | listed).json()["choices"][0]
    monkeypatch.setattr("server.answers._FEW", few)
    whole = client.post(path, json=body | listed).json()["choices"][0]
    assert whole == want
    chunks = post_stream(client, path, body | listed)
    traces = [trace for chunk in chunks for trace in chunk["choices"][0].get("trace", [])]
    assert traces == want["trace"]
    assert len(traces[0]["layers"]) == 2
