"""Random steps of attention, and what they must give: the formula, token by token in float64."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention import Attention
from engine.attention.torch_paged import LayerCache, Span

BLOCK = 4
# What sequences have computed, and how many tokens this step adds: decoding at the edges of blocks
# and of the 64 keys that the kernel takes at a time, whole prompts, chunks that go on.
DECODES = [(0, 1), (3, 1), (4, 1), (30, 1), (63, 1), (64, 1), (129, 1)]
CHUNKS = [(0, 2), (0, 9), (5, 3), (0, 70), (66, 10), (60, 37)]
MIXED = DECODES + CHUNKS


@dataclass(frozen=True)
class Shape:
    """Query heads, key-value heads, and the widths of keys and values."""

    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16

    @property
    def scale(self) -> float:
        return self.key_dim**-0.5


class Step:
    """Sequences in scattered blocks, with queries, keys and values of this step's tokens."""

    def __init__(
        self,
        parts: Seq[tuple[int, int]],
        shape: Shape,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        self.shape = shape
        needed = [-(-(start + length) // BLOCK) for start, length in parts]
        count = sum(needed) + 3  # some belong to nobody
        order = torch.randperm(count, generator=generator).tolist()
        ends = torch.tensor(needed).cumsum(0).tolist()
        tables = [order[end - size : end] for size, end in zip(needed, ends, strict=True)]
        self.spans = [
            Span(start, length, table) for (start, length), table in zip(parts, tables, strict=True)
        ]
        self.contexts = [
            (
                normal(start + length, shape.kv_heads, shape.key_dim),
                normal(start + length, shape.kv_heads, shape.value_dim),
            )
            for start, length in parts
        ]
        self.queries = [normal(length, shape.heads, shape.key_dim) for _, length in parts]
        # Whatever was there before must not shine through: it would be seen at once.
        self.cache = LayerCache(
            torch.full((count, shape.kv_heads, BLOCK, shape.key_dim), 100.0, dtype=dtype),
            torch.full((count, shape.kv_heads, BLOCK, shape.value_dim), 1e4, dtype=dtype),
        )
        for span, (keys, values) in zip(self.spans, self.contexts, strict=True):
            blocks, offsets = _places(span, span.start)
            self.cache.keys[blocks, :, offsets] = keys[: span.start]
            self.cache.values[blocks, :, offsets] = values[: span.start]

    def attend(
        self,
        backend: Attention,
        *,
        window: int | None = None,
        softcap: float | None = None,
    ) -> list[Tensor]:
        """What the backend gives, by span."""
        fresh = list(zip(self.spans, self.contexts, strict=True))
        out = backend.attend(
            torch.cat(self.queries),
            torch.cat([keys[span.start :] for span, (keys, _) in fresh]),
            torch.cat([values[span.start :] for span, (_, values) in fresh]),
            self.cache,
            backend.plan(self.spans),
            scale=self.shape.scale,
            window=window,
            softcap=softcap,
        )
        return list(out.split([span.length for span in self.spans]))

    def expected(self, window: int | None = None, softcap: float | None = None) -> list[Tensor]:
        """The formula in float64, one token after the other."""
        group = self.shape.heads // self.shape.kv_heads
        out = []
        for span, (keys, values), queries in zip(
            self.spans, self.contexts, self.queries, strict=True
        ):
            keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
            for end, query in enumerate(queries.double(), start=span.start + 1):
                begin = 0 if window is None else max(0, end - window)
                scores = torch.einsum("hd,nhd->hn", query, keys[begin:end]) * self.shape.scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.softmax(scores, dim=-1)
                out.append(torch.einsum("hn,nhd->hd", weights, values[begin:end]))
        return list(torch.stack(out).split([span.length for span in self.spans]))

    def assert_stored(self) -> None:
        """The cache shows each sequence its own keys and values, and nothing else was written."""
        free = torch.ones(len(self.cache.keys), BLOCK, dtype=torch.bool)
        for span, (keys, values) in zip(self.spans, self.contexts, strict=True):
            blocks, offsets = _places(span, span.context_len)
            free[blocks, offsets] = False
            assert torch.equal(self.cache.keys[blocks, :, offsets], keys)
            assert torch.equal(self.cache.values[blocks, :, offsets], values)
        assert (self.cache.keys.transpose(1, 2)[free] == 100.0).all()
        assert (self.cache.values.transpose(1, 2)[free] == 1e4).all()


def _places(span: Span, count: int) -> tuple[Tensor, Tensor]:
    """The block and the offset of each of the first `count` positions."""
    positions = torch.arange(count)
    return torch.tensor(span.blocks)[positions // BLOCK], positions % BLOCK
