"""What the stages of the logits pipeline know of the tokens' texts."""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Vocabulary:
    """The text of each token id, and tables over all ids that follow from it.

    A table is made when it is first asked for, or before: see `load`.
    """

    def __init__(self, load: Callable[[], Sequence[str]], device: str = "cpu") -> None:
        self._load = load
        self.device = device
        self.holding = lru_cache(maxsize=64)(self._holding)

    def load(self) -> bool:
        """Make one of the tables that no request has needed yet; False if all are there."""
        for name in ("texts", "characters", "newlines", "blank", "ends_line", "indents"):
            if name not in self.__dict__:
                getattr(self, name)
                return True
        return False

    @cached_property
    def texts(self) -> Sequence[str]:
        """Each token's text; U+FFFD stands for parts of characters."""
        return self._load()

    def _holding(self, strings: tuple[str, ...]) -> Tensor:
        """Which tokens' texts hold one of some strings, [V] bool. Remembered."""
        found = np.zeros(len(self.texts), dtype=bool)
        for string in set(strings):
            found[self.characters.tokens_with(string)] = True
        return torch.from_numpy(found).to(self.device)

    @cached_property
    def characters(self) -> "_Characters":
        """All texts, character by character."""
        return _Characters(self.texts)

    @cached_property
    def newlines(self) -> Tensor:
        """Which tokens are nothing but one line break, [V] bool."""
        return self._table(lambda text: text == "\n")

    @cached_property
    def blank(self) -> Tensor:
        """Which tokens are nothing but spaces and tabs, [V] bool."""
        return self._table(lambda text: bool(text) and not text.strip(" \t"))

    @cached_property
    def ends_line(self) -> Tensor:
        """Which tokens end with a line break, [V] bool."""
        return self._table(lambda text: text.endswith("\n"))

    @cached_property
    def indents(self) -> Tensor:
        """Which tokens end with a line break and at least one space or tab, [V] bool."""

        def ends_indented(text: str) -> bool:
            rest = text.rstrip(" \t")
            return rest != text and rest.endswith("\n")

        return self._table(ends_indented)

    def _table(self, test: Callable[[str], bool]) -> Tensor:
        return torch.tensor([test(text) for text in self.texts], device=self.device)


class _Characters:
    """The characters of some texts, found by what they are: so strings are looked for in all."""

    def __init__(self, texts: Sequence[str]) -> None:
        lengths = np.array([len(text) for text in texts], dtype=np.int32)
        self._codes = _codes("".join(texts))  # [n]
        self._token = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)  # of each, [n]
        self._order = np.argsort(self._codes, kind="stable").astype(np.int32)
        self._sorted = self._codes[self._order]

    def tokens_with(self, string: str) -> NDArray[np.int32]:
        """The tokens whose texts hold a string; some more than once."""
        codes = _codes(string)
        begins = np.searchsorted(self._sorted, codes)
        ends = np.searchsorted(self._sorted, codes, "right")
        rarest = int((ends - begins).argmin())
        at = self._order[begins[rarest] : ends[rarest]]  # where it is
        at = at[(at >= rarest) & (at < len(self._codes) - (len(codes) - 1 - rarest))]
        for offset, code in enumerate(codes, start=-rarest):  # and the others beside it
            if offset:
                at = at[self._codes[at + offset] == code]
        first = self._token[at - rarest]
        within: NDArray[np.int32] = first[first == self._token[at + (len(codes) - 1 - rarest)]]
        return within


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
