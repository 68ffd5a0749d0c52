"""The same seed gives the same tokens, whatever else the engine has done or is doing."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.core import EngineCore
from engine.messages import Delta, Request
from engine.prepare import ModelInfo
from tests.support import tiny
from tests.support.engines import Results, assert_all_free, record_plans, request, run, tiny_core

# Every stage has a part in one of these.
SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 1.4, "top_k": 40, "top_p": 0.9},
    "cold": {"temperature": 0.5, "min_p": 0.02, "typical_p": 0.95},
    "cut": {"temperature": 1.2, "top_n_sigma": 2.0, "epsilon_cutoff": 0.001, "eta_cutoff": 0.002},
    "penal": {
        "temperature": 1.0,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "penalty_last_n": 20,
    },
    "banned": {
        "temperature": 1.0,
        "no_repeat_ngram_size": 2,
        "bad_words": ["e", "th"],
        "logit_bias": {"9": 3.0, "10": -100},
        "min_tokens": 5,
    },
    "greedy": {"temperature": 0.0},
}


def prompt(name: str, length: int, vocab_size: int) -> list[int]:
    return [random.Random(f"{name}{index}").randrange(3, vocab_size) for index in range(length)]


class Model:
    """A folder, and what one request of it answers under any circumstances."""

    def __init__(self, folder: Path, vocab_size: int, num_tokens: int, cache_bytes: int) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.num_tokens = num_tokens
        self.cache_bytes = cache_bytes  # of one token

    def load(self, num_tokens: int = 4096, **config: Any) -> tuple[EngineCore, ModelInfo]:
        """An engine whose cache holds that many tokens."""
        memory = num_tokens * self.cache_bytes
        settings = {"max_model_len": 256, "max_num_seqs": 64, "kv_cache_memory": memory}
        return tiny_core(self.folder, **(settings | config))

    def request(self, core: EngineCore, name: str, **options: Any) -> Request:
        """One with its own prompt, seed and sampling parameters."""
        rng = random.Random(name)
        kind = name.split(".")[0]
        given = SAMPLED[kind] | {
            "seed": rng.randrange(1 << 40),
            "max_tokens": self.num_tokens,
            "ignore_eos": True,
            "logprobs": 0,
        }
        ids = prompt(kind, 21, self.vocab_size)
        return request(core, ids, name, **(given | options))

    def alone(self, core: EngineCore, names: list[str]) -> dict[str, Delta]:
        """Each in an otherwise idle engine."""
        return {name: run(core, self.request(core, name)).choices[name, 0] for name in names}


NAMES = [f"{kind}.0" for kind in SAMPLED]


@pytest.fixture(scope="module")
def small(tiny_folder: Path) -> Model:
    return Model(tiny_folder, tiny.VOCAB, 24, 2 * 2 * 2 * 16 * 4)


@pytest.fixture(scope="module")
def large(real_folder: Path) -> Model:
    return Model(real_folder, 49152, 16, 30 * 2 * 3 * 64 * 4)


@pytest.fixture(scope="module")
def want(small: Model) -> dict[str, Delta]:
    return small.alone(small.load(prefix_cache=False)[0], NAMES)


def check_same(got: Results, want: dict[str, Delta]) -> None:
    for name, delta in want.items():
        mine = got.choices[name, 0]
        assert [token.id for token in mine.tokens] == [token.id for token in delta.tokens], name
        assert mine.text == delta.text
        theirs = [token.logprob for token in delta.tokens]
        assert [token.logprob for token in mine.tokens] == pytest.approx(theirs, abs=1e-3)


def crowd(model: Model, core: EngineCore) -> Results:
    """64 requests at once: each kind of parameters with many seeds."""
    names = [f"{kind}.{index}" for index in range(10) for kind in SAMPLED][:64]
    return run(core, *(model.request(core, name) for name in names))


def starved(model: Model) -> Results:
    """Twelve requests, and a cache for three or four of them."""
    core, _ = model.load(num_tokens=144, max_model_len=128)
    names = [*NAMES, *(f"plain.{index}" for index in range(1, 6))]
    results = run(core, *(model.request(core, name) for name in names))
    assert core.scheduler.num_preemptions > 3
    assert_all_free(core)
    return results


def cached(model: Model) -> Results:
    """The same prompts a second time."""
    core, _ = model.load()
    run(core, *(model.request(core, name, max_tokens=5) for name in NAMES))
    results = run(core, *(model.request(core, name) for name in NAMES))
    assert all(finished.cached_tokens == 20 for finished in results.finished.values())
    return results


def in_parts(model: Model) -> Results:
    """Prompts in parts of a few tokens, while others decode."""
    core, _ = model.load(max_num_seqs=7, max_batch_tokens=9)
    plans = record_plans(core)
    results = run(core, *(model.request(core, name) for name in NAMES))
    lengths = {chunk.length for plan in plans for chunk in plan.chunks}
    assert len(lengths) > 4
    return results


@pytest.mark.parametrize("schedule", [starved, cached, in_parts])
def test_a_seed_gives_the_same_tokens_under_any_schedule(
    small: Model, want: dict[str, Delta], schedule: Callable[[Model], Results]
) -> None:
    check_same(schedule(small), want)


def test_a_seed_gives_the_same_tokens_in_a_crowd(small: Model, want: dict[str, Delta]) -> None:
    core, _ = small.load()
    results = crowd(small, core)
    check_same(results, want)
    texts = {tuple(token.id for token in delta.tokens) for delta in results.choices.values()}
    assert len(texts) > 50  # but for the greedy ones, every seed says something else


@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
def test_a_seed_gives_the_same_tokens_in_blocks_of_any_size(
    small: Model, want: dict[str, Delta], block_size: int
) -> None:
    core, _ = small.load(block_size=block_size)
    check_same(run(core, *(small.request(core, name) for name in NAMES)), want)


def test_stopping_and_starting_the_engine_changes_nothing(
    small: Model, want: dict[str, Delta]
) -> None:
    assert small.alone(small.load(prefix_cache=False)[0], NAMES) == want


def test_other_seeds_give_other_tokens(small: Model) -> None:
    core, _ = small.load()
    options: dict[str, Any] = {"max_tokens": 12}
    results = run(
        core,
        *(
            request(core, [5, 6, 7], f"{seed}", seed=seed, temperature=1.0, **options)
            for seed in (0, 1, 2, 1 << 32, -1 << 63, (1 << 63) - 1)
        ),
        request(core, [5, 6, 7], "random", temperature=1.0, **options),
        request(core, [5, 6, 7], "other", temperature=1.0, **options),
    )
    assert len({tuple(token.id for token in one.tokens) for one in results.choices.values()}) == 8


# -- choices


@pytest.mark.parametrize("kind", ["plain", "penal", "banned"])
def test_the_first_choice_is_that_of_a_single_one_and_the_others_differ(
    small: Model, kind: str
) -> None:
    name = f"{kind}.0"
    alone = run(small.load()[0], small.request(small.load()[0], name)).ids(name)
    core, _ = small.load()
    several = {n: run(core, small.request(core, name, n=n)) for n in (2, 5)}
    choices = [several[5].ids(name, index) for index in range(5)]
    assert choices[0] == several[2].ids(name, 0) == alone
    assert choices[1] == several[2].ids(name, 1)
    assert len({tuple(choice) for choice in choices}) == 5


def test_a_choice_is_no_other_seeds_first_choice(small: Model) -> None:
    core, _ = small.load()
    seven, eight = (run(core, small.request(core, "plain.0", seed=seed, n=3)) for seed in (7, 8))
    firsts = [results.ids("plain.0", index) for results in (seven, eight) for index in range(3)]
    assert len({tuple(choice) for choice in firsts}) == 6


def test_choices_survive_a_preemption_of_the_group(small: Model) -> None:
    core, _ = small.load()
    want = run(core, small.request(core, "plain.0", n=3))
    tight, _ = small.load(num_tokens=148, max_model_len=148)
    names = ("hot.0", "cold.0")
    requests = [small.request(tight, name) for name in names]
    got = run(tight, *requests, small.request(tight, "plain.0", n=3))
    assert got.finished["plain.0"].num_preemptions > 0
    for index in range(3):
        assert got.ids("plain.0", index) == want.ids("plain.0", index)


# -- Hugging Face


def test_greedy_tokens_are_those_of_generate(tiny_folder: Path) -> None:
    core, _ = tiny_core(tiny_folder, max_num_seqs=8, max_batch_tokens=16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    prompts = {f"r{length}": prompt("hf", length, tiny.VOCAB) for length in (1, 2, 7, 16, 40, 90)}
    results = run(core, *(request(core, ids, name, max_tokens=40) for name, ids in prompts.items()))
    for name, ids in prompts.items():
        given = torch.tensor([ids])
        made = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=40, do_sample=False
        )
        assert results.ids(name) == made[0, len(ids) :].tolist()


# -- the real model


@pytest.fixture(scope="module")
def real_want(large: Model) -> dict[str, Delta]:
    return large.alone(large.load(prefix_cache=False)[0], NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [starved, cached, in_parts])
def test_the_real_model_gives_the_same_tokens_under_any_schedule(
    large: Model, real_want: dict[str, Delta], schedule: Callable[[Model], Results]
) -> None:
    check_same(schedule(large), real_want)


@pytest.mark.slow
def test_the_real_model_gives_the_same_tokens_in_a_crowd(
    large: Model, real_want: dict[str, Delta]
) -> None:
    core, _ = large.load()
    check_same(crowd(large, core), real_want)
