"""Logits of whole sequences, packed into one forward pass as the engine packs them."""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.attention.torch_paged import LayerCache, Span
from engine.models.base import ForwardInput, Model
from engine.runner import Runner


@torch.inference_mode()
def packed_states(
    model: Model, sequences: Seq[Seq[int]], block_size: int = 4, read: Tensor | None = None
) -> tuple[Tensor, list[LayerCache]]:
    """The hidden states [T, H] of all sequences' tokens, of which `read` are wanted, and the cache.

    Blocks are dealt in turn.
    """
    needed = [-(-len(ids) // block_size) for ids in sequences]
    count = len(sequences) * max(needed)
    runner = Runner(model, count, block_size, "cpu")
    spans = [
        Span(0, len(ids), list(range(index, count, len(sequences))))
        for index, ids in enumerate(sequences)
    ]
    inputs = ForwardInput(
        torch.tensor([token for ids in sequences for token in ids]),
        torch.tensor([position for ids in sequences for position in range(len(ids))]),
        runner.attention.plan(spans),
        read=read,
    )
    return model.forward(inputs, runner.cache, runner.attention), runner.cache


@torch.inference_mode()
def packed_logits(model: Model, sequences: Seq[Seq[int]], block_size: int = 4) -> list[Tensor]:
    """For each sequence the logits [length, V] of all its tokens."""
    hidden, _ = packed_states(model, sequences, block_size)
    return list(model.logits(hidden).split([len(ids) for ids in sequences]))
