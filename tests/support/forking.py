"""A strategy for tests that forks and drops at every step."""

from hashlib import blake2b

from engine.messages import Token
from engine.strategies.base import Branch, Plain, View
from engine.types import Sequence


class Forking(Plain):
    """Every sequence proposes two branches; the `width` whose tokens hash lowest go on.

    So some sequences fork, some go on and some are dropped, always the same ones.
    """

    def __init__(self, width: int, n: int, vocab_size: int) -> None:
        self.width = self.copies = width
        self.n = n
        self.vocab_size = vocab_size

    def advance(self, live: list[Sequence], view: View) -> list[Branch]:
        branches = []
        for sequence, token in zip(live, view.tokens, strict=True):
            other = Token((token.id + 1) % self.vocab_size, "")
            branches += [Branch(sequence, (token,)), Branch(sequence, (other,))]
        branches.sort(key=lambda branch: _hash(branch.parent, *branch.tokens))
        return branches[: self.width]

    def rank(self, finished: list[Sequence]) -> list[Sequence]:
        return sorted(finished, key=_hash)[: self.n]


def _hash(sequence: Sequence, *tokens: Token) -> bytes:
    ids = (*sequence.token_ids, *(token.id for token in tokens))
    return blake2b(repr(ids).encode()).digest()
