"""Only the listed tokens."""

import random

import torch
from transformers import PrefixConstrainedLogitsProcessor

from engine.logits.allowed_tokens import AllowedTokens
from tests.support.logits import END, Spec, apply, bits, kept, one_row, random_rows


def test_each_row_matches_transformers_with_its_own_list() -> None:
    logits = random_rows(60, 1000)
    rng = random.Random(0)
    lists = [[rng.randrange(1000) for _ in range(1 + row % 9 * 30)] for row in range(60)]

    specs = [Spec({"allowed_token_ids": allowed}) for allowed in lists]
    specs[7] = Spec()
    got = apply(AllowedTokens, specs, logits)

    assert torch.equal(bits(got[7]), bits(logits[7]))
    for row, allowed in enumerate(lists):
        if row != 7:
            oracle = PrefixConstrainedLogitsProcessor(lambda _batch, _ids, a=allowed: a, 1)
            assert torch.equal(got[row], oracle(torch.tensor([[1]]), logits[row, None])[0])


def test_the_end_of_sequence_must_be_listed_like_any_token() -> None:
    assert kept(one_row(AllowedTokens, torch.zeros(6), allowed_token_ids=[3, 4])) == {3, 4}
    assert END in kept(one_row(AllowedTokens, torch.zeros(6), allowed_token_ids=[3, END]))
