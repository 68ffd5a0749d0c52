"""What the stages of the logits pipeline know of the tokens' texts."""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor


class Vocabulary:
    """The text of each token id, and tables over all ids that follow from it.

    `load` is called when a table is first asked for: most servers never need one.
    """

    def __init__(self, load: Callable[[], Sequence[str]], device: str = "cpu") -> None:
        self._load = load
        self.device = device
        self.holding = lru_cache(maxsize=64)(self._holding)

    @cached_property
    def texts(self) -> Sequence[str]:
        """Each token's text; U+FFFD stands for parts of characters."""
        return self._load()

    def _holding(self, strings: tuple[str, ...]) -> Tensor:
        """Which tokens' texts hold one of some strings, [V] bool. Remembered."""
        return self._table(lambda text: any(string in text for string in strings))

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
