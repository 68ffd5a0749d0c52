"""DoLa, decoding by contrasting layers: Chuang et al., 2023, arXiv:2309.03883."""

import math

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.stage import Transform
from engine.messages import Request
from engine.numerics import NEG_INF, divergence, finite, log_softmax, row_sum
from engine.types import Rows


class Dola(Transform):
    """ln p - ln p', p' of the earlier layer that differs most from the last.

    Of the tokens at least `dola_relative_top` as likely as the likeliest; all others are dropped.
    The difference is the Jensen-Shannon divergence, or as in transformers' code the mean over the
    vocabulary of the divergences from the average of both, which may choose another layer.
    """

    fields = ("dola_layers", "dola_relative_top", "dola_mode", "dola_norm")

    def __init__(self, lanes: Lanes) -> None:
        self.margin = lanes.column(torch.float32, neutral=0.0)
        self.as_transformers = lanes.column(torch.bool, neutral=False)
        self.wanted = lanes.flags()

    def admit(self, lane: int, request: Request) -> bool:
        params = request.params
        self.margin[lane] = -math.log(params.dola_relative_top)
        self.as_transformers[lane] = params.dola_mode == "hf"
        self.wanted[lane] = params.dola_layers is not None
        return params.dola_layers is not None

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        wanted = self.wanted[rows.host_lanes].nonzero()[0].tolist()
        if not wanted:
            return logits
        early, index, counts = _early_of(rows, wanted)
        own = logits[wanted]
        distance = _distances(own, early, index, self.as_transformers.at(rows)[wanted])
        there = torch.arange(index.shape[1], device=index.device) < counts.unsqueeze(1)
        layer = torch.where(there, distance, NEG_INF).argmax(1, keepdim=True)
        final = log_softmax(own)
        other = log_softmax(early[index.gather(1, layer).squeeze(1)])
        least = final.amax(1, keepdim=True) - self.margin.at(rows)[wanted]
        scores = finite(final.double() - finite(other))
        logits[wanted] = torch.where((final >= least) & (final > NEG_INF), scores, NEG_INF)
        return logits


def _early_of(rows: Rows, wanted: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows the earlier layers, rows of [N, V]: which [w, M], and how many count [w]."""
    beside = rows.beside
    assert beside is not None
    assert beside.early is not None
    assert beside.early_of is not None
    assert beside.early_count is not None
    places = beside.early_of[wanted]
    most = beside.early.shape[1]
    index = places.unsqueeze(1) * most + torch.arange(most, device=places.device)
    return beside.early.flatten(0, 1), index, beside.early_count[places]


def _distances(own: Tensor, early: Tensor, index: Tensor, as_transformers: Tensor) -> Tensor:
    """How much each layer, of early [N, V] those of the index [w, M], differs from own [w, V]."""
    distances = divergence(own, early, index)
    if bool(as_transformers.any()):
        mean = _mean_divergence(log_softmax(own).unsqueeze(1), log_softmax(early)[index])
        distances = torch.where(as_transformers, mean, distances)
    return distances


def _mean_divergence(final: Tensor, other: Tensor) -> Tensor:
    """The mean over the vocabulary of the divergences of the average from both logprobs."""
    middle = (final.exp() + other.exp()) / 2
    log_middle, size = middle.log(), middle.shape[-1]
    return (_kl(middle, log_middle, final) + _kl(middle, log_middle, other)) / (2 * size)


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (ln p - ln q) over the vocabulary."""
    return row_sum(torch.where(p > 0.0, p * (log_p - log_q), 0.0)).squeeze(-1)
