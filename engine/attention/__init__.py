"""Attention over the paged KV cache."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from engine.attention.native import NativeAttention
from engine.attention.torch_paged import LayerCache, Span, TorchPagedAttention
from engine.kernels import native


class Attention(Protocol):
    """A backend: it plans a step once, and attends once for each layer."""

    def plan(self, spans: Sequence[Span]) -> Any:
        """Lay out a step; what comes back is for this backend's `attend` only."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        plan: Any,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `TorchPagedAttention.attend`."""
        ...


def choose_attention(block_size: int, device: str, batch_invariant: bool = False) -> Attention:
    """Our own kernel on CPU where it was compiled, torch's operations elsewhere.

    With `batch_invariant` a token's result has the same bits whatever else is in the step; our
    kernel's always has.
    """
    if device == "cpu" and native.LIBRARY is not None:
        return NativeAttention(native.LIBRARY, block_size, batch_invariant)
    return TorchPagedAttention(block_size, device, batch_invariant)
