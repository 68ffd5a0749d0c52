"""What single queries attended to, read back from the paged cache after a step.

Backends need not give attention weights: a query and the cached keys are all it takes.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.attention.torch_paged import LayerCache
from engine.numerics import NEG_INF


def attention_scores(
    q: Tensor,
    cache: LayerCache,
    blocks: Seq[int],
    context_len: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Scores of one query [Hq, D] against its context's keys before softmax, [Hq, C] float32.

    -inf outside the window.
    """
    keys = cache.keys[list(blocks)].transpose(0, 1).flatten(1, 2)[:, :context_len].float()
    grouped = q.float().unflatten(0, (keys.shape[0], -1))
    scores: Tensor = (grouped @ keys.transpose(1, 2)).flatten(0, 1) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if window is not None and window < context_len:
        scores[:, : context_len - window] = NEG_INF
    return scores
