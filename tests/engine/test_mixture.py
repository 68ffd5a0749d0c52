"""Requests of every strategy in one small engine answer as each of them does alone."""

import random
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import engine.core
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import GenerationFailed, InvalidRequest
from engine.load import load_engine
from engine.messages import Request, TraceWish
from engine.params import SamplingParams
from engine.prepare import ModelInfo, Output, prepare
from engine.strategies import choose
from engine.strategies.base import Branch, Strategy, View
from engine.types import Sequence
from tests.support import tiny
from tests.support.engines import Results, assert_all_free, collect, record_plans, run
from tests.support.invariants import check

NUM_WORKLOADS = 12
NUM_REQUESTS = 11
PROMPT_LEN = 6

# Who decides which sequences there are; numbers are drawn for each request.
METHODS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "greedy": lambda _: {"temperature": 0.0},
    "sampled": lambda rng: {"temperature": rng.uniform(0.5, 1.5)},
    "n": lambda rng: {"n": rng.randint(2, 3)},
    "best_of": lambda _: {"n": 1, "best_of": 3},
    "beam": lambda rng: beams(rng) | {"early_stopping": rng.choice([True, False, "never"])},
    "gnmt": lambda rng: beams(rng) | {"length_penalty_type": "gnmt", "coverage_penalty": 0.2},
    "pruned": lambda rng: beams(rng) | {"length_penalty_type": "vllm", "beam_prune": 2.0},
    "plain scores": lambda rng: beams(rng) | {"sampler_order": "hf"},
    "diverse": lambda rng: (
        beams(rng)
        | {"beam_width": 4, "num_beam_groups": 2, "diversity_penalty": rng.uniform(0.1, 2.0)}
    ),
    "stochastic": lambda rng: beams(rng) | {"stochastic_beams": True},
    "best first": lambda rng: (
        beams(rng) | {"beam_strategy": "best_first", "beam_memory": rng.choice([0, 4])}
    ),
    "a star": lambda rng: beams(rng) | {"beam_strategy": "astar"},
    "contrastive": lambda rng: {
        "penalty_alpha": rng.uniform(0.1, 0.9),
        "top_k": rng.randint(2, 4),
    },
    "cot": lambda rng: {
        "cot_branches": rng.randint(2, 4),
        "cot_branch_position": rng.choice([0, 0, 2]),
        "cot_aggregate": rng.choice(["max", "sum"]),
        "cot_pattern": rng.choice(["[a-m]+", "[0-9]", "[n-z]"]),
        "n": rng.randint(1, 2),
    },
    "sed": lambda rng: {
        "temperature": rng.choice([0.0, 1.0]),
        "sed": {
            "detector": "either",
            "delta_e": 3.5,
            "delta_r": 0.7,
            "k": rng.randint(2, 3),
            "rollout_tokens": rng.randint(1, 4),
            "eval_prompt": "ok?",
            "verdict_tokens": ["y", "n"],
            "max_points": 3,
        },
    },
}

# What is beside or inside its rows, with any method that goes with it.
COMPANY: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "guidance": lambda rng: {
        "guidance_scale": rng.uniform(0.5, 2.0),
        "negative_prompt": rng.choice(["hello", None]),
    },
    "amateur": lambda rng: {"cd_amateur": "small", "cd_beta": rng.choice([None, 0.5])},
    "dola": lambda rng: {
        "dola_layers": rng.choice(["low", "high", [0, 2]]),
        "dola_mode": rng.choice(["paper", "hf"]),
        "dola_relative_top": 0.01,
    },
    "kl": lambda _: {"kl_bandwidth": 0.5, "kl_reference_prompt": "abc"},
    "pause": lambda rng: {"num_pause_tokens": rng.randint(1, 5), "pause_token": "."},
    "latent": lambda rng: {"num_latent_thoughts": rng.randint(1, 4)},
    "entropix": lambda rng: {"entropix": {"profile": rng.choice(["2024-10-07", "head"])}},
}

EXTRAS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05},
    {"mirostat": 2, "mirostat_tau": 4.0},
    {"dynatemp_range": 0.4},
    {"repetition_penalty": 1.3, "penalty_last_n": 5},
    {"frequency_penalty": 0.8, "presence_penalty": 0.4},
    {"no_repeat_ngram_size": 2},
    {"dry_multiplier": 0.8},
    {"logit_bias": {"2": 3.0, "70": 2.0}},
    {"allowed_token_ids": [2, *range(60, 100)]},
    {"bad_words": ["e", "th"]},
    {"ignore_eos": True, "logit_bias": {"2": 4.0}},
    {"min_tokens": 3, "logit_bias": {"2": 5.0}},
    {"stop_token_ids": [*range(3, 15)]},
    {"stop": ["a", "e", "o", "x", "K"]},
    {"stop": ["t", "r", "B", "9"], "include_stop_str_in_output": True},
)

KINDS = [*METHODS, *COMPANY]

TOLD: tuple[dict[str, Any], ...] = (
    {},
    {"stream": True},
    {"logprobs": 2},
    {"logprobs": 0, "stream": True},
    {"prompt_logprobs": 1},
    {"trace": TraceWish(top=3)},
    {"trace": TraceWish(top=2, layers=(0, 2)), "logprobs": 1},
)


def beams(rng: random.Random) -> dict[str, Any]:
    width = rng.randint(2, 4)
    return {
        "use_beam_search": True,
        "beam_width": width,
        "n": rng.randint(1, width),
        "length_penalty": rng.choice([1.0, 0.0, 0.6, 2.0]),
    }


class Models:
    """A tiny model and its amateur, and engines of any size around them."""

    def __init__(self, folder: Path) -> None:
        # Less peaked than the other tiny models: hypotheses shall compete.
        big = tiny.hf_model("llama", initializer_range=0.15, num_hidden_layers=4)
        small = tiny.hf_model("llama", seed=3, initializer_range=0.15, num_hidden_layers=1)
        config = EngineConfig(
            dtype="float32", block_size=16, max_num_seqs=16, kv_cache_memory=1 << 22
        )
        amateur = "small", tiny.save(small, folder / "small")
        # In the roomy engine everything is computed in one go, and nothing is reused.
        config = config.model_copy(update={"prefix_cache": False})
        self.roomy, self.info = load_engine(config, tiny.save(big, folder / "big"), amateur)

    def cramped(self, rng: random.Random) -> tuple[EngineCore, ModelInfo]:
        """An engine whose memory is short, and whose steps are."""
        block_size = rng.randint(1, 6)
        lanes = rng.randint(10, 16)
        config = EngineConfig(
            block_size=block_size, max_num_seqs=lanes, max_batch_tokens=lanes + rng.randint(4, 12)
        )
        info = replace(
            self.info,
            num_lanes=lanes,
            num_blocks=rng.randint(56, 80) // block_size,
            block_size=block_size,
            batch_tokens=config.batch_tokens("cpu"),
        )
        core = EngineCore(
            self.roomy.models[0],
            self.roomy.tokenizer,
            config,
            num_blocks=info.num_blocks,
            context_len=self.info.context_len,
            device="cpu",
            amateur=self.roomy.models[1],
        )
        return core, info


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("mixture"))


@dataclass
class Seen:
    """How often what is to be tested has happened."""

    finished: Counter[str] = field(default_factory=Counter)  # requests, by kind
    preempted: Counter[str] = field(default_factory=Counter)
    aborted: Counter[str] = field(default_factory=Counter)
    pairs: set[str] = field(default_factory=set)  # of method and company
    preemptions: int = 0
    cache_hits: int = 0  # tokens
    copies: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})  # by model
    chunked: int = 0  # prompts computed in parts


@dataclass(frozen=True)
class Asked:
    """A request, and what is to be made of it."""

    request: Request
    method: str
    company: str
    arrival: int
    abort: int | None  # after so many steps

    @property
    def kinds(self) -> list[str]:
        return [self.method, self.company] if self.company else [self.method]


def test_every_strategy_answers_in_the_crowd_as_it_does_alone(models: Models) -> None:
    seen = Seen()
    for number in range(NUM_WORKLOADS):
        mix(models, number, seen)
    assert min(seen.finished[kind] for kind in KINDS) > 2
    assert len(seen.preempted) > 14
    assert len(seen.pairs) > 40
    assert len(seen.aborted) > 10
    assert seen.preemptions > 25
    assert seen.cache_hits > 40
    assert min(seen.copies.values()) > 15
    assert seen.chunked > 40


@pytest.mark.slow
def test_hundreds_of_requests_of_every_strategy_answer_as_they_do_alone(models: Models) -> None:
    torch.set_num_threads(1)  # slow by its number of steps, not by their size
    seen = Seen()
    for number in range(1000, 1080):
        mix(models, number, seen)
    assert min(seen.finished[kind] for kind in KINDS) > 15
    assert min(seen.preempted[kind] for kind in KINDS) > 1
    assert len(seen.pairs) > 70
    assert seen.preemptions > 200


def mix(models: Models, number: int, seen: Seen) -> None:
    """Run a random workload, and compare what comes of it with each request's lone run."""
    rng = random.Random(number)
    core, info = models.cramped(rng)
    asked = workload(rng, core, info, number)
    try:
        got = run_checked(core, asked, seen)
        assert not got.failed
        for one in asked:
            if one.request.request_id in got.finished:
                compare(got, alone(models, one.request), one.request.request_id)
    except BaseException as error:
        error.add_note(f"workload {number}")
        raise


def alone(models: Models, request: Request) -> Results:
    """What the request gives where there is nothing else."""
    results = run(models.roomy, replace(request, stream=False))
    assert_all_free(models.roomy)
    assert models.roomy.scheduler.num_preemptions == 0
    return results


def compare(got: Results, want: Results, request_id: str) -> None:
    """Everything that a client gets to know is the same, numbers but for rounding."""
    try:
        assert {key for key in got.choices if key[0] == request_id} == set(want.choices)
        for key, delta in want.choices.items():
            check_same(asdict(got.choices[key]), asdict(delta))
        mine, theirs = got.finished[request_id], want.finished[request_id]
        for name in ("prompt_tokens", "completion_tokens", "longest_tokens", "finish_reasons"):
            assert getattr(mine, name) == getattr(theirs, name)
    except AssertionError as error:
        error.add_note(request_id)
        raise


def check_same(got: Any, want: Any) -> None:
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for name, value in want.items():
            check_same(got[name], value)
    elif isinstance(want, Seq) and not isinstance(want, str):
        assert len(got) == len(want), (got, want)
        for one, other in zip(got, want, strict=True):
            check_same(one, other)
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-4)
    else:
        assert got == want


def run_checked(core: EngineCore, asked: list[Asked], seen: Seen) -> Results:
    """Step through a workload, checking after each step."""
    results = Results()
    plans = record_plans(core)
    aborted: set[str] = set()
    last = max(max(one.arrival, one.abort or 0) for one in asked)
    for step in range(2000):
        for one in asked:
            if one.arrival == step:
                core.submit(one.request)
            if one.abort == step:
                core.abort(one.request.request_id)
                if one.request.request_id not in results.finished | results.failed:
                    aborted.add(one.request.request_id)
                    seen.aborted.update(one.kinds)
        if core.has_work:
            messages, _ = core.step()
            collect(results, messages)
            assert not aborted & {message.request_id for message in messages}
        elif step > last:
            break
        check(core)
    assert not core.has_work
    assert_returned(core)
    for one in asked:
        request_id = one.request.request_id
        assert (request_id in results.finished | results.failed) != (request_id in aborted)
        if request_id in results.finished:
            finished = results.finished[request_id]
            seen.finished.update(one.kinds)
            seen.pairs.add(" with ".join(one.kinds))
            seen.preempted.update(one.kinds if finished.num_preemptions else ())
    seen.preemptions += core.scheduler.num_preemptions
    seen.cache_hits += core.scheduler.cache_hits
    for plan in plans:
        for copy in plan.copies:
            seen.copies[copy.model] += 1
        seen.chunked += sum(chunk.end < chunk.sequence.prompt_len for chunk in plan.chunks)
    return results.merge()


def assert_returned(core: EngineCore) -> None:
    """Everything has been given back, of the amateur's memory too."""
    assert_all_free(core)
    for pool in core.scheduler.pools:
        assert pool.num_free == pool.num_blocks
        assert not any(pool.refs)


def workload(rng: random.Random, core: EngineCore, info: ModelInfo, number: int) -> list[Asked]:
    shared = [rng.randrange(3, tiny.VOCAB) for _ in range(PROMPT_LEN)]
    asked = []
    for index in range(NUM_REQUESTS):
        prompt = shared[: rng.randint(1, PROMPT_LEN)] if rng.random() < 0.7 else []
        prompt = prompt + [rng.randrange(3, tiny.VOCAB) for _ in range(rng.randint(not prompt, 3))]
        kind = KINDS[(number * NUM_REQUESTS + index) % len(KINDS)]
        method, company, request = acceptable(rng, core, info, kind, prompt, f"{number}.{index}")
        arrival = rng.randint(0, 4)
        abort = arrival + rng.randint(0, 20) if rng.random() < 0.15 else None
        asked.append(Asked(request, method, company, arrival, abort))
    return asked


def acceptable(
    rng: random.Random,
    core: EngineCore,
    info: ModelInfo,
    kind: str,
    prompt: list[int],
    request_id: str,
) -> tuple[str, str, Request]:
    """A method and its company, one of them of this kind, and a request that this engine takes."""
    for _ in range(500):
        method = kind if kind in METHODS else rng.choice([*METHODS])
        company = rng.choice([*COMPANY]) if rng.random() < 0.6 else ""
        company = kind if kind in COMPANY else company
        options: dict[str, Any] = {
            "max_tokens": rng.randint(2, 14),
            "seed": rng.randrange(1 << 30),
        }
        for extra in rng.sample(EXTRAS, rng.randint(0, 2)):
            options |= extra
        options |= METHODS[method](rng)
        if company:
            options |= COMPANY[company](rng)
        told = dict(rng.choice(TOLD))
        if options.get("best_of") or "prompt_logprobs" in told:
            told.pop("stream", None)
        try:
            request = prepare(
                prompt,
                SamplingParams.model_validate(options),
                Output(**told),
                info,
                core.tokenizer,
                request_id=request_id,
                priority=rng.choice([0, 0, 0, 1, -1]),
                cache_salt=rng.choice(["", "", "", "salt"]),
            )
        except (ValidationError, InvalidRequest):
            continue
        return method, company, request
    raise AssertionError("nothing is accepted")


# -- strategies that fail


class Broken:
    """A strategy that raises in one of its methods, the `calls`-th time that it is called."""

    def __init__(self, whole: Strategy, method: str, calls: int) -> None:
        self._whole = whole
        self._method = method
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def advance(self, live: list[Sequence], view: View) -> list[Branch]:
        self._count("advance")
        return self._whole.advance(live, view)

    def rank(self, finished: list[Sequence]) -> list[Sequence]:
        self._count("rank")
        return self._whole.rank(finished)

    def remember(self, start: int, hidden: torch.Tensor) -> None:
        self._count("remember")
        self._whole.remember(start, hidden)

    def _count(self, method: str) -> None:
        self._calls -= method == self._method
        if self._calls == 0:
            raise ZeroDivisionError


BREAKS = [("advance", 1), ("advance", 3), ("rank", 1)]


def test_a_strategy_that_raises_ends_its_request_alone(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks: dict[str, tuple[str, int]] = {}

    def choose_broken(request: Request) -> Strategy:
        whole = choose(request)
        number = int(request.request_id.split(".")[1])
        if whole.wants.hidden:
            chosen = "remember", 1
        elif number % 2:
            return whole
        else:
            chosen = BREAKS[number // 2 % len(BREAKS)]
        breaks[request.request_id] = chosen
        return Broken(whole, *chosen)

    failed = Counter[tuple[str, int]]()
    for number in range(2000, 2003):
        rng = random.Random(number)
        core, info = models.cramped(rng)
        asked = workload(rng, core, info, number)
        with monkeypatch.context() as patched:
            patched.setattr(engine.core, "choose", choose_broken)
            got = run_checked(core, asked, Seen())
        assert got.failed.keys() <= breaks.keys()
        early = {i for i, (_, calls) in breaks.items() if calls == 1}
        assert not early & got.finished.keys()
        failed.update(breaks[request_id] for request_id in got.failed)
        for failure in got.failed.values():
            assert isinstance(failure.error, GenerationFailed)
        for request_id in got.finished:
            (request,) = [r.request for r in asked if r.request.request_id == request_id]
            compare(got, alone(models, request), request_id)
    assert failed.keys() == {*BREAKS, ("remember", 1)}
