"""Words that must not be generated."""

import random
from typing import Any, cast

import pytest
import torch
from transformers import NoBadWordsLogitsProcessor

from engine.errors import InvalidRequest
from engine.logits.bad_words import BadWords
from engine.params import SamplingParams
from engine.prepare import ModelInfo, Output, prepare
from tests.support.logits import Spec, apply, bits, kept, random_rows


def test_each_row_matches_transformers_with_its_own_words() -> None:
    rng = random.Random(0)
    logits = random_rows(300, 600)
    specs = [
        Spec(
            {
                "bad_words": [
                    " ".join(str(rng.randint(3, 5)) for _ in range(rng.randint(1, 4)))
                    for _ in range(row % 4)
                ]
            },
            prompt=rng.choices(range(3, 6), k=rng.randint(1, 4)),
            output=rng.choices(range(3, 6), k=rng.randint(0, 6)),
        )
        for row in range(300)
    ]

    got = apply(BadWords, specs, logits)

    num_banned = 0
    for row, spec in enumerate(specs):
        words = [list(word) for word in spec.request.bad_word_ids]
        if words:
            # What it calls the input is all that it matches; here words begin in the output.
            output = torch.tensor([list(spec.output)], dtype=torch.int64)
            want = NoBadWordsLogitsProcessor(words)(output, logits[row, None])[0]
            assert torch.equal(got[row], want)
            num_banned += any(len(word) > 1 and word[-1] not in kept(want) for word in words)
        else:
            assert torch.equal(bits(got[row]), bits(logits[row]))
    assert num_banned > 50


@pytest.mark.parametrize(
    ("prompt", "output", "banned"),
    [
        ([1], [3, 4], True),
        ([1], [3, 4, 3, 4], True),
        ([1, 3, 4], [], False),  # the prompt is not generated
        ([1, 3], [4], False),
        ([1], [4, 3], False),
        ([1], [3], False),
    ],
)
def test_of_a_word_of_several_tokens_the_last_is_banned_after_the_others(
    prompt: list[int], output: list[int], banned: bool
) -> None:
    spec = Spec({"bad_words": ["3 4 5"]}, prompt, output)
    got = kept(apply(BadWords, [spec], torch.zeros(1, 8))[0])
    assert got == set(range(8)) - ({5} if banned else set())


class Words:
    """A tokenizer of a few known texts."""

    special = {2: "</s>"}  # noqa: RUF012
    ids = {  # noqa: RUF012
        "foo": [10],
        " foo": [20],
        "bar": [11, 12],
        " bar": [21, 12],
        "long": [13],
        " long": [3, 13],  # the space is a token of its own, so the word alone says it all
        "same": [14],
        " same": [14],
        "</s>": [2],
        " </s>": [3, 2],
        "never": [],
        " never": [3],
    }

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return self.ids[text]

    def encode_all(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def least_tokens(self, _text: str) -> int:
        return 0


def bad_word_ids(*words: str) -> tuple[tuple[int, ...], ...]:
    limits = dict.fromkeys(("vocab_size", "context_len", "num_lanes", "num_blocks"), 100)
    names = dict.fromkeys(("dtype", "device", "model_type", "identity"), "")
    info = ModelInfo(**limits, **names, block_size=4, eos_token_ids=frozenset({2}))
    return prepare(
        [1],
        SamplingParams(bad_words=list(words)),
        Output(),
        info,
        cast(Any, Words()),
        request_id="r",
    ).bad_word_ids


def test_a_word_is_banned_with_a_space_before_it_where_that_is_another_token() -> None:
    assert bad_word_ids("foo", "bar") == ((10,), (20,), (11, 12), (21, 12))
    assert bad_word_ids(" foo") == ((20,),)
    assert bad_word_ids("long", "same") == ((13,), (14,))


@pytest.mark.parametrize("word", ["</s>", "never"])
def test_a_word_that_ends_the_text_or_has_no_tokens_is_refused(word: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        bad_word_ids("foo", word)
    assert caught.value.param == "bad_words[1]"
