"""What the engine needs to know of a model, whatever runs it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.attention import Attention
from engine.attention.torch_paged import LayerCache
from engine.kernels.linear import Linear


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one layer keeps of a token: `heads` keys of `key_dim` and values of `value_dim`."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def numel(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class Query:
    """What a layer's attention asked with, for some tokens of a step: q [n, Hq, D]."""

    q: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(slots=True)
class Probe:
    """What a step should keep of n of its tokens, for those who look into the model.

    The model fills in `states` [layers + 1, n, H] float32, what goes into each layer and out of the
    last one, before the final norm; and `queries`, one for each layer.
    """

    rows: Tensor  # [n] int64, of this step's tokens
    states: Tensor | None = None
    queries: list[Query] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ForwardInput:
    """One step's tokens, [T] int64 each, and how they attend. Made by the runner, read by all.

    `replaced` [m] int64 are tokens whose embeddings `inputs` [m, H] take the place of. `read` [n]
    int64, always on the CPU, are the tokens whose hidden states somebody looks at; None: all.
    """

    token_ids: Tensor
    positions: Tensor
    attention: Any  # the plan of the attention backend
    probe: Probe | None = None
    replaced: Tensor | None = None
    inputs: Tensor | None = None
    read: Tensor | None = None


class Model(Protocol):
    """A decoder: `forward` and `logits` are all the engine calls."""

    vocab_size: int
    hidden_size: int
    context_len: int  # the longest sequence it was made for
    dtype: torch.dtype
    kv_shapes: list[KVShape]  # one per layer that attends
    has_lens: bool  # can a probe keep its states, and `final_norm` read them?

    def forward(
        self, inputs: ForwardInput, cache: list[LayerCache], attention: Attention
    ) -> Tensor:
        """The final hidden states, [T, H]; what stands for tokens nobody reads means nothing."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, H] to logits [R, V] float32."""
        ...

    def final_norm(self, states: Tensor) -> Tensor:
        """What a probe kept of a layer [*, H] as hidden states that `logits` takes."""
        ...


class Head:
    """Projects hidden states to float32 logits.

    bfloat16 numbers between 16 and 32 are 0.125 apart: two candidates a hair apart would tie, and
    the lower id win. So the product is accumulated and returned in float32. On CPU the weight is
    float32 itself; where it is the input embedding, that tensor is shared, not copied. On CUDA a
    16-bit weight stays as it is and the product is widened inside the kernel.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        tied: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        self._weight = weight
        self._bias = None if bias is None else bias.float()
        self._linear = None
        if weight.dtype == torch.float32:
            self._linear = Linear(weight, self._bias, not tied, batch_invariant)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[R, H] to [R, V] float32."""
        if self._linear is not None:
            return self._linear(hidden.float())
        logits = torch.mm(hidden, self._weight.t(), out_dtype=torch.float32)
        return logits if self._bias is None else logits + self._bias


class RowByRow:
    """A function of [..., N] that gets each row by itself.

    torch computes the last few entries of a tensor, and of each thread's share of it, by other code
    than the rest. Which those are depends on the number of rows, but not if there is one.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).split(1)
        return torch.cat([self._function(row) for row in rows]).view(x.shape)


def head_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The type the head's weight is kept in; see `Head`."""
    return torch.float32 if device == "cpu" else dtype
