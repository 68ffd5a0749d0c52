"""Decoding strategies over HTTP: answers, streams, reports, refusals, and clients that leave."""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fastapi import FastAPI

from engine.params import EXCLUDES, NEEDS
from engine.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.engines import assert_all_free, info, scripted_core, tiny_core
from tests.support.gated import GatedModel
from tests.support.servers import eventually, live_server, make_app
from tests.support.wire import CHAT, COMPLETIONS, REPORTS, assembled, comparable, post_stream

HELLO = [{"role": "user", "content": "hello there"}]
BEAMS: dict[str, Any] = {"use_beam_search": True, "beam_width": 4}
SCORES = ("cumulative_logprob", "sequence_score")
SED = {
    "detector": "either",
    "delta_e": 3.0,
    "delta_r": 0.5,
    "rollout_tokens": 3,
    "eval_prompt": "ok?",
    "verdict_tokens": ["y", "n"],
    "max_points": 2,
}

# Each with what it reports in a choice.
STRATEGIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "beams": (BEAMS | {"n": 2}, SCORES),
    "beams as best_of": ({"use_beam_search": True, "best_of": 3}, SCORES),
    "beams by another name": ({"use_beam_search": True, "num_beams": 3}, SCORES),
    "beams with a stop string": (BEAMS | {"n": 3, "stop": ["a", "e", "x"]}, SCORES),
    "beams with gnmt's scores": (
        BEAMS | {"length_penalty_type": "gnmt", "coverage_penalty": 0.2, "beam_prune": 5.0},
        SCORES,
    ),
    "diverse": (BEAMS | {"n": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, SCORES),
    "stochastic": (BEAMS | {"n": 4, "stochastic_beams": True}, SCORES),
    "best first": (
        BEAMS | {"n": 2, "beam_strategy": "best_first"},
        (*SCORES, "num_expansions"),
    ),
    "a star": (BEAMS | {"beam_strategy": "astar"}, (*SCORES, "num_expansions")),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, ()),
    "guidance": ({"guidance_scale": 1.5, "negative_prompt": "hello", "n": 2}, ()),
    "amateur": ({"cd_amateur": "small", "cd_beta": 0.5}, ()),
    "dola": ({"dola_layers": "high", "temperature": 0}, ()),
    "kl temperature": ({"kl_bandwidth": 0.5, "kl_reference_prompt": "abc"}, ()),
    "cot": ({"cot_branches": 3, "n": 2, "cot_pattern": "[a-m]+"}, ("cot",)),
    "sed": ({"sed": SED}, ("sed",)),
    "pause": ({"num_pause_tokens": 3, "pause_token": "."}, ()),
    "latent": ({"num_latent_thoughts": 3, "n": 2}, ()),
}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    folder = tmp_path_factory.mktemp("strategies")
    big = tiny.hf_model("llama", initializer_range=0.15, num_hidden_layers=4)
    small = tiny.hf_model("llama", seed=3, initializer_range=0.15, num_hidden_layers=1)
    big_folder = tiny.save(big, folder / "big")
    amateur = "small", tiny.save(small, folder / "small")
    return make_app(lambda: tiny_core(big_folder, amateur))


def body_for(path: str, name: str) -> dict[str, Any]:
    body = {"max_tokens": 8, "seed": 5, **STRATEGIES[name][0]}
    if path == CHAT:
        return body | {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    return body | {"prompt": "the hen", "logprobs": 2, "return_token_ids": True}


def ask(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


# -- answers


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_answers_counts_and_reports(client: httpx.Client, name: str) -> None:
    body = body_for(COMPLETIONS, name)

    answer = ask(client, COMPLETIONS, body)

    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(body.get("n", 1)))
    hidden = body.get("num_pause_tokens", 0) + body.get("num_latent_thoughts", 0)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(choices[0]["prompt_token_ids"]) + hidden
    assert usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in choices)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    for choice in choices:
        assert 0 < len(choice["token_ids"]) <= 8
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
        assert all(logprob < 0.0 for logprob in choice["logprobs"]["token_logprobs"])
        assert {report for report in REPORTS if report in choice} == {*STRATEGIES[name][1]}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_stream_adds_up_to_the_unstreamed_answer(
    client: httpx.Client, path: str, name: str
) -> None:
    body = body_for(path, name)
    # Salts, or the second answer would report cached tokens.
    whole = ask(client, path, body | {"cache_salt": f"{path} {name}"})
    options = {"stream_options": {"include_usage": True}, "cache_salt": f"{path} {name} again"}
    chunks = post_stream(client, path, body | options)

    assert comparable(assembled(chunks)) == comparable(whole)


@pytest.mark.parametrize("name", ["beams", "diverse", "best first", "a star", "stochastic"])
def test_beams_score_their_own_tokens_and_come_best_first(client: httpx.Client, name: str) -> None:
    choices = ask(client, COMPLETIONS, body_for(COMPLETIONS, name))["choices"]

    for choice in choices:
        total = sum(choice["logprobs"]["token_logprobs"])
        assert choice["cumulative_logprob"] == pytest.approx(total, abs=1e-4)
        mean = total / len(choice["token_ids"])
        assert choice["sequence_score"] == pytest.approx(mean, abs=1e-4)
    assert len({tuple(choice["token_ids"]) for choice in choices}) == len(choices)
    if name in ("beams", "diverse", "a star"):
        scores = [choice["sequence_score"] for choice in choices]
        assert scores == sorted(scores, reverse=True)
    if name == "best first":
        totals = [choice["cumulative_logprob"] for choice in choices]
        assert totals == sorted(totals, reverse=True)


def test_a_logprobs_of_zero_reports_each_beams_own_numbers(client: httpx.Client) -> None:
    body = body_for(COMPLETIONS, "beams")
    wanted = ask(client, COMPLETIONS, body)["choices"]
    bare = ask(client, COMPLETIONS, body | {"logprobs": 0})["choices"]

    for choice, other in zip(bare, wanted, strict=True):
        mine, theirs = (one["logprobs"]["token_logprobs"] for one in (choice, other))
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_beams_echo_the_prompt_and_its_logprobs(client: httpx.Client) -> None:
    body = body_for(COMPLETIONS, "beams")
    plain = ask(client, COMPLETIONS, body)["choices"]
    echoed = ask(client, COMPLETIONS, body | {"echo": True})["choices"]

    for choice, other in zip(echoed, plain, strict=True):
        assert choice["text"] == "the hen" + other["text"]
        own = choice["logprobs"]["token_logprobs"][-len(other["token_ids"]) :]
        assert own == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-4)
        assert choice["logprobs"]["token_logprobs"][0] is None


def test_cot_reports_every_branch_in_every_choice(client: httpx.Client) -> None:
    choices = ask(client, COMPLETIONS, body_for(COMPLETIONS, "cot"))["choices"]

    branches = choices[0]["cot"]["branches"]
    assert [branch["branch"] for branch in branches] == [0, 1, 2]
    for choice in choices:
        own = {name: choice["cot"][name] for name in ("branch", "answer", "confidence")}
        assert choice["cot"]["branches"] == branches
        assert branches[own["branch"]] == own
        assert own["answer"] is None or own["answer"] in choice["text"]
    assert choices[0]["cot"]["branch"] != choices[1]["cot"]["branch"]


def test_sed_reports_every_number_behind_its_decisions(client: httpx.Client) -> None:
    (choice,) = ask(client, COMPLETIONS, body_for(COMPLETIONS, "sed"))["choices"]

    assert 0 < len(choice["sed"]) <= 2
    for point in choice["sed"]:
        assert point["entropy"] > 3.0 or point["ratio"] > 0.5
        worth = [0.5 * (one["p_se"] + one["p_gen"]) for one in point["candidates"]]
        assert [one["propensity"] for one in point["candidates"]] == pytest.approx(worth)
        best = point["candidates"][point["chosen"]]
        assert best["propensity"] == max(one["propensity"] for one in point["candidates"])
        assert best["token_id"] == choice["token_ids"][point["position"]]
        ratio = point["candidates"][1]["p_gen"] / point["candidates"][0]["p_gen"]
        assert point["ratio"] == pytest.approx(ratio)
        for one in point["candidates"]:
            assert one["rollout_token_ids"][0] == one["token_id"]
            assert len(one["rollout_token_ids"]) <= 3


def test_a_seed_repeats_drawn_beams_and_another_gives_others(client: httpx.Client) -> None:
    body = body_for(COMPLETIONS, "stochastic")
    texts = [
        [choice["text"] for choice in ask(client, COMPLETIONS, body | {"seed": seed})["choices"]]
        for seed in (1, 1, 2)
    ]

    assert texts[0] == texts[1] != texts[2]


# -- the official client


@pytest.fixture(scope="module")
def sdk(url: str) -> Iterator[openai.OpenAI]:
    http_client = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http_client
    ) as sdk:
        yield sdk


@pytest.mark.parametrize("name", ["beams", "contrastive", "amateur", "cot", "sed"])
def test_the_sdk_asks_for_strategies_through_extra_body(
    client: httpx.Client, sdk: openai.OpenAI, name: str
) -> None:
    extra = dict(STRATEGIES[name][0])
    given: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "seed": 5, "n": extra.pop("n", 1)}
    messages: Any = HELLO

    answer: Any = sdk.completions.create(**given, prompt="the hen", extra_body=extra)
    chat: Any = sdk.chat.completions.create(**given, messages=messages, extra_body=extra)
    pieces: dict[int, str] = {}
    stream: Any = sdk.chat.completions.create(
        **given, messages=messages, extra_body=extra, stream=True
    )
    for chunk in stream:
        (choice,) = chunk.choices
        pieces[choice.index] = pieces.get(choice.index, "") + (choice.delta.content or "")

    raw = ask(client, COMPLETIONS, given | extra | {"prompt": "the hen"})["choices"]
    assert [choice.text for choice in answer.choices] == [choice["text"] for choice in raw]
    for report in STRATEGIES[name][1]:
        assert [getattr(one, report) for one in answer.choices] == [one[report] for one in raw]
        assert all(hasattr(choice, report) for choice in chat.choices)
    contents = {choice.index: choice.message.content for choice in chat.choices}
    assert pieces == contents


def test_the_sdk_raises_for_what_cannot_be_combined(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.completions.create(model="tiny", prompt="a", extra_body=BEAMS | {"mirostat": 2})

    assert caught.value.code == "incompatible_parameters"
    assert caught.value.param == "use_beam_search"


# -- fields without effect


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "warning"),
    [
        (BEAMS | {"temperature": 0.7}, "temperature has no effect with use_beam_search"),
        (
            BEAMS | {"top_p": 0.9, "temperature": 2, "seed": 1},
            "temperature, top_p, seed have no effect with use_beam_search",
        ),
        ({"penalty_alpha": 0.5, "top_k": 3, "min_p": 0.1}, "min_p has no effect"),
        ({"cot_branches": 2, "top_k": 3}, "top_k has no effect with cot_branches"),
        (BEAMS | {"temperature": 0}, None),
        (BEAMS | {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "seed": None}, None),
        (BEAMS | {"stochastic_beams": True, "seed": 1}, None),
        ({"penalty_alpha": 0.5, "top_k": 3}, None),
        ({"sed": SED, "temperature": 0.7, "seed": 1}, None),
        ({"guidance_scale": 1.5, "temperature": 0.7, "top_p": 0.9, "seed": 1}, None),
    ],
)
def test_a_header_names_what_has_no_effect(
    client: httpx.Client, body: dict[str, Any], warning: str | None, stream: bool
) -> None:
    response = client.post(
        COMPLETIONS, json={"prompt": "a", "max_tokens": 2, "stream": stream} | body
    )

    assert response.status_code == 200
    if warning is None:
        assert "warning" not in response.headers
    else:
        assert response.headers["warning"].startswith('199 - "')
        assert warning in response.headers["warning"]


# -- refusals

# A value of each field that asks for something.
ASKING: dict[str, Any] = {
    "n": 2,
    "best_of": 2,
    "mirostat": 2,
    "adapt_temperature": [0.8, 0.6],
    "temperature": 0.5,
    "dynatemp_range": 0.5,
    "edt_theta": 0.1,
    "entropix": {"profile": "head"},
    "use_beam_search": True,
    "beam_width": 4,
    "length_penalty": 0.5,
    "length_penalty_type": "gnmt",
    "early_stopping": True,
    "beam_prune": 3.0,
    "coverage_penalty": 0.2,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "stochastic_beams": True,
    "beam_strategy": "best_first",
    "beam_memory": 3,
    "penalty_alpha": 0.6,
    "guidance_scale": 1.5,
    "kl_bandwidth": 1.0,
    "kl_reference_prompt": "abc",
    "cd_amateur": "small",
    "dola_layers": "high",
    "cot_branches": 3,
    "sed": SED,
    "pause_token": ".",
    "num_pause_tokens": 2,
    "num_latent_thoughts": 2,
    "top_n_sigma": 1.0,
    "min_p": 0.1,
    "top_k": 3,
    "typical_p": 0.9,
    "tfs": 0.9,
    "top_a": 0.2,
    "top_h": 0.4,
    "top_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "xtc_probability": 0.5,
}
PAIRS = [(name, other) for name, others in EXCLUDES.items() for other in others]


def asking(*names: str) -> dict[str, Any]:
    """These fields, and what they need."""
    body: dict[str, Any] = {}
    for name in names:
        body[name] = ASKING[name]
        if name == "penalty_alpha":
            body["top_k"] = 3
        while name in NEEDS:
            name = NEEDS[name]
            body[name] = ASKING[name]
    return body


def refused(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    prompt = {"messages": HELLO} if path == CHAT else {"prompt": "the hen"}
    response = client.post(path, json=prompt | {"max_tokens": 4} | body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_cannot_be_combined_is_refused_by_both_names(client: httpx.Client, path: str) -> None:
    for name, other in PAIRS:
        error = refused(client, path, asking(name, other))
        assert error["code"] == "incompatible_parameters", (name, other)
        assert error["param"] == name
        assert error["message"] == f"{name} and {other} cannot be combined"


def test_either_field_of_a_refused_pair_alone_is_served(client: httpx.Client) -> None:
    for name in sorted({name for pair in PAIRS for name in pair}):
        ask(client, COMPLETIONS, {"prompt": "the hen", "max_tokens": 2} | asking(name))


@pytest.mark.parametrize("name", NEEDS)
def test_a_field_without_the_one_it_needs_is_refused_by_both_names(
    client: httpx.Client, name: str
) -> None:
    error = refused(client, COMPLETIONS, {name: ASKING[name]})

    assert error["param"] == name
    assert error["code"] == "invalid_value"
    assert error["message"] == f"{name} needs {NEEDS[name]}"


@pytest.fixture(scope="module")
def narrow(tiny_folder: Path) -> Iterator[httpx.Client]:
    """A server with few lanes and little memory: 24 blocks of 4 tokens."""

    def load() -> Any:
        core, known = tiny_core(
            tiny_folder, max_num_seqs=4, kv_cache_memory=24 * 4 * 2 * 2 * 2 * 16 * 4
        )
        assert known.num_blocks == 24
        return core, known

    with (
        live_server(make_app(load)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=30) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("body", "param", "number", "value"),
    [
        (BEAMS | {"beam_width": 5}, "beam_width", 4, 5),
        (BEAMS | {"beam_width": 65}, "beam_width", 64, 65),
        ({"use_beam_search": True, "best_of": 5}, "best_of", 4, 5),
        ({"use_beam_search": True, "n": 5}, "n", 4, 5),
        ({"penalty_alpha": 0.6, "top_k": 5}, "top_k", 4, 5),
        ({"cot_branches": 5}, "cot_branches", 4, 5),
        ({"sed": SED | {"k": 5}}, "sed.k", 4, 5),
        # The widest search runs one hypothesis at a time.
        (BEAMS | {"beam_width": 65, "beam_strategy": "best_first"}, "beam_width", 64, 65),
        # What does not fit in memory, or in the context.
        (BEAMS | {"max_tokens": 30}, "beam_width", 24, 33),
        ({"guidance_scale": 1.5, "n": 2, "max_tokens": 22}, "n", 24, 25),
        ({"sed": SED, "max_tokens": 60}, "sed.k", 24, 35),
        ({"num_latent_thoughts": 64, "max_tokens": 40}, "prompt", 96, 110),
        ({"num_pause_tokens": 90, "pause_token": ".", "max_tokens": 1}, "prompt", 96, 97),
    ],
)
def test_a_limit_names_its_number_and_what_was_asked_for(
    narrow: httpx.Client, body: dict[str, Any], param: str, number: int, value: int
) -> None:
    response = narrow.post(COMPLETIONS, json={"prompt": [5] * 6, "max_tokens": 4} | body)

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert str(number) in error["message"].replace(".", " ").replace(",", " ").split()
    assert str(value) in error["message"].replace(".", " ").replace(",", " ").split()


def test_what_just_fits_is_served(narrow: httpx.Client) -> None:
    bodies: tuple[dict[str, Any], ...] = (
        BEAMS | {"max_tokens": 18},
        {"guidance_scale": 1.5, "n": 2, "max_tokens": 18},
        {"cot_branches": 4, "max_tokens": 18},
        {"penalty_alpha": 0.6, "top_k": 4, "max_tokens": 18},
        {"num_latent_thoughts": 64, "max_tokens": 26},
    )
    for body in bodies:
        asked: dict[str, Any] = {"prompt": [5] * 6, "ignore_eos": True} | body
        answer = ask(narrow, COMPLETIONS, asked)
        assert answer["usage"]["completion_tokens"] == asked["max_tokens"] * asked.get("n", 1)


def test_an_amateur_that_is_not_loaded_is_named(client: httpx.Client, narrow: httpx.Client) -> None:
    error = refused(client, COMPLETIONS, {"cd_amateur": "large"})
    assert error["param"] == "cd_amateur"
    assert "'large'" in error["message"]
    assert "small" in error["message"]
    assert "--amateur-model" in refused(narrow, COMPLETIONS, {"cd_amateur": "x"})["message"]


# -- clients that leave, and requests that fail


def gauges(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {
        name: float(line.split()[-1])
        for name in names
        for line in text.splitlines()
        if line.startswith(f"vllm:{name}{{")
    }


LEAVING: list[tuple[dict[str, Any], int]] = [  # with how many sequences each has
    (BEAMS | {"n": 2}, 4),
    (BEAMS | {"num_beam_groups": 2, "diversity_penalty": 1.0}, 4),
    (BEAMS | {"stochastic_beams": True, "n": 4}, 4),
    (BEAMS | {"beam_strategy": "best_first"}, 1),
    ({"penalty_alpha": 0.6, "top_k": 4}, 4),
    ({"cot_branches": 3}, 3),
    ({"sed": SED | {"max_points": 64}}, 2),
    ({"guidance_scale": 1.5, "negative_prompt": [6, 7]}, 1),
    ({"kl_bandwidth": 0.5, "kl_reference_prompt": [6, 7]}, 1),
]


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_in_the_middle_of_a_search_take_everything_along(
    tokenizer: Tokenizer, stream: bool
) -> None:
    model = GatedModel(free_steps=12)
    core = scripted_core(model, tokenizer, num_blocks=400, max_num_seqs=32)
    app = make_app(lambda: (core, info(core)))
    total = sum(count for _, count in LEAVING)
    common = {"prompt": [5] * 9, "max_tokens": 40, "ignore_eos": True, "stream": stream}
    with live_server(app) as url:
        address = urlsplit(url)
        connections = []
        try:
            for body, _ in LEAVING:
                connection = http.client.HTTPConnection(address.hostname or "", address.port)
                content = json.dumps(common | body)
                connection.request(
                    "POST", COMPLETIONS, content, {"Content-Type": "application/json"}
                )
                connections.append(connection)
            eventually(lambda: app.state.server.engine.num_open == total)
            assert model.stopped.wait(30)
            for connection in connections:
                connection.close()
            eventually(lambda: app.state.server.engine.num_open == 0)
        finally:
            model.gate.set()
        eventually(lambda: set(gauges(url).values()) == {0.0})
        assert len(gauges(url)) == 3
        assert_all_free(core)

        after = httpx.post(
            f"{url}{COMPLETIONS}", json={"prompt": [5] * 9, **BEAMS}, trust_env=False, timeout=30
        )
        assert after.status_code == 200


def test_after_every_strategy_the_gauges_are_zero(client: httpx.Client, url: str) -> None:
    for name in STRATEGIES:
        ask(client, COMPLETIONS, body_for(COMPLETIONS, name))

    eventually(lambda: set(gauges(url).values()) == {0.0})


def test_a_pattern_without_end_fails_its_request_alone(client: httpx.Client) -> None:
    body = {"prompt": "a", "max_tokens": 60, "cot_branches": 2, "ignore_eos": True}
    # Of so many "a" and nothing else, this tries every way to split them.
    body |= {"allowed_token_ids": [68], "cot_pattern": "(a|a)*[bc]"}
    response = client.post(COMPLETIONS, json=body)

    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("cot_pattern", "invalid_value")
    ask(client, COMPLETIONS, {"prompt": "a", "max_tokens": 2})
