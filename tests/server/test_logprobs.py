"""Logprobs in all their forms, against `transformers` on the same weights."""

import math
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from engine.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.engines import info, scripted_core, tiny_core
from tests.support.scripted import ScriptedModel, constant
from tests.support.servers import asgi_client, make_app
from tests.support.wire import CHAT, COMPLETIONS

PROMPT = [68, 87, 76, 3, 72, 81, 70]
EOS = 2
LETTERS = list(range(3, 98))  # each a character of its own


@pytest.fixture(scope="module")
def reference() -> Any:
    """The served model in `transformers`."""
    return tiny.hf_model("llama")


def oracle(model: Any, ids: Sequence[int]) -> Tensor:
    """Row i: the logprobs of what follows token i, [len, vocabulary]."""
    with torch.inference_mode():
        logits = model(torch.tensor([list(ids)])).logits[0].double()
    return torch.log_softmax(logits, dim=-1)


def ask(client: httpx.Client, path: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"max_tokens": 5, "seed": 4, "return_token_ids": True}
    given |= {"prompt": PROMPT} if path == COMPLETIONS else {}
    response = client.post(path, json=given | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


# -- the legacy arrays


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_generated_tokens_have_the_models_own_logprobs(
    client: httpx.Client, tokenizer: Tokenizer, reference: Any, count: int
) -> None:
    shaped = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3, "logit_bias": {"90": 3}}
    shaped |= {"allowed_token_ids": LETTERS}

    (choice,) = ask(client, logprobs=count, **shaped)["choices"]

    ids, logprobs = choice["token_ids"], choice["logprobs"]
    rows = oracle(reference, PROMPT + ids)[len(PROMPT) - 1 :]
    assert len(ids) == 5
    assert logprobs.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    for i, token_id in enumerate(ids):
        own = logprobs["token_logprobs"][i]
        assert own == pytest.approx(rows[i, token_id].item(), abs=1e-4)
        top = logprobs["top_logprobs"][i]
        expected: dict[str, float] = {}
        for listed in [*rows[i].topk(count)[1].tolist(), token_id]:
            expected.setdefault(tokenizer.text_of(listed), rows[i, listed].item())
        assert top == pytest.approx(expected, abs=1e-4)
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert top[tokenizer.text_of(token_id)] == own  # the very same float


def test_echo_without_generating_scores_the_prompt(
    client: httpx.Client, tokenizer: Tokenizer, reference: Any
) -> None:
    answer = ask(client, echo=True, logprobs=3, max_tokens=0)

    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    rows = oracle(reference, PROMPT)
    texts = [tokenizer.text_of(token_id) for token_id in PROMPT]
    assert logprobs["tokens"] == texts
    assert choice["text"] == "".join(texts)
    assert logprobs["text_offset"] == [len("".join(texts[:i])) for i in range(len(PROMPT))]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for i in range(1, len(PROMPT)):
        own = rows[i - 1, PROMPT[i]].item()
        assert logprobs["token_logprobs"][i] == pytest.approx(own, abs=1e-4)
        assert len(logprobs["top_logprobs"][i]) in (3, 4)
        best = rows[i - 1].max().item()
        assert max(logprobs["top_logprobs"][i].values()) == pytest.approx(best, abs=1e-4)
    assert all(len(array) == len(PROMPT) for array in logprobs.values())
    assert answer["usage"]["completion_tokens"] == 0


def test_echo_with_tokens_has_the_prompt_and_then_the_generated_ones(
    client: httpx.Client, reference: Any
) -> None:
    (choice,) = ask(client, echo=True, logprobs=1, allowed_token_ids=LETTERS)["choices"]

    ids = PROMPT + choice["token_ids"]
    logprobs = choice["logprobs"]
    rows = oracle(reference, ids)
    expected = [rows[i - 1, ids[i]].item() for i in range(1, len(ids))]
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    assert "".join(logprobs["tokens"]) == choice["text"]
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_a_generated_end_token_is_there_like_any_other(client: httpx.Client) -> None:
    (choice,) = ask(client, echo=True, logprobs=1, max_tokens=1, logit_bias={"2": 100})["choices"]

    logprobs = choice["logprobs"]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == [EOS]
    assert all(len(array) == len(PROMPT) + 1 for array in logprobs.values())
    assert logprobs["tokens"][-1] == "</s>"
    assert "</s>" in logprobs["top_logprobs"][-1]
    assert logprobs["text_offset"][-1] == len(choice["text"])
    assert choice["text"] == "".join(logprobs["tokens"][:-1])


def test_a_stopped_string_is_in_the_tokens_but_not_in_the_text(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    letters = sorted(set(tokenizer.encode("abc", add_special_tokens=False)))
    body = {"allowed_token_ids": letters, "stop": ["ab", "bc", "ca"], "max_tokens": 60}

    (choice,) = ask(client, logprobs=0, **body)["choices"]

    assert choice["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] + choice["stop_reason"]


def test_a_split_character_belongs_to_the_token_that_completes_it(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("a😀é", add_special_tokens=False)

    (choice,) = ask(client, prompt=ids, echo=True, logprobs=0, max_tokens=0)["choices"]

    assert choice["text"] == "a😀é"
    assert choice["logprobs"]["tokens"] == ["a", "", "", "", "😀", "", "é"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 1, 2, 2]


def test_special_tokens_have_no_width_unless_they_are_shown(client: httpx.Client) -> None:
    body = {"prompt": [1, 68, 2, 69], "echo": True, "logprobs": 0, "max_tokens": 0}

    (hidden,) = ask(client, **body)["choices"]
    (shown,) = ask(client, **body, skip_special_tokens=False)["choices"]

    assert hidden["logprobs"]["tokens"] == shown["logprobs"]["tokens"] == ["<s>", "a", "</s>", "b"]
    assert (hidden["text"], hidden["logprobs"]["text_offset"]) == ("ab", [0, 0, 1, 1])
    assert (shown["text"], shown["logprobs"]["text_offset"]) == ("<s>a</s>b", [0, 3, 4, 8])


def test_tokens_can_be_named_by_their_ids(client: httpx.Client) -> None:
    (choice,) = ask(client, logprobs=2, return_tokens_as_token_ids=True)["choices"]

    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert token in top
        assert all(name.startswith("token_id:") for name in top)


@pytest.mark.anyio
async def test_of_tokens_with_the_same_text_the_likelier_one_is_listed(
    tokenizer: Tokenizer,
) -> None:
    first, second = 106, 107  # two bytes that are no character on their own
    assert tokenizer.text_of(first) == tokenizer.text_of(second) == "\ufffd"
    logits = [0.0] * 128
    logits[first], logits[second] = 5.0, 6.0
    core = scripted_core(ScriptedModel(constant(logits)), tokenizer)
    body = {"prompt": [first, second], "max_tokens": 0, "echo": True, "logprobs": 2}
    async with asgi_client(make_app(lambda: (core, info(core)))) as client:
        answer = (await client.post(COMPLETIONS, json=body)).json()

    (_, top) = answer["choices"][0]["logprobs"]["top_logprobs"]
    likeliest = torch.log_softmax(torch.tensor(logits), 0)[second].item()
    assert max(top.values()) == pytest.approx(likeliest)


@pytest.mark.anyio
async def test_impossible_tokens_get_the_lowest_number_json_can_hold(tokenizer: Tokenizer) -> None:
    logits = [0.0] * 127 + [-math.inf]
    core = scripted_core(ScriptedModel(constant(logits)), tokenizer)
    body = {"prompt": [5, 127], "max_tokens": 0, "echo": True, "logprobs": 0}
    async with asgi_client(make_app(lambda: (core, info(core)))) as client:
        answer = (await client.post(COMPLETIONS, json=body)).json()

    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -9999.0]


@pytest.mark.anyio
async def test_the_whole_vocabulary_needs_a_server_that_allows_it(
    tiny_folder: Any, tokenizer: Tokenizer
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1, "logprobs": -1, "return_tokens_as_token_ids": True}
    async with asgi_client(make_app(lambda: tiny_core(tiny_folder), max_logprobs=-1)) as client:
        answer = (await client.post(COMPLETIONS, json=body)).json()

    assert len(answer["choices"][0]["logprobs"]["top_logprobs"][0]) == tokenizer.size == 128


# -- prompt_logprobs


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("count", [0, 2])
def test_prompt_logprobs_rank_each_prompt_token(
    client: httpx.Client, tokenizer: Tokenizer, reference: Any, path: str, count: int
) -> None:
    messages = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {}

    answer = ask(client, path, prompt_logprobs=count, **messages)

    holder = answer if path == CHAT else answer["choices"][0]
    ids = holder["prompt_token_ids"]
    rows = oracle(reference, ids)
    first, *entries = holder["prompt_logprobs"]
    assert first is None
    assert len(entries) == len(ids) - 1
    for i, entry in enumerate(entries):
        rank = int((rows[i] > rows[i, ids[i + 1]]).sum()) + 1
        listed = {*rows[i].topk(count)[1].tolist(), ids[i + 1]}
        assert entry.keys() == {str(token_id) for token_id in listed}
        own = entry[str(ids[i + 1])]
        assert own["rank"] == rank
        assert own["logprob"] == pytest.approx(rows[i, ids[i + 1]].item(), abs=1e-4)
        assert own["decoded_token"] == tokenizer.text_of(ids[i + 1])


def test_prompt_logprobs_are_there_for_each_choice_of_each_prompt(client: httpx.Client) -> None:
    answer = ask(client, prompt=[[5, 6, 7], [8]], n=2, prompt_logprobs=1, logprobs=3, echo=True)

    lengths = [len(choice["prompt_logprobs"]) for choice in answer["choices"]]
    assert lengths == [3, 3, 1, 1]
    for choice in answer["choices"]:
        assert all(entry is None or len(entry) <= 2 for entry in choice["prompt_logprobs"])
        tops = choice["logprobs"]["top_logprobs"][1:]
        assert all(len(top) in (3, 4) for top in tops)


# -- chat


def test_chat_logprobs_list_exactly_the_best(
    client: httpx.Client, tokenizer: Tokenizer, reference: Any
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True}
    for count in (0, 1, 5, 20):
        answer = ask(client, CHAT, **body, top_logprobs=count, temperature=1.5)
        (choice,) = answer["choices"]
        prompt = answer["prompt_token_ids"]
        rows = oracle(reference, prompt + choice["token_ids"])[len(prompt) - 1 :]
        assert choice["logprobs"]["refusal"] is None
        content = choice["logprobs"]["content"]
        assert len(content) == len(choice["token_ids"])
        for row, token_id, entry in zip(rows, choice["token_ids"], content, strict=False):
            assert entry["token"] == tokenizer.text_of(token_id)
            assert entry["logprob"] == pytest.approx(row[token_id].item(), abs=1e-4)
            values, best = row.topk(count)
            listed = entry["top_logprobs"]
            assert [top["token"] for top in listed] == [tokenizer.text_of(i) for i in best]
            assert [top["logprob"] for top in listed] == pytest.approx(values.tolist(), abs=1e-4)


def test_chat_logprobs_show_the_bytes_of_half_a_character(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("é", add_special_tokens=False)
    body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 0}

    (choice,) = ask(client, CHAT, **body, allowed_token_ids=[ids[0]], max_tokens=1)["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("\ufffd", [0xC3])
    assert choice["message"]["content"] == "\ufffd"

    (choice,) = ask(client, CHAT, **body, allowed_token_ids=[EOS], max_tokens=1)["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("</s>", None)
    assert choice["message"]["content"] == ""
