"""Words at the end of a history."""

import random

import torch

from engine.lanes import Lanes
from engine.logits.words import Words
from engine.types import Rows

CONTEXT = 40


def banned(words: Words, lane_ids: list[int], histories: list[list[int]]) -> list[set[int]]:
    """What each row must not get next."""
    rows = Rows.build(lane_ids, [len(tokens) - 1 for tokens in histories], "cpu")
    row, last, there = words.at(rows)
    return [set(last[there & (row == index)].tolist()) for index in range(len(lane_ids))]


def naive(prompt_len: int, tokens: list[int], words: list[tuple[int, ...]]) -> set[int]:
    output = tuple(tokens[prompt_len:])
    return {
        word[-1]
        for word in words
        if len(word) == 1 or output[len(output) - len(word) + 1 :] == word[:-1]
        if len(word) - 1 <= len(output)
    }


def test_each_lane_finds_its_own_words_as_a_search_of_each_does() -> None:
    rng = random.Random(3)
    lanes = Lanes(8, CONTEXT)
    words = Words(lanes)
    found = 0
    for _ in range(200):
        lane_ids = rng.sample(range(8), rng.randint(1, 8))
        given, histories, prompts = [], [], []
        for lane in lane_ids:
            tokens = rng.choices(range(3), k=rng.randint(1, CONTEXT))
            prompt_len = rng.randint(1, len(tokens))
            own = [
                tuple(rng.choices(range(3), k=rng.choice([1, 2, 2, 3, 5])))
                for _ in range(rng.randint(0, 6))
            ]
            lanes.write(lane, tokens, prompt_len, seed=0)
            words.write(lane, own)
            given.append(own)
            histories.append(tokens)
            prompts.append(prompt_len)
        want = [naive(*one) for one in zip(prompts, histories, given, strict=True)]
        assert banned(words, lane_ids, histories) == want
        found += sum(map(bool, want))
    assert found > 200


def test_a_long_word_costs_its_own_tokens_and_no_more() -> None:
    """One as long as the context beside a thousand short ones is not a thousand long ones."""
    lanes = Lanes(4, 5000)
    words = Words(lanes)
    words.write(0, [tuple(range(4000)), *((token,) for token in range(1000))])
    words.write(1, [(token,) for token in range(1000)])
    (long, short) = (words._kept.get(lane) for lane in (0, 1))
    assert long is not None
    assert short is not None
    assert (len(long.leading), len(short.leading)) == (3999, 0)
    lanes.fork([0], [2])
    assert words._kept.get(2) is long
    for lane in (0, 2):
        lanes.release(lane)
    assert len(words) == 1
    assert words.of(0) == ()


def test_words_reach_no_further_back_than_asked() -> None:
    lanes = Lanes(1, 8)
    words = Words(lanes)
    lanes.write(0, [7, 8, 9], prompt_len=1, seed=0)
    words.write(0, [(7, 8, 9, 1), (8, 9, 2), (9, 3), (4,)])
    for begin, want in ((0, {1, 2, 3, 4}), (1, {2, 3, 4}), (2, {3, 4}), (3, {4})):
        _, last, there = words.ending([0], torch.tensor([3]), torch.tensor([begin]))
        assert set(last[there].tolist()) == want
