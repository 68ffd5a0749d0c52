"""What stages know of the tokens' texts."""

import random

import pytest

from engine.tokenizer import Tokenizer
from engine.vocabulary import Vocabulary

TEXTS = [
    "",
    "a",
    "b",
    "ab",
    "ba",
    "aab",
    "\n",
    " \n",
    "\n  ",
    " ",
    "\t",
    "é",
    "ée",
    "😀",
    "a😀b",
    "\ufffd",
]


@pytest.mark.parametrize(
    "strings", [("a",), ("ab",), ("aab", "\n"), ("b", "b", "é"), ("x",), ("ba",), ()]
)
def test_tokens_that_hold_a_string(strings: tuple[str, ...]) -> None:
    """None is found across the border between two texts."""
    found = Vocabulary(lambda: TEXTS).holding(strings)
    assert found.tolist() == [any(one in text for one in strings) for text in TEXTS]


def test_tokens_that_hold_strings_of_a_real_vocabulary(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    texts = [tokenizer.text_of(token_id) for token_id in range(tokenizer.size)]
    joined = "".join(texts)
    vocabulary = Vocabulary(lambda: texts)
    for _ in range(200):
        starts = [rng.randrange(len(joined)) for _ in range(rng.randint(1, 4))]
        strings = tuple(joined[start : start + rng.randint(1, 6)] for start in starts)
        found = vocabulary.holding(strings)
        assert found.tolist() == [any(one in text for one in strings) for text in texts]


def test_everything_is_made_before_it_is_needed_or_when_it_is() -> None:
    ahead, late = Vocabulary(lambda: TEXTS), Vocabulary(lambda: TEXTS)
    while ahead.load():
        pass
    tables = ("newlines", "blank", "ends_line", "indents")
    assert set(tables) < set(vars(ahead))
    assert not set(tables) & set(vars(late))
    for table in tables:
        assert getattr(ahead, table).tolist() == getattr(late, table).tolist()
    assert late.newlines.nonzero().flatten().tolist() == [TEXTS.index("\n")]
    assert [TEXTS[i] for i in late.blank.nonzero().flatten()] == [" ", "\t"]
    assert [TEXTS[i] for i in late.ends_line.nonzero().flatten()] == ["\n", " \n"]
    assert [TEXTS[i] for i in late.indents.nonzero().flatten()] == ["\n  "]
