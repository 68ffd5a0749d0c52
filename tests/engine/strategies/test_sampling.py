"""Independent sequences: every one goes on with its own token, and the best are ranked."""

import pytest

from engine.messages import Request, Token
from engine.params import SamplingParams
from engine.strategies import choose
from engine.strategies.base import View
from engine.strategies.sampling import Sampling
from engine.text import Detokenizer, TextStream
from engine.tokenizer import Tokenizer
from engine.types import Sequence


def sequence(tokenizer: Tokenizer, index: int, logprobs: list[float]) -> Sequence:
    """A sequence of a prompt of two tokens and as many of its own as there are logprobs."""
    stream = TextStream(Detokenizer(tokenizer, skip_special_tokens=True))
    ids = list(range(5, 7 + len(logprobs)))
    return Sequence(index, 0, ids, 2, stream, cumulative_logprob=sum(logprobs))


def test_each_sequence_goes_on_with_its_own_token(tokenizer: Tokenizer) -> None:
    live = [sequence(tokenizer, index, []) for index in (2, 0, 1)]
    tokens = [Token(10, "", -1.0), Token(11, "", -2.0), Token(10, "", -3.0)]
    branches = Sampling(3, 3).advance(live, View(tokens))
    assert [branch.parent for branch in branches] == live
    assert [branch.tokens for branch in branches] == [(token,) for token in tokens]


@pytest.mark.parametrize(
    ("n", "indices"),
    [
        (1, [3]),
        (2, [3, 0]),
        (3, [3, 0, 2]),  # equal means: the lower index first
        (4, [0, 1, 2, 3]),  # all of them are wanted, so nothing is ranked
    ],
)
def test_the_highest_mean_logprobs_are_returned_best_first(
    tokenizer: Tokenizer, n: int, indices: list[int]
) -> None:
    finished = [
        sequence(tokenizer, 2, [-1.0, -1.0, -1.0]),
        sequence(tokenizer, 0, [-1.0]),
        sequence(tokenizer, 3, [-0.5, -0.9, -0.4, -0.8]),
        sequence(tokenizer, 1, [-2.0]),
    ]
    strategy = Sampling(4, n)
    assert [ranked.index for ranked in strategy.rank(finished)] == indices
    assert strategy.streams is (n == 4)


def test_a_sequence_without_a_token_can_be_ranked(tokenizer: Tokenizer) -> None:
    finished = [sequence(tokenizer, 0, []), sequence(tokenizer, 1, [-1.0])]
    assert [ranked.index for ranked in Sampling(2, 1).rank(finished)] == [0]


@pytest.mark.parametrize(
    ("params", "width", "n", "streams"),
    [
        ({}, 1, 1, True),
        ({"n": 3}, 3, 3, True),
        ({"n": 2, "best_of": 5}, 5, 2, False),
        ({"n": 2, "best_of": 2}, 2, 2, True),
    ],
)
def test_parameters_choose_how_many_sequences_run(
    params: dict[str, int], width: int, n: int, streams: bool
) -> None:
    request = Request("r", (1,), SamplingParams.model_validate(params), max_tokens=1, seed=0)
    strategy = choose(request)
    assert isinstance(strategy, Sampling)
    assert (strategy.width, strategy.n, strategy.streams) == (width, n, streams)
