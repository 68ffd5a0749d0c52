"""Beam search against transformers' `generate`, worked numbers and naive searches."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core import EngineCore
from engine.tokenizer import Tokenizer
from engine.types import Request
from tests.support import tiny
from tests.support.engines import (
    EOS,
    Results,
    assert_all_free,
    request,
    run,
    scripted_core,
    tiny_core,
)
from tests.support.scripted import ScriptedModel

A, B, E = 10, 11, EOS
START = 12
# A Markov chain: what may follow a token, and how likely.
TOY = {START: {A: 0.5, B: 0.4, E: 0.1}, A: {A: 0.3, B: 0.3, E: 0.4}, B: {A: 0.05, B: 0.05, E: 0.9}}


def toy(token: int, _position: int) -> torch.Tensor:
    row = torch.full((tiny.VOCAB,), -1e9)
    for following, prob in TOY.get(token, {E: 1.0}).items():
        row[following] = torch.tensor(prob, dtype=torch.float64).log()
    return row


def toy_core(tokenizer: Tokenizer, **config: Any) -> EngineCore:
    return scripted_core(ScriptedModel(toy, context_len=64), tokenizer, **config)


def beams(core: EngineCore, prompt: list[int], request_id: str = "r", **options: Any) -> Request:
    return request(core, prompt, request_id, use_beam_search=True, **options)


def hypotheses(results: Results, request_id: str = "r") -> list[tuple[list[int], float]]:
    """Each choice's tokens and score, best first."""
    found = [(key[1], delta) for key, delta in results.choices.items() if key[0] == request_id]
    return [
        ([token.id for token in delta.tokens], delta.report["sequence_score"])
        for _, delta in sorted(found, key=lambda pair: pair[0])
    ]


@pytest.mark.parametrize(
    ("stopping", "alpha", "want"),
    [
        (False, 1.0, [([B, E], -0.510826), ([A, E], -0.804719)]),
        (True, 1.0, [([B, E], -0.510826), ([A, E], -0.804719)]),
        ("never", 1.0, [([B, E], -0.510826), ([A, B, E], -0.667494)]),
        ("never", 2.0, [([A, B, E], -0.222498), ([B, E], -0.255413)]),
        ("never", 0.0, [([B, E], -1.021651), ([A, E], -1.609438)]),
    ],
)
def test_worked_examples_of_stopping(
    tokenizer: Tokenizer, stopping: Any, alpha: float, want: list[tuple[list[int], float]]
) -> None:
    core = toy_core(tokenizer)
    options = {"max_tokens": 3, "n": 2, "early_stopping": stopping, "length_penalty": alpha}
    got = hypotheses(run(core, beams(core, [START], **options)))
    assert [ids for ids, _ in got] == [ids for ids, _ in want]
    assert [score for _, score in got] == pytest.approx([score for _, score in want], abs=1e-5)
    assert_all_free(core)


def test_worked_example_of_the_gnmt_length_penalty(tokenizer: Tokenizer) -> None:
    core = toy_core(tokenizer)
    options = {"max_tokens": 3, "n": 2, "length_penalty": 0.6, "length_penalty_type": "gnmt"}
    got = hypotheses(run(core, beams(core, [START], **options)))
    assert got[0] == ([B, E], pytest.approx(-0.931396, abs=1e-5))
    assert got[1] == ([A, E], pytest.approx(-1.467257, abs=1e-5))


# -- transformers

RULES: list[dict[str, Any]] = [
    {"early_stopping": stopping, "length_penalty": penalty}
    for stopping in (True, False, "never")
    for penalty in (1.0, 0.0, 2.0, -0.5)
]


class Oracle:
    """A tiny model in both programs. Some of its tokens end a text, so that searches do end."""

    def __init__(self, folder: Path, num_ends: int = 8) -> None:
        self.core, _ = tiny_core(folder, prefix_cache=True, kv_cache_memory=1 << 25)
        self.model = tiny.load(folder)
        self.ends = sorted(random.Random(7).sample(range(3, tiny.VOCAB), num_ends))

    def ours(self, prompts: list[list[int]], **options: Any) -> list[list[tuple[list[int], float]]]:
        """The hypotheses of each prompt, all searched for together."""
        requests = [
            replace(
                beams(self.core, prompt, str(index), **options),
                eos_token_ids=frozenset(self.ends),
            )
            for index, prompt in enumerate(prompts)
        ]
        results = run(self.core, *requests)
        assert not results.failed
        assert_all_free(self.core)
        return [hypotheses(results, str(index)) for index in range(len(prompts))]

    def theirs(
        self, prompt: list[int], width: int, n: int, max_tokens: int, **options: Any
    ) -> list[tuple[list[int], float]]:
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([prompt]),
                num_beams=width,
                num_return_sequences=n,
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=self.ends,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
                **options,
            )
        found = []
        for ids, score in zip(output.sequences, output.sequences_scores.tolist(), strict=True):
            tokens = ids[len(prompt) :].tolist()
            end = next((i for i, t in enumerate(tokens) if t in self.ends), len(tokens) - 1)
            found.append((tokens[: end + 1], score))
        return found


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    # Less peaked than the other tiny models: hypotheses shall compete.
    model = tiny.hf_model("llama", initializer_range=0.15)
    return Oracle(tiny.save(model, tmp_path_factory.mktemp("beams")))


def prompts_of(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, tiny.VOCAB) for _ in range(rng.randint(1, 9))] for _ in range(count)]


def assert_same(
    got: list[tuple[list[int], float]], want: list[tuple[list[int], float]], *about: Any
) -> None:
    assert [ids for ids, _ in got] == [ids for ids, _ in want], about
    assert [s for _, s in got] == pytest.approx([s for _, s in want], rel=1e-5, abs=2e-5), about


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_hypotheses_are_those_of_transformers(oracle: Oracle, rules: dict[str, Any]) -> None:
    for width in (1, 2, 3, 5, 8, 16) if rules["length_penalty"] == 1.0 else (2, 4):
        n = max(width // 2, 1)
        prompts = prompts_of(6, seed=width)
        got = oracle.ours(prompts, beam_width=width, n=n, max_tokens=9, **rules)
        for prompt, ours in zip(prompts, got, strict=True):
            # Without beams its greedy search has no scores.
            if width > 1:
                assert_same(ours, oracle.theirs(prompt, width, n, 9, **rules), width, prompt)


def test_the_hypotheses_that_are_compared_differ(oracle: Oracle) -> None:
    """So that the tests around this one show something."""
    found = oracle.ours(prompts_of(20, seed=4), beam_width=4, n=4, max_tokens=9)
    assert {len(ids) for one in found for ids, _ in one} >= {4, 6, 8, 9}
    greedy = oracle.ours(prompts_of(20, seed=4), beam_width=1, max_tokens=9)
    assert sum(one[0][0] != wide[0][0] for one, wide in zip(greedy, found, strict=True)) > 8


PROCESSED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    ({"min_tokens": 5}, {"min_new_tokens": 5}),
    (
        {"repetition_penalty": 0.8, "no_repeat_ngram_size": 1, "min_tokens": 3},
        {"repetition_penalty": 0.8, "no_repeat_ngram_size": 1, "min_new_tokens": 3},
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), PROCESSED, ids=str)
def test_penalties_and_bans_apply_to_every_beam(
    oracle: Oracle, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    prompts = prompts_of(8, seed=1)
    for width, n in ((2, 2), (4, 3)):
        rules = {"beam_width": width, "n": n, "max_tokens": 9, "sampler_order": "hf"}
        got = oracle.ours(prompts, **rules, **ours)
        for prompt, one in zip(prompts, got, strict=True):
            assert_same(one, oracle.theirs(prompt, width, n, 9, **theirs), width, prompt)


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_hundreds_of_searches_are_those_of_transformers(
    oracle: Oracle, rules: dict[str, Any]
) -> None:
    for width, n in ((2, 1), (3, 3), (4, 2), (7, 5), (16, 16)):
        prompts = prompts_of(12, seed=100 + width)
        for max_tokens in (3, 12):
            got = oracle.ours(prompts, beam_width=width, n=n, max_tokens=max_tokens, **rules)
            for prompt, ours in zip(prompts, got, strict=True):
                want = oracle.theirs(prompt, width, n, max_tokens, **rules)
                assert_same(ours, want, width, max_tokens, prompt)
