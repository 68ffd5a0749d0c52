"""Logits of whole sequences, packed into one forward pass as the engine packs them."""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.attention.torch_paged import Span
from engine.models.base import ForwardInput, Model
from engine.runner import Runner


@torch.inference_mode()
def packed_logits(model: Model, sequences: Seq[Seq[int]], block_size: int = 4) -> list[Tensor]:
    """For each sequence the logits [length, V] of all its tokens; blocks are dealt in turn."""
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
    )
    logits = model.logits(model.forward(inputs, runner.cache, runner.attention))
    return list(logits.split([len(ids) for ids in sequences]))
