"""POST /v1/completions: prompts, choices, usage."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers

from engine.tokenizer import Tokenizer
from server import __version__
from tests.support import tiny
from tests.support.engines import info, scripted_core, tiny_core
from tests.support.scripted import ScriptedModel, sequence
from tests.support.servers import asgi_client, live_server, make_app
from tests.support.wire import COMPLETIONS


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """The answer to a greedy request of four tokens, unless told otherwise."""
    given = {"prompt": "the hen", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    response = client.post(COMPLETIONS, json=given | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


# -- the answer


def test_an_answer_has_exactly_the_fields_of_the_contract(client: httpx.Client) -> None:
    answer = ask(client, request_id="r-1", cache_salt="fields")

    assert answer.pop("created") > 1_700_000_000
    assert answer.pop("system_fingerprint").startswith("fp_")
    assert answer["choices"][0].pop("text")
    assert answer == {
        "id": "cmpl-r-1",
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 4,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_the_prefix_cache_is_reported(client: httpx.Client) -> None:
    cached = [
        ask(client, prompt=[9] * 21, cache_salt="once")["usage"]["prompt_tokens_details"]
        for _ in range(2)
    ]

    assert cached == [{"cached_tokens": 0}, {"cached_tokens": 20}]


@pytest.mark.anyio
async def test_the_fingerprint_changes_with_what_can_change_the_output(tiny_folder: Path) -> None:
    prints = []
    for dtype, version in (("float32", "1"), ("float32", "1"), ("bfloat16", "1"), ("float32", "2")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("server.answers.__version__", version)
            app = make_app(lambda dtype=dtype: tiny_core(tiny_folder, dtype=dtype))
            async with asgi_client(app) as client:
                answer = await client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1})
                prints.append(answer.json()["system_fingerprint"])

    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert __version__ not in prints


# -- identity


def test_the_request_id_is_that_of_the_header_then_of_the_body_then_a_new_one(
    client: httpx.Client,
) -> None:
    def post(header: str | None, body_id: str | None) -> tuple[str, str]:
        headers = {} if header is None else {"X-Request-Id": header}
        body = {"prompt": "a", "max_tokens": 1, "request_id": body_id}
        response = client.post(COMPLETIONS, json=body, headers=headers)
        return response.json()["id"], response.headers["x-request-id"]

    assert post("head", "body") == ("cmpl-head", "head")
    assert post("head", None) == ("cmpl-head", "head")
    assert post(None, "body") == ("cmpl-body", "body")
    generated = [post(None, None) for _ in range(2)] + [post("not valid", None)]
    assert len(set(generated)) == 3
    assert all(answer_id == f"cmpl-{header}" for answer_id, header in generated)


def test_two_requests_may_have_the_same_id(client: httpx.Client) -> None:
    first, second = (ask(client, request_id="twin") for _ in range(2))

    assert first["id"] == second["id"]
    assert texts(first) == texts(second)


def test_the_model_may_be_named_or_left_out(client: httpx.Client) -> None:
    assert ask(client)["model"] == ask(client, model="tiny")["model"] == "tiny"


# -- prompts


def test_all_forms_of_a_prompt_give_the_same_answer(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("the hen")
    forms: list[Any] = ["the hen", ["the hen"], ids, [ids], [float(i) for i in ids]]

    answers = [ask(client, prompt=form) for form in forms]

    assert len({tuple(texts(answer)) for answer in answers}) == 1
    assert {answer["usage"]["prompt_tokens"] for answer in answers} == {len(ids)}


def test_choices_are_numbered_prompt_by_prompt(client: httpx.Client) -> None:
    prompts = ["the", "he said", "on a hen", "t"]
    alone = [
        ask(client, prompt=prompt, n=3, temperature=1, seed=5, max_tokens=6) for prompt in prompts
    ]

    together = ask(client, prompt=prompts, n=3, temperature=1, seed=5, max_tokens=6)

    assert [choice["index"] for choice in together["choices"]] == list(range(12))
    assert texts(together) == [text for answer in alone for text in texts(answer)]
    prompt_tokens = sum(answer["usage"]["prompt_tokens"] for answer in alone)
    assert together["usage"]["prompt_tokens"] == prompt_tokens  # once, not three times
    assert together["usage"]["completion_tokens"] == 4 * 3 * 6
    assert together["usage"]["total_tokens"] == prompt_tokens + 72


def test_an_empty_prompt_is_the_begin_token_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    tiny.save(tiny.hf_model("llama"), tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    with (
        live_server(make_app(lambda: tiny_core(tmp_path))) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        for prompt in ("", None, [""]):
            answer = ask(client, prompt=prompt, return_token_ids=True)
            assert answer["choices"][0]["prompt_token_ids"] == [1]
        with_begin = ask(client, prompt="a", return_token_ids=True)
        without = ask(client, prompt="a", return_token_ids=True, add_special_tokens=False)
        verbatim = ask(client, prompt=[68], return_token_ids=True)
        refused = client.post(COMPLETIONS, json={"prompt": "", "add_special_tokens": False})

    ids = [one["choices"][0]["prompt_token_ids"] for one in (with_begin, without, verbatim)]
    assert ids == [[1, 68], [68], [68]]
    assert refused.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, [7, 8, 9]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, [7, 8, 9]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [5, 6, 7]),
        ({"truncate": 2}, [8, 9]),
        ({"truncate_prompt_tokens": 99}, [5, 6, 7, 8, 9]),
        ({"truncate_prompt_tokens": -1}, [5, 6, 7, 8, 9]),
        ({"truncate_prompt_tokens": None}, [5, 6, 7, 8, 9]),
    ],
)
def test_a_prompt_is_truncated_on_the_chosen_side(
    client: httpx.Client, changes: dict[str, Any], kept: list[int]
) -> None:
    answer = ask(client, prompt=[5, 6, 7, 8, 9], return_token_ids=True, **changes)

    assert answer["choices"][0]["prompt_token_ids"] == kept
    assert answer["usage"]["prompt_tokens"] == len(kept)


def test_minus_one_truncates_to_the_context_but_one(client: httpx.Client) -> None:
    answer = ask(client, prompt=[5] * 400, truncate_prompt_tokens=-1, max_tokens=1)

    assert answer["usage"]["prompt_tokens"] == 255


# -- echo


def test_echo_puts_the_prompt_before_the_text(client: httpx.Client, tokenizer: Tokenizer) -> None:
    plain, echoed = ask(client, n=2), ask(client, n=2, echo=True)

    assert texts(echoed) == ["the hen" + text for text in texts(plain)]
    assert echoed["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    by_ids = ask(client, prompt=tokenizer.encode("the hen"), n=2, echo=True)
    assert texts(by_ids) == texts(echoed)


def test_without_tokens_to_generate_the_prompt_is_all_there_is(client: httpx.Client) -> None:
    answer = ask(client, max_tokens=0, echo=True)

    assert texts(answer) == ["the hen"]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert texts(ask(client, max_tokens=0)) == [""]


def test_half_a_character_at_the_prompts_end_is_completed_by_the_text(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    half, rest = (ids := tokenizer.encode("é"))[:1], ids[1:]
    body = {"prompt": [68, *half], "max_tokens": 1, "allowed_token_ids": rest}

    assert texts(ask(client, **body)) == ["é"]
    assert texts(ask(client, **body, echo=True)) == ["aé"]


# -- copies


def test_greedy_copies_are_all_the_same(client: httpx.Client) -> None:
    assert len(set(texts(ask(client, n=5)))) == 1


def test_the_first_choice_does_not_depend_on_the_others(client: httpx.Client) -> None:
    sampled = {"temperature": 1.0, "seed": 11, "max_tokens": 12}
    alone, several = ask(client, **sampled), ask(client, n=4, **sampled)

    assert texts(several)[0] == texts(alone)[0]
    assert len(set(texts(several))) == 4
    next_seed = ask(client, n=4, **(sampled | {"seed": 12}))
    assert not set(texts(several)) & set(texts(next_seed))


@pytest.mark.parametrize("seed", [None, -1])
def test_without_a_seed_answers_differ(client: httpx.Client, seed: int | None) -> None:
    body = {"temperature": 1.0, "max_tokens": 16, "seed": seed}

    assert len({texts(ask(client, **body))[0] for _ in range(3)}) == 3


def test_best_of_returns_the_likeliest_and_counts_them_all(client: httpx.Client) -> None:
    body = {"temperature": 1.0, "seed": 3, "max_tokens": 8, "logprobs": 0, "cache_salt": "best"}
    every = ask(client, n=8, **body)
    means = {
        choice["text"]: sum(choice["logprobs"]["token_logprobs"]) / 8 for choice in every["choices"]
    }
    best = sorted(means, key=lambda text: -means[text])[:3]

    answer = ask(client, n=3, best_of=8, **body)

    assert texts(answer) == best
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 64


# -- stopping


@pytest.fixture
async def spelling(tokenizer: Tokenizer) -> Any:
    """A client of a model that says "hello end" and ends, whatever the prompt's one token is."""
    ids = tokenizer.encode("hello end", add_special_tokens=False)
    core = scripted_core(ScriptedModel(sequence([*ids, 2], prompt_len=1)), tokenizer)
    async with asgi_client(make_app(lambda: (core, info(core)))) as client:
        yield client


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("changes", "text", "finish_reason", "stop_reason"),
    [
        ({}, "hello end", "stop", None),
        ({"ignore_eos": True, "max_tokens": 8}, "hello end", "length", None),
        ({"stop": "lo"}, "hel", "stop", "lo"),
        ({"stop": ["zz", "o e"]}, "hell", "stop", "o e"),
        ({"stop": ["hello end"]}, "", "stop", "hello end"),
        ({"stop": ["l", "lo"]}, "he", "stop", "l"),
        ({"stop": ["lo", "ello"]}, "hel", "stop", "lo"),
        ({"stop": "lo", "include_stop_str_in_output": True}, "hello", "stop", "lo"),
        ({"stop": "lo", "no_stop_trim": True}, "hello", "stop", "lo"),
        ({"stop": "end!"}, "hello end", "stop", None),
        ({"stop": "lo", "min_tokens": 6}, "hello end", "stop", None),
        ({"stop": "</s>"}, "hello end", "stop", None),
        ({"stop": "</s>", "ignore_eos": True}, "hello end", "stop", "</s>"),
        ({"stop_token_ids": [2], "ignore_eos": True}, "hello end", "stop", 2),
        ({"skip_special_tokens": False}, "hello end", "stop", None),
        (
            {"skip_special_tokens": False, "ignore_eos": True, "max_tokens": 8},
            "hello end</s>",
            "length",
            None,
        ),
        ({"max_tokens": 2}, "hel", "length", None),
    ],
)
async def test_how_an_answer_ends(
    spelling: httpx.AsyncClient,
    changes: dict[str, Any],
    text: str,
    finish_reason: str,
    stop_reason: str | int | None,
) -> None:
    body = {"prompt": [5], "temperature": 0, "max_tokens": 40}

    (choice,) = (await spelling.post(COMPLETIONS, json=body | changes)).json()["choices"]

    assert (choice["text"], choice["finish_reason"]) == (text, finish_reason)
    assert choice["stop_reason"] == stop_reason


@pytest.mark.anyio
async def test_stopped_text_and_end_tokens_count_as_generated(
    spelling: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    body = {"prompt": [5], "temperature": 0, "max_tokens": 40, "return_token_ids": True}
    whole = tokenizer.encode("hello end", add_special_tokens=False)

    for changes, generated in (
        ({}, [*whole, 2]),
        ({"stop": "lo"}, whole[:4]),
        ({"stop_token_ids": [whole[1]]}, whole[:2]),
    ):
        answer = (await spelling.post(COMPLETIONS, json=body | changes)).json()
        assert answer["choices"][0]["token_ids"] == generated
        assert answer["usage"]["completion_tokens"] == len(generated)


def test_the_default_is_sixteen_tokens(client: httpx.Client) -> None:
    assert ask(client, max_tokens=None)["usage"]["completion_tokens"] == 16


# -- equal requests


def test_null_is_the_same_as_absent(client: httpx.Client) -> None:
    names = ("stop", "n", "echo", "seed", "logit_bias", "suffix", "stream", "stream_options")
    names += ("min_tokens", "bad_words", "top_k", "logprobs", "request_id", "tfs", "grammar")

    assert texts(ask(client, **dict.fromkeys(names))) == texts(ask(client))


def test_a_whole_number_may_be_written_as_a_float(client: httpx.Client) -> None:
    answer = ask(client, max_tokens=3.0, n=2.0, seed=1.0, top_k=5.0, temperature=1)

    assert texts(answer) == texts(ask(client, max_tokens=3, n=2, seed=1, top_k=5, temperature=1))


def test_other_names_of_a_parameter_mean_the_same(client: httpx.Client) -> None:
    body = {"prompt": "the hen the hen", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    plain = ask(client, **body)
    penalised = ask(client, **body, repetition_penalty=5.0)

    assert texts(ask(client, **body, repeat_penalty=5.0)) == texts(penalised) != texts(plain)
    for other in (None, 5.0):
        both = body | {"repeat_penalty": 5.0, "repetition_penalty": other}
        assert texts(ask(client, **both)) == texts(penalised)
    clash = client.post(COMPLETIONS, json=body | {"repeat_penalty": 5, "repetition_penalty": 2})
    assert clash.status_code == 400
    assert clash.json()["error"]["code"] == "incompatible_parameters"
    assert clash.json()["error"]["param"] == "repeat_penalty"


def test_a_bias_beyond_a_hundred_counts_as_a_hundred(client: httpx.Client) -> None:
    for bias, expected in ((1000, "a" * 4), (100, "a" * 4)):
        assert texts(ask(client, logit_bias={"68": bias})) == [expected]


@pytest.mark.anyio
async def test_the_models_own_defaults_apply_unless_they_are_switched_off(tmp_path: Path) -> None:
    tiny.save(tiny.hf_model("llama"), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.0, "eos_token_id": 2}')
    body = {"prompt": "the hen", "max_tokens": 16}

    async def answers(**config: Any) -> set[str]:
        async with asgi_client(make_app(lambda: tiny_core(tmp_path), **config)) as client:
            posts = [await client.post(COMPLETIONS, json=body) for _ in range(3)]
            return {post.json()["choices"][0]["text"] for post in posts}

    assert len(await answers()) == 1
    assert len(await answers(generation_config=False)) == 3
