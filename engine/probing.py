"""Looking into the model: what tokens of a step attended to, and what its layers held."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.torch_paged import LayerCache
from engine.attention.weights import attention_scores
from engine.models.base import Probe
from engine.numerics import NEG_INF
from engine.types import Sequence


@dataclass(frozen=True, slots=True)
class Probed:
    """What a probe kept, and where each token stands in it."""

    probe: Probe
    cache: Seq[LayerCache]
    places: dict[tuple[int, int], int]  # by id() of the sequence and position of the token

    def states(self, sequence: Sequence, position: int) -> Tensor:
        """What went into each layer and out of the last at a token: [layers + 1, H]."""
        assert self.probe.states is not None
        return self.probe.states[:, self.places[id(sequence), position]]

    def scores(self, sequence: Sequence, position: int, layer: int) -> Tensor:
        """A token's attention scores in a layer before softmax, [Hq, C] float32."""
        query = self.probe.queries[layer]
        return attention_scores(
            query.q[self.places[id(sequence), position]],
            self.cache[layer],
            sequence.block_table,
            position + 1,
            scale=query.scale,
            window=query.window,
            softcap=query.softcap,
        )


def attention_signals(scores: Tensor) -> Tensor:
    """Entropix's four numbers of a query's scores [Hq, C]: [4] float32.

    The mean over heads of the entropy in bits, its variance over heads, the mean distance of a
    head's weights from the heads' average, and the mean size of the scores; all of what the query
    can see.
    """
    scores = scores[:, scores[0] > NEG_INF]
    weights = scores.softmax(-1)
    bits = torch.special.entr(weights).sum(-1) / torch.log(torch.tensor(2.0))
    agreement = (weights - weights.mean(0)).abs().mean()
    return torch.stack((bits.mean(), bits.var(correction=0), agreement, scores.abs().mean()))
