"""Thousands of small random workloads under pressure answer as without any."""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest

import engine.core
from engine.core import EngineCore
from engine.messages import Request
from engine.strategies import choose
from engine.strategies.base import Strategy
from engine.tokenizer import Tokenizer
from tests.support.engines import (
    Results,
    assert_all_free,
    collect,
    record_plans,
    request,
    run,
    scripted_core,
)
from tests.support.forking import Forking
from tests.support.invariants import check
from tests.support.scripted import ScriptedModel

VOCAB = 24  # the special tokens, then " !\"#$%&'()*+,-./01234"
NUM_BATCHES = 40
BATCH = 50
MODEL = ScriptedModel(vocab_size=VOCAB, context_len=32, attentive=True)

# Each request gets up to two of these.
MIXTURE: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.05, "typical_p": 0.9},
    {"repetition_penalty": 1.4, "penalty_last_n": 3},
    {"frequency_penalty": 1.0, "presence_penalty": 0.5},
    {"no_repeat_ngram_size": 2},
    {"logit_bias": {"5": 4.0, "2": 2.0}},
    {"allowed_token_ids": [2, 5, 6, 7, 8, 9]},
    {"bad_words": ["(", "#$"]},
    {"ignore_eos": True},
    {"min_tokens": 2},
    {"stop_token_ids": [4, 9]},
    {"stop": ["$", "%&", "(()"]},
    {"stop": ["+,", "</s>"], "include_stop_str_in_output": True},
    {"logprobs": 2},
    {"prompt_logprobs": 1},
    {"n": 2},
    {"n": 1, "best_of": 3},
    {"stream": True},
)


@dataclass(frozen=True)
class Workload:
    """Requests, when they arrive and are aborted, and an engine hardly big enough for them."""

    requests: list[Request]
    arrivals: list[int]
    aborts: dict[str, int]
    core: EngineCore


@dataclass
class Seen:
    """How often what is to be tested has happened."""

    preemptions: int = 0
    cache_hits: int = 0  # tokens
    copies: int = 0  # of blocks, on write
    aborts: int = 0
    chunked: int = 0  # prompts computed in parts
    forking: int = 0  # requests whose strategy forks


def test_outputs_do_not_depend_on_the_schedule(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.core, "choose", _choose)
    seen = Seen()
    for batch in range(NUM_BATCHES):
        reference = scripted_core(
            MODEL, tokenizer, num_blocks=2048, block_size=16, max_num_seqs=512, prefix_cache=False
        )
        rng = random.Random(batch)
        workloads = [_workload(rng, reference, f"{batch}.{index}") for index in range(BATCH)]
        requests = [one for workload in workloads for one in workload.requests]
        want = run(reference, *(replace(one, stream=False) for one in requests))
        for number, workload in enumerate(workloads):
            try:
                _compare(workload, want, seen)
            except AssertionError as error:
                error.add_note(f"batch {batch}, workload {number}")
                raise
    assert seen.preemptions > 500
    assert seen.cache_hits > 1000
    assert seen.copies > 150
    assert seen.aborts > 350
    assert seen.chunked > 1000
    assert seen.forking > 150


def _choose(request: Request) -> Strategy:
    params = request.params
    if params.best_of is not None:
        return Forking(params.num_sequences, params.n, VOCAB)
    return choose(request)


def _compare(workload: Workload, want: Results, seen: Seen) -> None:
    got, aborted = _run(workload, seen)
    assert not got.failed
    for one in workload.requests:
        mine = {key: delta for key, delta in got.choices.items() if key[0] == one.request_id}
        if one.request_id in aborted:
            continue
        assert one.request_id in got.finished
        assert len(mine) == one.params.n
        for key, delta in mine.items():
            assert delta == want.choices[key], one
    assert_all_free(workload.core)


def _run(workload: Workload, seen: Seen) -> tuple[Results, set[str]]:
    """Step through a workload, checking after each step; and which requests were aborted."""
    core, results = workload.core, Results()
    plans = record_plans(core)
    aborted: set[str] = set()
    last = max([*workload.arrivals, *workload.aborts.values()])
    for step in range(500):
        for one, arrival in zip(workload.requests, workload.arrivals, strict=True):
            if arrival == step:
                core.submit(one)
        for request_id, when in workload.aborts.items():
            if when == step:
                core.abort(request_id)
                if request_id not in results.finished:
                    aborted.add(request_id)
        if core.has_work:
            messages, _ = core.step()
            collect(results, messages)
            assert not aborted & {message.request_id for message in messages}
        elif step > last:
            break
        check(core)
    assert not core.has_work
    scheduler = core.scheduler
    seen.preemptions += scheduler.num_preemptions
    seen.cache_hits += scheduler.cache_hits
    seen.copies += sum(len(plan.copies) for plan in plans)
    seen.aborts += len(aborted)
    seen.chunked += sum(
        chunk.end < chunk.sequence.prompt_len for plan in plans for chunk in plan.chunks
    )
    seen.forking += sum(one.params.best_of is not None for one in workload.requests)
    return results.merge(), aborted


def _workload(rng: random.Random, reference: EngineCore, name: str) -> Workload:
    lanes = rng.randint(1, 6)
    shared = [[rng.randrange(3, VOCAB) for _ in range(6)] for _ in range(2)]
    requests = [
        _request(rng, reference, f"{name}.{index}", shared, lanes)
        for index in range(rng.randint(2, 4))
    ]
    arrivals = [rng.randint(0, 2) for _ in requests]
    aborts = {
        one.request_id: arrival + rng.randint(0, 8)
        for one, arrival in zip(requests, arrivals, strict=True)
        if rng.random() < 0.15
    }
    block_size = rng.randint(1, 4)
    most = max(
        one.params.num_sequences * -(-(len(one.prompt_ids) + one.max_tokens) // block_size)
        for one in requests
    )
    core = scripted_core(
        MODEL,
        reference.tokenizer,
        num_blocks=most + rng.randint(0, 1),
        block_size=block_size,
        max_num_seqs=lanes,
        max_batch_tokens=lanes + rng.randint(0, 8),
        prefix_cache=rng.random() < 0.75,
    )
    return Workload(requests, arrivals, aborts, core)


def _request(
    rng: random.Random,
    reference: EngineCore,
    request_id: str,
    shared: list[list[int]],
    lanes: int,
) -> Request:
    prompt = rng.choice(shared)[: rng.randint(1, 6)]
    prompt = prompt + [rng.randrange(3, VOCAB) for _ in range(rng.randint(0, 2))]
    options: dict[str, Any] = {"max_tokens": rng.choice([0, 1, 4, 5, 6, 7])}
    for mixed in rng.sample(MIXTURE, rng.randint(0, 2)):
        options |= mixed
    width = options.get("best_of") or options.get("n", 1)
    if width > lanes:
        del options["n"]
        options.pop("best_of", None)
    if "best_of" in options or "prompt_logprobs" in options:
        options.pop("stream", None)
    if options["max_tokens"] < options.get("min_tokens", 0):
        del options["min_tokens"]
    if "best_of" in options:
        options["n"] = 1
    return request(
        reference,
        prompt,
        request_id,
        seed=rng.randrange(1 << 30),
        priority=rng.choice([0, 0, 0, 1, -1]),
        cache_salt=rng.choice(["", "", "", "salt"]),
        **options,
    )
