"""A model without weights, whose next token follows a script."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from engine.attention import Attention
from engine.attention.torch_paged import LayerCache
from engine.models.base import ForwardInput, KVShape
from tests.support.tiny import VOCAB

_DIM = 16  # the least that the compiled attention takes

Script = Callable[[int, int], Tensor]  # the last token and its position to logits [V]


class ScriptedModel:
    """Logits from a script of the last token and its position.

    With `attentive`, they also depend on every token before, read back through the paged cache: a
    block that is wrong anywhere gives other tokens.
    """

    dtype = torch.float32
    kv_shapes = (KVShape(1, _DIM, _DIM),)
    hidden_size = 1 << 20  # so large that to attend costs nothing beside it
    has_lens = False

    def __init__(
        self,
        script: Script | None = None,
        *,
        vocab_size: int = VOCAB,
        context_len: int = 256,
        attentive: bool = False,
    ) -> None:
        self.script = script or (lambda token, position: pseudo_random(token, position, vocab_size))
        self.vocab_size = vocab_size
        self.context_len = context_len
        self.attentive = attentive
        self.num_rows = 0  # of logits asked for so far
        self.most_rows = 0  # at once

    def forward(
        self, inputs: ForwardInput, cache: list[LayerCache], attention: Attention
    ) -> Tensor:
        """[T, 3]: token, position, and the mean of all tokens so far weighted by position."""
        ids = inputs.token_ids.float()
        kept = torch.stack((ids, inputs.positions.float(), ids * (inputs.positions % 7 + 1)), 1)
        kept = torch.nn.functional.pad(kept, (0, _DIM - 3)).unsqueeze(1)
        seen = attention.attend(
            torch.zeros_like(kept), kept, kept, cache[0], inputs.attention, scale=1.0
        )
        return torch.stack((ids, inputs.positions.float(), seen[:, 0, 2]), dim=1)

    def final_norm(self, states: Tensor) -> Tensor:
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        self.num_rows += len(hidden)
        self.most_rows = max(self.most_rows, len(hidden))
        rows = []
        for token, position, seen in hidden.tolist():
            # The mean times the count is whole again, in whatever order it was summed.
            salt = round(seen * (position + 1)) if self.attentive else 0
            rows.append(self.script(int(token) + 1000 * salt, int(position)))
        return torch.stack(rows).float() if rows else hidden.new_zeros(0, self.vocab_size)


@lru_cache(maxsize=4096)
def pseudo_random(token: int, position: int, vocab_size: int = VOCAB) -> Tensor:
    """Logits that are the same for the same arguments, and different for others."""
    generator = torch.Generator().manual_seed(token * 1_000_003 + position)
    return 3 * torch.randn(vocab_size, generator=generator)


def constant(logits: list[float]) -> Script:
    """The same row at every position."""
    row = torch.tensor(logits)
    return lambda _token, _position: row.clone()


def sequence(token_ids: list[int], prompt_len: int, vocab_size: int = VOCAB) -> Script:
    """After a prompt of that length, these tokens one after the other, then the last for ever."""

    def script(_token: int, position: int) -> Tensor:
        index = min(max(position - prompt_len + 1, 0), len(token_ids) - 1)
        return torch.nn.functional.one_hot(torch.tensor(token_ids[index]), vocab_size) * 20.0

    return script
