"""Paged attention on CPU through our own kernel, which `torch_paged` is the reference of.

It reads keys and values where they are, without gathering them first, and computes each token's
attention by the same operations whatever else is in the step: with it, a token's hidden state has
the same bits alone or in a batch, in one chunk or several, from the prefix cache or not.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from engine.attention.torch_paged import AttentionPlan, LayerCache, Span, TorchPagedAttention
from engine.kernels import native
from engine.numerics import integers


@dataclass(frozen=True)
class NativePlan:
    """One step for the kernel: a line per span, and all block tables behind one another."""

    spans: Tensor  # [S, 4] int64: first row, number of rows, first position, first block
    blocks: Tensor  # int64
    layout: Seq[Span]
    fallback: TorchPagedAttention

    @cached_property
    def torch_plan(self) -> AttentionPlan:
        return self.fallback.plan(self.layout)


class NativeAttention:
    """The kernel, with torch's operations for the shapes that it does not do."""

    def __init__(
        self, library: native.Library, block_size: int, batch_invariant: bool = False
    ) -> None:
        self._library = library
        self.block_size = block_size
        self._torch = TorchPagedAttention(block_size, "cpu", batch_invariant)

    def plan(self, spans: Seq[Span]) -> NativePlan:
        """Lay out a step. Spans of one token come first, by context length."""
        lines: list[list[int]] = []
        blocks: list[int] = []
        row = 0
        for span in spans:
            lines.append([row, span.length, span.start, len(blocks)])
            blocks += span.blocks[: -(-span.context_len // self.block_size)]
            row += span.length
        return NativePlan(integers(lines), integers(blocks), spans, self._torch)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        plan: NativePlan,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `TorchPagedAttention.attend`."""
        q, k, v = (_rows_apart(x) for x in (q, k, v))
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        shape = native.Attention(
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            spans=plan.spans.data_ptr(),
            blocks=plan.blocks.data_ptr(),
            num_spans=len(plan.spans),
            heads=q.shape[1],
            kv_heads=k.shape[1],
            dim=q.shape[2],
            value_dim=v.shape[2],
            block_size=self.block_size,
            window=window or 0,
            scale=scale,
        )
        args = native.AttendArgs(
            attention=shape,
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            out=out.data_ptr(),
            q_stride=q.stride(0),
            k_stride=k.stride(0),
            v_stride=v.stride(0),
        )
        known = q.dtype in (torch.float32, torch.bfloat16) and softcap is None
        if known and self._library.attend(args, q.element_size()):
            return out
        return self._torch.attend(
            q, k, v, cache, plan.torch_plan, scale=scale, window=window, softcap=softcap
        )


def _rows_apart(x: Tensor) -> Tensor:
    """[T, heads, D] with each row's heads next to one another, copied only if they are not."""
    whole = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if whole else x.contiguous()
