"""What the engine knows of rows besides their logits: companions, earlier layers, attention."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from engine.messages import Request
from engine.models.base import Model
from engine.probing import Probed, attention_signals
from engine.runner import Forwarded
from engine.types import Beside, Group, Sequence

_LEAST_MASS = 1e-10
_LARGEST = torch.finfo(torch.float32).max  # +inf counts as that


class Member(NamedTuple):
    """A row of logits: of which sequence, and whose hidden state at which position it is.

    Copies of a prompt share the hidden state of the one that was computed.
    """

    group: Group
    sequence: Sequence
    computed: Sequence
    position: int

    @property
    def request(self) -> Request:
        return self.group.request


class Surroundings:
    """Finds what is beside the rows of a step. `models` and `forwarded` are in the same order."""

    def __init__(
        self, models: Seq[Model], forwarded: Seq[Forwarded | None], vocab_size: int, device: str
    ) -> None:
        self.models = models
        self.forwarded = forwarded
        self.vocab_size = vocab_size
        self.device = device

    def of(self, members: Seq[Member]) -> Beside | None:
        """None if no row wants anything."""
        if not any(one.group.looks_beside for one in members):
            return None
        reads_attention = any(one.request.params.reads_attention for one in members)
        companions, companion_of = self._companions(members)
        early, early_of, counts = self._early(members)
        return Beside(
            self._attention(members) if reads_attention else None,
            companions,
            self._index(companion_of),
            early,
            self._index(early_of),
            self._index(counts),
        )

    def coverage(self, member: Member) -> Tensor:
        """How the newest token attends to the prompt, [prompt length], of sum 1.

        The mean over heads and the upper half of the layers.
        """
        probed = self._probed()
        layers = range(len(probed.probe.queries) // 2, len(probed.probe.queries))
        length = member.sequence.prompt_len
        weights = [
            probed.scores(member.computed, member.position, layer).softmax(-1)[:, :length].mean(0)
            for layer in layers
        ]
        mean = torch.stack(weights).mean(0)
        return mean / mean.sum().clamp(min=_LEAST_MASS)

    def _companions(self, members: Seq[Member]) -> tuple[Tensor | None, list[int]]:
        """The companions' logits, and which row has which."""
        wanted: dict[int, Sequence] = {}  # by id(), in the order of their logits
        for one in members:
            if one.computed.companion is not None:
                wanted[id(one.computed.companion)] = one.computed.companion
        if not wanted:
            return None, []
        parts: list[Tensor] = []
        places: dict[int, int] = {}
        for number, (model, forwarded) in enumerate(zip(self.models, self.forwarded, strict=True)):
            its = [key for key, companion in wanted.items() if companion.model == number]
            if its:
                assert forwarded is not None
                places |= {key: len(places) + place for place, key in enumerate(its)}
                hidden = forwarded.hidden[[forwarded.last_rows[key] for key in its]]
                parts.append(model.logits(hidden)[:, : self.vocab_size])
        of = [places.get(id(one.computed.companion), -1) for one in members]
        return torch.cat(parts).clamp(max=_LARGEST), of

    def _early(self, members: Seq[Member]) -> tuple[Tensor | None, list[int], list[int]]:
        """Logits of earlier layers [e, M, V], which row has which, and how many of M count."""
        wanted = [one for one in members if one.request.early_layers]
        if not wanted:
            return None, [], []
        model = self.models[0]
        counts = [len(one.request.early_layers) for one in wanted]
        read: list[Tensor] = []
        for one in wanted:
            states = self._probed().states(one.computed, one.position)
            layers = list(one.request.early_layers)
            # Those that do not count repeat the last.
            layers += layers[-1:] * (max(counts) - len(layers))
            norm = one.request.params.dola_norm
            read.append(model.final_norm(states[layers]) if norm else states[layers])
        assert self.forwarded[0] is not None
        # Not the model's `dtype`, which may be the cache's alone.
        hidden = torch.cat(read).to(self.forwarded[0].hidden.dtype)
        logits = model.logits(hidden)[:, : self.vocab_size].unflatten(0, (len(wanted), -1))
        places = {id(one): place for place, one in enumerate(wanted)}
        of = [places.get(id(one), -1) for one in members]
        return logits.clamp(max=_LARGEST), of, counts

    def _attention(self, members: Seq[Member]) -> Tensor:
        """What the rows' newest tokens attended to in the last layer, [R, 4]."""
        signals = torch.zeros(len(members), 4, device=self.device)
        for row, one in enumerate(members):
            if one.request.params.reads_attention:
                probed = self._probed()
                last = len(probed.probe.queries) - 1
                scores = probed.scores(one.computed, one.position, last)
                signals[row] = attention_signals(scores)
        return signals

    def _probed(self) -> Probed:
        assert self.forwarded[0] is not None
        assert self.forwarded[0].probed is not None
        return self.forwarded[0].probed

    def _index(self, places: list[int]) -> Tensor | None:
        if not places:
            return None
        return torch.tensor(places, dtype=torch.int64, device=self.device)
