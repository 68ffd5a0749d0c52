"""Prometheus metrics: names, labels, and what makes them move."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.tokenizer import Tokenizer
from tests.support.engines import info, scripted_core, tiny_core
from tests.support.gated import GatedModel
from tests.support.scripted import ScriptedModel, constant
from tests.support.servers import asgi_client, make_app
from tests.support.wire import CHAT, COMPLETIONS

GAUGES = {
    "num_requests_running": set(),
    "num_requests_waiting": set(),
    "num_requests_waiting_by_reason": {"reason"},
    "kv_cache_usage_perc": set(),
    "cache_config_info": {"block_size", "num_gpu_blocks", "cache_dtype"},
}
COUNTERS = {
    "prefix_cache_queries": set(),
    "prefix_cache_hits": set(),
    "num_preemptions": set(),
    "prompt_tokens": set(),
    "generation_tokens": set(),
    "prompt_tokens_cached": set(),
    "request_success": {"finished_reason"},
}
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_max_tokens",
    "request_max_num_generation_tokens",
    "request_prefill_kv_computed_tokens",
    "request_params_n",
    "request_num_preemptions",
    "iteration_tokens_total",
)
# fmt: off
FIRST_TOKEN_S = [.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20,
                 40, 80, 160, 640, 2560]
GAP_S = [.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
PHASE_S = {.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
           7680}
# fmt: on


def read(text: str) -> dict[str, float]:
    """Each sample by its name and labels as they are written, model and engine left out."""
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            rest = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            labels = ",".join(f"{name}={rest[name]}" for name in sorted(rest))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    return read((await client.get("/metrics")).text)


@pytest.mark.anyio
@pytest.mark.parametrize("prefix", ["vllm", "logitmill"])
async def test_every_series_is_there_before_anything_happens(
    tiny_folder: Path, prefix: str
) -> None:
    async with asgi_client(make_app(lambda: tiny_core(tiny_folder))) as client:
        response = await client.get("/metrics")
    families = {one.name: one for one in text_string_to_metric_families(response.text)}

    assert response.headers["content-type"].startswith("text/plain; version=")
    for kind, table in (("gauge", GAUGES), ("counter", COUNTERS)):
        for name, labels in table.items():
            family = families[f"{prefix}:{name}"]
            assert family.type == kind
            assert family.samples
            for sample in family.samples:
                assert sample.labels.keys() == {"model_name", "engine"} | labels
                assert sample.labels["model_name"] == "tiny"
                assert sample.labels["engine"] == "0"
    for name in HISTOGRAMS:
        assert families[f"{prefix}:{name}"].type == "histogram"
    reasons = {
        sample.labels["finished_reason"] for sample in families[f"{prefix}:request_success"].samples
    }
    assert reasons == {"stop", "length", "abort", "error"}
    assert families["process_cpu_seconds"].type == "counter"


@pytest.mark.anyio
async def test_buckets_are_those_dashboards_expect(tiny_folder: Path) -> None:
    async with asgi_client(make_app(lambda: tiny_core(tiny_folder))) as client:
        await client.post(COMPLETIONS, json={"prompt": [5], "max_tokens": 3, "ignore_eos": True})
        text = (await client.get("/metrics")).text

    buckets: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("vllm:") and sample.name.endswith("_bucket"):
                buckets.setdefault(family.name, []).append(float(sample.labels["le"]))
    bounds = {name.removeprefix("vllm:"): values[:-1] for name, values in buckets.items()}
    assert all(values[-1] == float("inf") for values in buckets.values())
    assert bounds["time_to_first_token_seconds"] == FIRST_TOKEN_S
    assert bounds["inter_token_latency_seconds"] == GAP_S
    assert set(bounds["e2e_request_latency_seconds"]) >= PHASE_S
    assert bounds["request_prompt_tokens"] == [1, 2, 5, 10, 20, 50, 100, 200]  # context is 256
    assert bounds["request_params_n"] == [1, 2, 5, 10, 20]
    assert {1, 2, 3, 4, 5, 10, 20} <= set(bounds["request_num_preemptions"])
    assert bounds["iteration_tokens_total"][:5] == [1, 2, 4, 8, 16]


@pytest.mark.anyio
async def test_requests_move_what_they_should(tiny_folder: Path) -> None:
    body = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "cache_salt": "moves"}
    async with asgi_client(make_app(lambda: tiny_core(tiny_folder))) as client:
        first = body | {"prompt": [[7] * 9, [8] * 3], "n": 2}
        await client.post(COMPLETIONS, json=first)
        await client.post(COMPLETIONS, json=body | {"prompt": [7] * 9})  # two blocks are cached
        await client.post(
            CHAT,
            json={
                "messages": [{"role": "user", "content": "hi"}],
                "logit_bias": {"2": 100},
                "max_tokens": 9,
                "stream": True,
            },
        )
        await client.post(COMPLETIONS, json=body | {"prompt": [5], "temperature": 9})
        got = await scrape(client)

    expected = {
        "prompt_tokens_total": 9 + 3 + 9 + 18,
        "prompt_tokens_cached_total": 8,
        "generation_tokens_total": 4 * 4 + 4 + 1,
        "prefix_cache_queries_total": 9 + 3 + 9 + 18,
        "prefix_cache_hits_total": 8,
        "num_preemptions_total": 0,
        "request_success_total{finished_reason=length}": 5,
        "request_success_total{finished_reason=stop}": 1,
        "request_success_total{finished_reason=abort}": 0,
        "request_success_total{finished_reason=error}": 0,
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0,
        "time_to_first_token_seconds_count": 4,
        "e2e_request_latency_seconds_count": 4,
        "request_queue_time_seconds_count": 4,
        "request_prefill_time_seconds_count": 4,
        "request_decode_time_seconds_count": 4,
        "request_inference_time_seconds_count": 4,
        "request_time_per_output_token_seconds_count": 3,  # the last one had one token
        "inter_token_latency_seconds_count": 3 * 5,
        "request_prompt_tokens_sum": 39,
        "request_generation_tokens_sum": 21,
        "request_max_num_generation_tokens_sum": 4 + 4 + 4 + 1,
        "request_params_max_tokens_sum": 4 + 4 + 4 + 9,
        "request_prefill_kv_computed_tokens_sum": 39 - 8,
        "request_params_n_sum": 2 + 2 + 1 + 1,
        "request_num_preemptions_sum": 0,
        # Prompts, and each generated token but a sequence's last.
        "iteration_tokens_total_sum": 39 - 8 + 3 * 5,
    }
    for prefix in ("vllm", "logitmill"):
        assert {name: got[f"{prefix}:{name}"] for name in expected} == expected
    assert got["http_requests_total{handler=/v1/completions,method=POST,status=200}"] == 2
    assert got["http_requests_total{handler=/v1/completions,method=POST,status=400}"] == 1
    assert got["http_requests_total{handler=/v1/chat/completions,method=POST,status=200}"] == 1
    name = "http_request_duration_seconds_count{handler=/v1/completions,method=POST}"
    assert got[name] == 3


@pytest.mark.anyio
async def test_gauges_show_what_runs_and_what_waits(tokenizer: Tokenizer) -> None:
    model = GatedModel(free_steps=2)
    core = scripted_core(model, tokenizer, num_blocks=8, max_num_seqs=2)
    body = {"prompt": [[5] * 6] * 3, "max_tokens": 6, "ignore_eos": True}
    async with asgi_client(make_app(lambda: (core, info(core)))) as client:
        request = asyncio.create_task(client.post(COMPLETIONS, json=body))
        try:
            await asyncio.to_thread(model.stopped.wait, 30)
            during = await scrape(client)
        finally:
            model.gate.set()
        await request
        after = await scrape(client)

    assert during["vllm:num_requests_running"] == 2
    assert during["vllm:num_requests_waiting"] == 1
    assert during["vllm:num_requests_waiting_by_reason{reason=capacity}"] == 1
    assert 0.25 <= during["vllm:kv_cache_usage_perc"] <= 0.5
    assert [
        after[f"vllm:{name}"]
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    ] == [0, 0, 0]


@pytest.mark.anyio
async def test_failures_and_ignored_fields_are_counted(tokenizer: Tokenizer) -> None:
    core = scripted_core(ScriptedModel(constant([float("nan")] * 128)), tokenizer)
    async with asgi_client(make_app(lambda: (core, info(core)))) as client:
        response = await client.post(
            COMPLETIONS, json={"prompt": [5], "n": 3, "foo": 1, "bar": None, "baz": 2}
        )
        got = await scrape(client)

    assert response.status_code == 500
    assert got["vllm:request_success_total{finished_reason=error}"] == 3
    assert got["logitmill:ignored_fields_total"] == 2


@pytest.mark.anyio
async def test_no_label_holds_what_a_client_sent(tiny_folder: Path) -> None:
    secret = "s3cret"
    headers = {"X-Request-Id": secret, "Authorization": f"Bearer {secret}"}
    async with asgi_client(make_app(lambda: tiny_core(tiny_folder))) as client:
        client.headers.update(headers)
        for path in (f"/{secret}", f"/v1/models/{secret}", f"/health?{secret}=1"):
            await client.get(path)
        for path in (COMPLETIONS, CHAT):
            for body in ({"model": secret}, {secret: secret, "prompt": secret, "user": secret}):
                await client.post(path, json=body)
        text = (await client.get("/metrics")).text

    assert secret not in text
    assert 'handler="unmatched"' in text


@pytest.mark.anyio
async def test_what_holds_up_the_event_loop_shows_as_its_lag(tiny_folder: Path) -> None:
    name = "logitmill:event_loop_lag_seconds"
    async with asgi_client(make_app(lambda: tiny_core(tiny_folder))) as client:
        while (before := await scrape(client))[f"{name}_count"] < 2:
            await asyncio.sleep(0.01)
        time.sleep(0.5)
        await asyncio.sleep(0.05)
        after = await scrape(client)

    late = [one[f"{name}_count"] - one[f"{name}_bucket{{le=0.25}}"] for one in (before, after)]
    assert late[1] > late[0]


@pytest.mark.anyio
async def test_the_other_servers_names_can_be_left_out(tiny_folder: Path) -> None:
    app = make_app(lambda: tiny_core(tiny_folder), vllm_metrics=False)
    async with asgi_client(app) as client:
        text = (await client.get("/metrics")).text

    assert "vllm:" not in text
    assert "logitmill:num_requests_running" in text


def test_two_servers_in_one_process_count_for_themselves(tiny_folder: Path) -> None:
    apps: list[Any] = [make_app(lambda: tiny_core(tiny_folder)) for _ in range(2)]

    apps[0].state.server.metrics.on_ignored(5)

    values = [read(app.state.server.metrics.export().decode()) for app in apps]
    assert [one["logitmill:ignored_fields_total"] for one in values] == [5, 0]
