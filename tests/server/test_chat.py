"""POST /v1/chat/completions: messages, templates, answers."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.engines import tiny_core
from tests.support.servers import asgi_client, make_app
from tests.support.wire import CHAT

USER = {"role": "user", "content": "hi"}


def ask(client: httpx.Client, *messages: dict[str, Any], **body: Any) -> dict[str, Any]:
    """The answer to a greedy request of four tokens, unless told otherwise."""
    given = {"messages": list(messages) or [USER], "max_tokens": 4, "temperature": 0}
    response = client.post(CHAT, json=given | {"ignore_eos": True} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def error(client: httpx.Client, *messages: Any, **body: Any) -> dict[str, Any]:
    response = client.post(CHAT, json={"messages": list(messages) or [USER]} | body)
    assert response.status_code == 400, response.text
    found: dict[str, Any] = response.json()["error"]
    return found


def prompt_of(client: httpx.Client, tokenizer: Tokenizer, *messages: Any, **body: Any) -> str:
    """The rendered messages, as the model gets them."""
    answer = ask(client, *messages, return_token_ids=True, **body)
    assert answer["usage"]["prompt_tokens"] == len(answer["prompt_token_ids"])
    return tokenizer.decode(answer["prompt_token_ids"])


def test_an_answer_has_exactly_the_fields_of_the_contract(client: httpx.Client) -> None:
    answer = ask(client, request_id="r-1", cache_salt="fields")

    assert answer.pop("created") > 1_700_000_000
    assert answer.pop("system_fingerprint").startswith("fp_")
    assert answer["choices"][0]["message"].pop("content")
    assert answer == {
        "id": "chatcmpl-r-1",
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 18,
            "completion_tokens": 4,
            "total_tokens": 22,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


# -- messages


def test_messages_go_through_the_models_template(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "content": "hello"},
        {"role": "tool", "content": "5"},
        USER,
    ]

    prompt = prompt_of(client, tokenizer, *messages)

    assert prompt == "system: be kind\nuser: hi\nassistant: hello\ntool: 5\nuser: hi\nassistant: "


def test_developer_is_another_name_for_system(client: httpx.Client, tokenizer: Tokenizer) -> None:
    message = {"role": "developer", "content": "be kind"}

    assert prompt_of(client, tokenizer, message) == "system: be kind\nassistant: "


def test_content_may_come_in_parts(client: httpx.Client, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]

    prompt = prompt_of(client, tokenizer, {"role": "user", "content": parts})

    assert prompt == "user: hello\nassistant: "
    assert prompt_of(client, tokenizer, {"role": "user", "content": []}) == "user: \nassistant: "


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        ([{"role": "robot", "content": "a"}], "messages[0].role", "invalid_value"),
        ([USER, {"role": 5, "content": "a"}], "messages[1].role", "invalid_type"),
        ([USER, {"content": "a"}], "messages[1].role", "missing_required_parameter"),
        ([USER, "hi"], "messages[1]", "invalid_type"),
        ([{"role": "user"}], "messages[0]", "missing_required_parameter"),
        ([{"role": "user", "content": None}], "messages[0]", "missing_required_parameter"),
        ([{"role": "assistant"}], "messages[0]", "missing_required_parameter"),
        ([{"role": "user", "content": 5}], "messages[0].content", "invalid_type"),
        ([{"role": "user", "content": {"type": "text"}}], "messages[0].content", "invalid_type"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]", "invalid_type"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 5}]}],
            "messages[0].content[0].text",
            "invalid_type",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages[0].content[0]",
            "missing_required_parameter",
        ),
        (
            [
                USER,
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "image_url"}],
                },
            ],
            "messages[1].content[1].type",
            "unsupported_parameter",
        ),
    ],
)
def test_the_part_of_a_message_that_is_wrong_is_named(
    client: httpx.Client, messages: list[Any], param: str, code: str
) -> None:
    found = error(client, *messages)

    assert (found["param"], found["code"]) == (param, code)


# -- how the prompt ends


def test_the_prompt_ends_where_the_answer_begins(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    prefix = {"role": "assistant", "content": "he"}

    def prompt(*messages: dict[str, Any], **body: Any) -> str:
        return prompt_of(client, tokenizer, *messages, **body)

    assert prompt(USER) == "user: hi\nassistant: "
    assert prompt(USER, add_generation_prompt=False) == "user: hi\n"
    assert prompt(USER, prefix, continue_final_message=True) == "user: hi\nassistant: he"


def test_special_tokens_are_left_to_the_template(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    written = {"role": "user", "content": "a</s>b"}

    assert prompt_of(client, tokenizer, written) == "user: a</s>b\nassistant: "
    assert 2 in ask(client, written, return_token_ids=True)["prompt_token_ids"]


# -- length


def test_the_newer_name_of_max_tokens_goes_before_the_older(client: httpx.Client) -> None:
    counts = [
        ask(client, **limits)["usage"]["completion_tokens"]
        for limits in (
            {"max_completion_tokens": 3},
            {"max_completion_tokens": 3, "max_tokens": 9},
            {"max_completion_tokens": 9, "max_tokens": 3},
            {"max_completion_tokens": None, "max_tokens": 3},
        )
    ]

    assert counts == [3, 3, 9, 3]


def test_without_a_limit_the_rest_of_the_context_is_used(client: httpx.Client) -> None:
    answer = ask(client, max_tokens=None)

    assert answer["usage"]["total_tokens"] == 256
    assert answer["choices"][0]["finish_reason"] == "length"


# -- choices


def test_choices_are_independent_and_reproducible(client: httpx.Client) -> None:
    body = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    several, again = (ask(client, n=3, **body)["choices"] for _ in range(2))

    assert several == again
    assert [choice["index"] for choice in several] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in several}) == 3
    assert several[0] == ask(client, **body)["choices"][0]


def test_stop_strings_work_as_on_the_other_route(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    letters = sorted(set(tokenizer.encode("ab", add_special_tokens=False)))
    body = {"allowed_token_ids": letters, "temperature": 1.0, "seed": 1, "max_tokens": 50}

    (choice,) = ask(client, stop=["aab", "bba"], return_token_ids=True, **body)["choices"]

    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] in ("aab", "bba")
    text = tokenizer.decode(choice["token_ids"])
    assert text == choice["message"]["content"] + choice["stop_reason"]


# -- tools and templates


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("chat_template", "{{ messages }}"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: httpx.Client, field: str, value: Any
) -> None:
    found = error(client, **{field: value})

    assert (found["param"], found["code"]) == (field, "unsupported_parameter")
    assert field in found["message"]


def test_asking_for_no_tools_is_fine(client: httpx.Client) -> None:
    plain = ask(client)["choices"]

    for extra in ({"tools": []}, {"tools": None, "tool_choice": "none"}, {"tool_choice": None}):
        assert ask(client, **extra)["choices"] == plain


def test_a_message_the_template_cannot_render_is_the_clients_mistake(
    client: httpx.Client,
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    found = error(client, USER, {"role": "assistant", "tool_calls": [call]})

    assert (found["param"], found["code"]) == ("messages", "invalid_value")
    assert "template" in found["message"]


@pytest.mark.anyio
async def test_a_trusting_server_takes_templates_from_requests(
    tiny_folder: Path, tokenizer: Tokenizer
) -> None:
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ mood }}"
    template += "{% for d in documents %}<{{ d.title }}>{% endfor %}"
    body = {"messages": [USER, USER], "max_tokens": 1, "return_token_ids": True}
    body |= {"chat_template": template, "documents": [{"title": "t", "text": ""}]}
    body |= {"chat_template_kwargs": {"mood": "calm"}}
    broken = body | {"chat_template": "{% for %}"}
    app = make_app(lambda: tiny_core(tiny_folder), trust_request_templates=True)
    async with asgi_client(app) as client:
        answer = (await client.post(CHAT, json=body)).json()
        refused = await client.post(CHAT, json=broken)

    assert tokenizer.decode(answer["prompt_token_ids"]) == "[hi][hi]calm<t>"
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "chat_template"


@pytest.mark.anyio
async def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    tiny.save(tiny.hf_model("llama"), tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    async with asgi_client(make_app(lambda: tiny_core(tmp_path))) as client:
        response = await client.post(CHAT, json={"messages": [USER]})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert "/v1/completions" in response.json()["error"]["message"]
