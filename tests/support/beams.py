"""Beam searches for tests: requests, their hypotheses, and a Markov chain to search in."""

import random
from dataclasses import replace
from typing import Any

import torch

from engine.core import EngineCore
from engine.messages import Request
from engine.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.engines import EOS, Results, request, scripted_core
from tests.support.scripted import ScriptedModel

A, B, E = 10, 11, EOS
START = 12
# What may follow a token, and how likely.
TOY = {START: {A: 0.5, B: 0.4, E: 0.1}, A: {A: 0.3, B: 0.3, E: 0.4}, B: {A: 0.05, B: 0.05, E: 0.9}}

# Some of the tiny models' tokens that may end a text, so that searches do end.
ENDS = tuple(sorted(random.Random(7).sample(range(3, tiny.VOCAB), 8)))


def toy(token: int, _position: int) -> torch.Tensor:
    """The chain as a script."""
    row = torch.full((tiny.VOCAB,), -1e9)
    for following, prob in TOY.get(token, {E: 1.0}).items():
        row[following] = torch.tensor(prob, dtype=torch.float64).log()
    return row


def toy_core(tokenizer: Tokenizer, **config: Any) -> EngineCore:
    return scripted_core(ScriptedModel(toy, context_len=64), tokenizer, **config)


def beams(
    core: EngineCore,
    prompt: list[int],
    request_id: str = "r",
    ends: tuple[int, ...] = (EOS,),
    **options: Any,
) -> Request:
    made = request(core, prompt, request_id, use_beam_search=True, **options)
    return replace(made, eos_token_ids=frozenset(ends))


def hypotheses(results: Results, request_id: str = "r") -> list[tuple[list[int], float]]:
    """Each choice's tokens and score, best first."""
    found = [(key[1], delta) for key, delta in results.choices.items() if key[0] == request_id]
    return [
        ([token.id for token in delta.tokens], delta.report["sequence_score"])
        for _, delta in sorted(found, key=lambda pair: pair[0])
    ]


def prompts_of(count: int, seed: int) -> list[list[int]]:
    """Random prompts of one to nine tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(3, tiny.VOCAB) for _ in range(rng.randint(1, 9))] for _ in range(count)]
