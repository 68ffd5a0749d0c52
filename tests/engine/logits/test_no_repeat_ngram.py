"""No n-gram twice."""

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from engine.logits.no_repeat_ngram import NoRepeatNgram
from tests.support.logits import END, Spec, apply, bits, histories, kept, random_rows


def test_each_row_matches_transformers_at_its_own_value() -> None:
    sizes = (0, 1, 2, 3, 4, 6, 30)
    logits = random_rows(700, 600)
    specs = [
        Spec({"no_repeat_ngram_size": sizes[row % len(sizes)]}, *history)
        for row, history in enumerate(histories(700, longest=25))
    ]

    got = apply(NoRepeatNgram, specs, logits)

    num_banned = 0
    for row, spec in enumerate(specs):
        size = spec.params["no_repeat_ngram_size"]
        if size:
            oracle = NoRepeatNGramLogitsProcessor(size)
            want = oracle(torch.tensor([spec.tokens]), logits[row, None])[0]
            assert torch.equal(got[row], want)
            num_banned += size > 1 and len(kept(want)) < 600
        else:
            assert torch.equal(bits(got[row]), bits(logits[row]))
    assert num_banned > 100


@pytest.mark.parametrize(
    ("size", "tokens", "banned"),
    [
        (2, [1, 2, 3, 1], {2}),
        (3, [1, 2, 3, 1, 2], {3}),
        (3, [1, 2], set()),  # shorter than one n-gram
        (2, [1, 1], {1}),  # an n-gram may overlap itself
        (1, [1, END, 4], {1, END, 4}),
        (2**63 - 1, [1, 2, 1, 2], set()),
    ],
)
@pytest.mark.parametrize("prompt_len", [1, 2])
def test_the_token_that_would_complete_a_known_ngram_is_banned(
    size: int, tokens: list[int], banned: set[int], prompt_len: int
) -> None:
    spec = Spec({"no_repeat_ngram_size": size}, tokens[:prompt_len], tokens[prompt_len:])
    assert kept(apply(NoRepeatNgram, [spec], torch.zeros(1, 6))[0]) == set(range(6)) - banned
