"""Does a model compute a token by the same operations whatever else is in the batch?"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.attention import choose_attention
from engine.attention.torch_paged import LayerCache, Span
from engine.models.base import ForwardInput, Model

_BLOCK = 16
_LENGTHS = (1, 1, 5, 37, 70)  # single tokens first, as in every step


def is_batch_invariant(model: Model, device: str) -> bool:
    """Have tokens the same bits alone, together with others, in chunks, and one after the other?"""
    runs = _Runs(model, device)
    together = runs.run([(index, 0, length) for index, length in enumerate(_LENGTHS)])
    for index, (length, want) in enumerate(zip(_LENGTHS, together, strict=True)):
        sizes = ([length], [length // 2, length - length // 2], [length - 3, 1, 1, 1])
        for pieces in sizes if length > 3 else sizes[:1]:
            start, got = 0, []
            for size in pieces:
                got += runs.run([(index, start, size)])
                start += size
            if not torch.equal(torch.cat(got), want):
                return False
    return True


class _Runs:
    """A few sequences of fixed tokens, and a cache for them."""

    def __init__(self, model: Model, device: str) -> None:
        self._model, self._device = model, device
        self._attention = choose_attention(_BLOCK, device, batch_invariant=True)
        per_sequence = -(-max(_LENGTHS) // _BLOCK)
        count = per_sequence * len(_LENGTHS)
        self._blocks = [list(range(i, count, len(_LENGTHS))) for i in range(len(_LENGTHS))]
        self._cache = [
            LayerCache(
                *(
                    torch.zeros(count, shape.heads, _BLOCK, dim, dtype=model.dtype, device=device)
                    for dim in (shape.key_dim, shape.value_dim)
                )
            )
            for shape in model.kv_shapes
        ]

    def run(self, pieces: Seq[tuple[int, int, int]]) -> list[Tensor]:
        """One step over pieces (sequence, start, length); logits [length, V] for each."""
        places = [(index, at) for index, start, size in pieces for at in range(start, start + size)]
        sequences, positions = torch.tensor(places, device=self._device).T
        spans = [Span(start, size, self._blocks[index]) for index, start, size in pieces]
        ids = (sequences * 31 + positions * 13 + 1) % min(self._model.vocab_size - 1, 997)
        inputs = ForwardInput(ids, positions.contiguous(), self._attention.plan(spans))
        hidden = self._model.forward(inputs, self._cache, self._attention)
        return list(self._model.logits(hidden).split([size for _, _, size in pieces]))
