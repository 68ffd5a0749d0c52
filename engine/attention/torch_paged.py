"""Paged attention in plain torch: the same code on CPU and CUDA.

Decoding sequences are batched: the blocks of sequences of similar length are gathered side by side
and attended to in one call, the query heads of a key-value head standing as its query rows, so
nothing is repeated. Chunks of several tokens are attended to one sequence at a time.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.numerics import NEG_INF

_SMALLEST_BUCKET = 16  # blocks; shorter sequences are padded together


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys [N, Hkv, block, Dk] and values [N, Hkv, block, Dv], N blocks."""

    keys: Tensor
    values: Tensor


class Span(NamedTuple):
    """Where one sequence's tokens of this step are: [start, start + length) of its context."""

    start: int
    length: int
    blocks: Seq[int]

    @property
    def context_len(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Consecutive one-token spans of similar context length, rows [first, last) of the step."""

    first: int
    last: int
    blocks: Tensor  # [S * B] int64
    lengths: Tensor  # [S] int64
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window

    def mask(self, window: int | None, size: int, dtype: torch.dtype) -> Tensor:
        """0 where a key may be seen, -inf elsewhere: [S, 1, 1, size]."""
        if window not in self.masks:
            index = torch.arange(size, device=self.lengths.device)
            lengths = self.lengths.unsqueeze(1)
            hidden = index >= lengths
            if window is not None:
                hidden |= index < lengths - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.masks[window] = mask.masked_fill_(hidden, NEG_INF)[:, None, None, :]
        return self.masks[window]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One span of several tokens, rows [first, last) of the step."""

    first: int
    last: int
    start: int
    blocks: Tensor  # [B] int64
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """True where a key may be seen: [length, context]."""
        if window not in self.masks:
            device = self.blocks.device
            context_len = self.start + self.last - self.first
            query = torch.arange(self.start, context_len, device=device).unsqueeze(1)
            key = torch.arange(context_len, device=device)
            visible = key <= query
            if window is not None:
                visible &= key > query - window
            self.masks[window] = visible
        return self.masks[window]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What every layer of one step has in common: where keys are written, what attends how."""

    slot_blocks: Tensor  # [T, 1] int64
    slot_offsets: Tensor  # [T, 1] int64
    decodes: list[_Decodes]
    chunks: list[_Chunk]


class TorchPagedAttention:
    """Writes keys and values into the cache and attends to them.

    If it is `batch_invariant`, each token attends by itself, so that what is computed for it, and
    in which order, depends on its own context alone.
    """

    def __init__(self, block_size: int, device: str, batch_invariant: bool = False) -> None:
        self.block_size = block_size
        self.device = device
        self.batch_invariant = batch_invariant
        self._workspace: dict[str, Tensor] = {}

    def plan(self, spans: Seq[Span]) -> AttentionPlan:
        """Lay out a step. Spans of one token come first, by context length."""
        if self.batch_invariant:
            spans = [Span(at, 1, s.blocks) for s in spans for at in range(s.start, s.context_len)]
        slots: list[tuple[int, int]] = []
        decodes: list[_Decodes] = []
        chunks: list[_Chunk] = []
        batch: list[Span] = []
        row = 0
        for span in spans:
            places = (divmod(at, self.block_size) for at in range(span.start, span.context_len))
            slots += [(span.blocks[index], offset) for index, offset in places]
            if batch and not self._go_together(batch[0], span):
                decodes.append(self._batched(batch, row))
                batch = []
            if span.length == 1:
                batch.append(span)
            else:
                blocks = torch.tensor(self._used(span), device=self.device)
                chunks.append(_Chunk(row, row + span.length, span.start, blocks))
            row += span.length
        if batch:
            decodes.append(self._batched(batch, row))
        where = torch.tensor(slots, device=self.device)
        return AttentionPlan(where[:, :1], where[:, 1:], decodes, chunks)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of this step's tokens to everything before them, [T, Hq, Dv].

        q [T, Hq, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv]. `window`: a token sees only that many of
        the latest tokens, itself included. `softcap`: scores s become c·tanh(s / c).
        """
        heads = torch.arange(k.shape[1], device=k.device)
        cache.keys[plan.slot_blocks, heads, plan.slot_offsets] = k
        cache.values[plan.slot_blocks, heads, plan.slot_offsets] = v
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        for batch in plan.decodes:
            rows = slice(batch.first, batch.last)
            out[rows] = self._decode(q[rows], cache, batch, scale, window, softcap)
        for chunk in plan.chunks:
            rows = slice(chunk.first, chunk.last)
            out[rows] = self._prefill(
                q[rows], k[rows], v[rows], cache, chunk, scale, window, softcap
            )
        return out

    def _decode(
        self,
        q: Tensor,
        cache: LayerCache,
        batch: _Decodes,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        size = batch.last - batch.first
        keys = self._gather("keys", cache.keys, batch.blocks, size)
        values = self._gather("values", cache.values, batch.blocks, size)
        mask = batch.mask(window, keys.shape[2], q.dtype)
        grouped = q.unflatten(1, (keys.shape[1], -1))
        return _attention(grouped, keys, values, mask, scale, softcap).flatten(1, 2)

    def _prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        chunk: _Chunk,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        context_len = chunk.start + chunk.last - chunk.first
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        if chunk.start:
            k = self._gather("keys", cache.keys, chunk.blocks, 1)[0, :, :context_len]
            v = self._gather("values", cache.values, chunk.blocks, 1)[0, :, :context_len]
        if window is not None and window >= context_len:
            window = None
        mask = chunk.mask(window) if chunk.start or window is not None or softcap else None
        repeats = q.shape[1] // k.shape[0]
        attended = _attention(
            q.transpose(0, 1).unsqueeze(0),
            k.repeat_interleave(repeats, dim=0).unsqueeze(0),
            v.repeat_interleave(repeats, dim=0).unsqueeze(0),
            mask,
            scale,
            softcap,
        )
        return attended.squeeze(0).transpose(0, 1)

    def _gather(self, name: str, cache: Tensor, blocks: Tensor, size: int) -> Tensor:
        """The blocks [size · B] of `size` sequences side by side, [size, Hkv, B · block, D].

        The result lives in memory that the next call uses again.
        """
        heads = cache.shape[1]
        per_head = blocks.view(size, 1, -1) * heads + torch.arange(
            heads, device=blocks.device
        ).view(1, -1, 1)
        wanted = per_head.numel() * cache[0, 0].numel()
        space = self._workspace.get(name)
        if space is None or space.numel() < wanted or space.dtype != cache.dtype:
            space = self._workspace[name] = cache.new_empty(wanted)
        out = space[:wanted].view(per_head.numel(), *cache.shape[2:])
        torch.index_select(cache.flatten(0, 1), 0, per_head.flatten(), out=out)
        return out.view(size, heads, -1, cache.shape[3])

    def _used(self, span: Span) -> list[int]:
        return list(span.blocks[: -(-span.context_len // self.block_size)])

    def _go_together(self, one: Span, other: Span) -> bool:
        alike = other.length == 1 and self._bucket(other) == self._bucket(one)
        return alike and not self.batch_invariant

    def _bucket(self, span: Span) -> int:
        blocks = max(-(-span.context_len // self.block_size), _SMALLEST_BUCKET)
        return (blocks - 1).bit_length()

    def _batched(self, batch: list[Span], end_row: int) -> _Decodes:
        tables = [self._used(span) for span in batch]
        width = max(len(table) for table in tables)
        # The padding is masked, but a NaN goes through a mask: so it is a block of the same one.
        padded = [b for table in tables for b in table + table[-1:] * (width - len(table))]
        return _Decodes(
            end_row - len(batch),
            end_row,
            torch.tensor(padded, device=self.device),
            torch.tensor([span.context_len for span in batch], device=self.device),
        )


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """softmax(q·k) v over [*, heads, tokens, D]; without a mask it is causal."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    if mask is None:
        raise AssertionError("soft-capped attention always gets a mask")
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    scores = scores.masked_fill(~mask, NEG_INF) if mask.dtype == torch.bool else scores + mask
    return scores.float().softmax(-1).to(v.dtype) @ v
