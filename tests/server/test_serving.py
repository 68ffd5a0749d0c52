"""What both generating routes do with parameters: whose count, and that each keeps to its own."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.core import EngineCore
from engine.params import EXCLUDES
from engine.prepare import ModelInfo
from server.app import create_app
from server.config import ServerConfig
from server.inputs import sampling_params
from server.schemas import ChatCompletionRequest, CompletionRequest
from tests.support.engines import tiny_core
from tests.support.logits import asking
from tests.support.servers import asgi_client
from tests.support.wire import CHAT, COMPLETIONS

BODIES: list[tuple[Any, dict[str, Any]]] = [
    (CompletionRequest, {"prompt": "a"}),
    (ChatCompletionRequest, {"messages": [{"role": "user", "content": "a"}]}),
]
EACH_BODY = pytest.mark.parametrize(("model", "rest"), BODIES)


# -- defaults


@EACH_BODY
@pytest.mark.parametrize(
    ("name", "other"), [(name, other) for name, others in EXCLUDES.items() for other in others]
)
def test_what_a_client_asks_for_goes_before_a_default_that_excludes_it(
    model: Any, rest: dict[str, Any], name: str, other: str
) -> None:
    for mine, default in ((name, other), (other, name)):
        defaults = asking(default) | {"repetition_penalty": 1.3}
        body = model.model_validate(rest | asking(mine))
        params = sampling_params(body, defaults)
        assert params.asks(mine)
        assert not params.asks(default)
        assert params.repetition_penalty == 1.3
        silent = sampling_params(model.model_validate(rest), defaults)
        assert silent.asks(default)


@EACH_BODY
def test_a_neutral_value_of_the_client_replaces_only_its_own_default(
    model: Any, rest: dict[str, Any]
) -> None:
    body = model.model_validate(rest | {"mirostat": 0})
    params = sampling_params(body, {"mirostat": 2})
    assert params.mirostat == 0
    params = sampling_params(body, {"top_p": 0.8})
    assert (params.mirostat, params.top_p) == (0, 0.8)
    body = model.model_validate(rest | {"top_p": 1.0})
    assert sampling_params(body, {"mirostat": 2}).mirostat == 2


@EACH_BODY
def test_pairs_arrive_as_they_were_sent(model: Any, rest: dict[str, Any]) -> None:
    given = {"adapt_temperature": [0.8, 0.6], "exponential_decay_length_penalty": [20, 1.05]}
    params = sampling_params(model.model_validate(rest | given), {})
    assert params.adapt_temperature == (0.8, 0.6)
    assert params.exponential_decay_length_penalty == (20, 1.05)
    defaults = sampling_params(model.model_validate(rest), given)
    assert defaults.adapt_temperature == (0.8, 0.6)


def app_with(folder: Path, recommended: dict[str, Any], **sampling: Any) -> FastAPI:
    """A model whose authors recommend something, and a configuration that wants something."""

    def load() -> tuple[EngineCore, ModelInfo]:
        core, info = tiny_core(folder)
        return core, replace(info, sampling_defaults=recommended)

    config = ServerConfig(drain_delay=0.0)
    return create_app(load, config, ["tiny"], sampling=sampling)


@pytest.mark.anyio
async def test_a_configuration_goes_before_what_the_authors_recommend(tiny_folder: Path) -> None:
    recommended = {"top_p": 0.9, "temperature": 0.6}
    body = {"prompt": "the hen", "max_tokens": 12, "seed": 4, "ignore_eos": True}

    async def answers(
        recommended: dict[str, Any], sampling: dict[str, Any], *bodies: dict[str, Any]
    ) -> list[str]:
        async with asgi_client(app_with(tiny_folder, recommended, **sampling)) as client:
            replies = [await client.post(COMPLETIONS, json=body | one) for one in bodies]
        assert [reply.status_code for reply in replies] == [200] * len(bodies)
        return [reply.json()["choices"][0]["text"] for reply in replies]

    mirostat = {"mirostat": 2, "mirostat_tau": 1.0}
    got = await answers(recommended, mirostat, {}, {"top_k": 3})
    want = await answers({}, {}, mirostat | {"temperature": 0.6}, {"temperature": 0.6, "top_k": 3})
    assert got == want


# -- requests side by side

METHODS: list[dict[str, Any]] = [
    {},
    {"xtc_probability": 0.7, "xtc_threshold": 0.05},
    {"tfs": 0.7},
    {"top_a": 0.4},
    {"top_h": 0.5},
    {"mirostat": 1, "mirostat_tau": 2.0, "mirostat_eta": 0.5},
    {"mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.5},
    {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_sequence_breakers": ["e", "th"]},
    {"eos_length_penalty": 6.0, "eos_length_window": 20, "ignore_eos": False},
    {"exponential_decay_length_penalty": [4, 1.5], "ignore_eos": False},
    {"edt_theta": 1.0, "temperature": 1.5},
    {"dynatemp_range": 0.8, "dynatemp_exponent": 2.0},
    {"adapt_temperature": [0.3, 1.8], "logit_bias": {"97": 4.0, "3": 4.0}},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "penalty_last_n": 8},
    {"sampler_order": "hf", "top_p": 0.7, "min_p": 0.1, "temperature": 1.4},
    {"sampler_order": "llama.cpp", "top_p": 0.7, "min_p": 0.1, "temperature": 1.4},
    {"sampler_order": "llama.cpp", "top_k": 9, "dynatemp_range": 0.5},
    {"sampler_order": "llama.cpp", "mirostat": 2, "mirostat_tau": 1.5},
    {"temperature": 0},
]


@pytest.mark.anyio
@pytest.mark.parametrize("num_tokens", [2048, 256])  # all that the cache holds
async def test_requests_with_a_method_each_answer_together_as_alone(
    tiny_folder: Path, num_tokens: int
) -> None:
    cores: list[EngineCore] = []

    def load() -> tuple[EngineCore, ModelInfo]:
        memory = num_tokens * 2 * 2 * 2 * 16 * 4
        core, info = tiny_core(tiny_folder, kv_cache_memory=memory, max_model_len=128)
        cores.append(core)
        return core, info

    app = create_app(load, ServerConfig(drain_delay=0.0), ["tiny"])
    common = {"max_tokens": 30, "ignore_eos": True, "return_token_ids": True}
    prompts: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": "the hen in the rain, and"}),
        (CHAT, {"messages": [{"role": "user", "content": "the hen"}]}),
    ]
    bodies = []
    for index, params in enumerate(METHODS):
        path, prompt = prompts[index % 2]
        bodies.append((path, common | {"seed": index} | prompt | params))

    def choices(response: httpx.Response) -> Any:
        assert response.status_code == 200, response.text
        return response.json()["choices"]

    async with asgi_client(app) as client:
        alone = [choices(await client.post(path, json=body)) for path, body in bodies]
        (core,) = cores
        before = core.scheduler.num_preemptions
        posts = (client.post(path, json=body) for path, body in reversed(bodies))
        together = [choices(response) for response in await asyncio.gather(*posts)]
        preemptions = core.scheduler.num_preemptions - before

    assert together[::-1] == alone
    assert (preemptions > 3) == (num_tokens == 256)
    texts = {tuple(answer[0]["token_ids"]) for answer in alone}
    assert len(texts) > len(METHODS) - 3  # nearly each says something else
