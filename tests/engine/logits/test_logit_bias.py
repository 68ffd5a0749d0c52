"""Additive biases by token id."""

import random

import torch
from transformers import SequenceBiasLogitsProcessor

from engine.logits.logit_bias import LogitBias
from engine.numerics import NEG_INF
from tests.support.logits import Spec, apply, bits, one_row, random_rows


def test_each_row_matches_transformers_with_its_own_biases() -> None:
    logits = random_rows(60, 1000)
    rng = random.Random(0)
    biases = [
        {rng.randrange(1000): rng.uniform(-100, 100) for _ in range(row % 7)} for row in range(60)
    ]

    got = apply(LogitBias, [Spec({"logit_bias": bias}) for bias in biases], logits)

    for row, bias in enumerate(biases):
        if bias:
            oracle = SequenceBiasLogitsProcessor({(key,): value for key, value in bias.items()})
            want = oracle(torch.tensor([[1]]), logits[row, None])[0]
            assert torch.equal(got[row], want)
        else:
            assert torch.equal(bits(got[row]), bits(logits[row]))


def test_biases_beyond_a_hundred_count_as_a_hundred_and_ban_nothing() -> None:
    got = one_row(LogitBias, torch.zeros(4), logit_bias={0: -1e9, 1: 250.0, 2: -100.0})
    assert got.tolist() == [-100.0, 100.0, -100.0, 0.0]


def test_a_bias_cannot_bring_a_banned_token_back() -> None:
    got = one_row(LogitBias, torch.tensor([NEG_INF, 0.0]), logit_bias={0: 100.0})
    assert got.tolist() == [NEG_INF, 0.0]
