"""Row-wise reductions whose result for a row does not depend on how many rows there are.

Library reductions split a single long row over threads but give many rows a thread each, and so
round differently; these first reduce blocks of the vocabulary, which is the same work either way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # tokens per block of the vocabulary
NEG_INF = float("-inf")


def blocked(x: Tensor, fill: float) -> Tensor:
    """[R, V] as [R, ceil(V / 256), 256], the end padded with `fill`."""
    size = x.shape[-1]
    if size % BLOCK:
        x = F.pad(x, (0, -size % BLOCK), value=fill)
    blocks: Tensor = x.unflatten(-1, (-1, BLOCK))
    return blocks


def row_sum(x: Tensor) -> Tensor:
    """The sum of each row, [R, 1] float64, accumulated over blocks."""
    return blocked(x, 0.0).sum(-1).double().sum(-1, keepdim=True)


def row_max(x: Tensor) -> Tensor:
    """The largest entry of each row, [R, 1]; NaN if the row holds one."""
    return blocked(x, NEG_INF).amax(-1).amax(-1, keepdim=True)


def log_sum_exp(logits: Tensor) -> Tensor:
    """ln Σ exp of each row, [R, 1] float64; -inf for a row without a finite entry."""
    top = row_max(logits)
    safe = torch.where(top == NEG_INF, 0.0, top)
    return row_sum((logits - safe).exp_()).log_() + safe


def log_softmax(logits: Tensor) -> Tensor:
    """The logprobs of each row, [R, V]; dropped (-inf) entries stay dropped."""
    return logits - log_sum_exp(logits).to(logits.dtype)


def entropy(logprobs: Tensor) -> Tensor:
    """The entropy of each row of logprobs in nats, [R, 1]; dropped entries do not count."""
    return row_sum(torch.special.entr(logprobs.exp())).to(logprobs.dtype)


def first_argmax(logits: Tensor) -> Tensor:
    """The lowest id holding each row's maximum, [R] int64.

    `torch.argmax` does not say which of equal entries it returns. Here the first block that
    reaches the maximum is found, then the first entry in it.
    """
    blocks = blocked(logits, NEG_INF)
    block_max = blocks.amax(-1)
    top = block_max.amax(-1, keepdim=True)
    block = _first(block_max == top)
    inside = blocks[torch.arange(len(block), device=block.device), block]
    return block * BLOCK + _first(inside == top)


def _first(mask: Tensor) -> Tensor:
    """The index of the first True of each row, [R]; 0 if there is none."""
    size = mask.shape[-1]
    index = torch.arange(size, device=mask.device)
    first = torch.where(mask, index, size).amin(-1)
    return first.remainder(size)
