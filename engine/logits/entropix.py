"""Entropix: switch between ways of sampling by entropy and varentropy (xjdr, 2024; no paper).

The profile "2024-10-07" is that day's sampler in the entropix repository, without its defects: it
filtered an ascending list by top-p, so that the best tokens could go; its min-p changed an array
that was no longer used; its attention covered empty cache slots. "head" stands for the later
history: other thresholds, in nats, and no attention; the adaptive Dirichlet sampler is left out.
"""

import math

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.history import History
from engine.logits.stage import Filter
from engine.logits.top_p import below
from engine.messages import Request
from engine.params import EntropixParams
from engine.types import Rows

_TRIES = 5  # draws of which the likeliest is taken where nothing stands out


class Entropix(Filter):
    """Five regimes, tried in this order, of the model's own distribution in bits.

    Sure and even: the likeliest token. Unsure and even: a token that asks to think again, once;
    after that, warmer. Sure but uneven: warmer and wider. Unsure and uneven: much warmer, narrower.
    Else: everything moves a little, and the likeliest of five draws is taken.
    """

    fields = ("entropix",)

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.active = lanes.column(torch.bool, neutral=False)
        self.numbers = {name: lanes.column(torch.float32, neutral=0.0) for name in _NUMBERS}
        self.clarify = lanes.column(torch.int64, neutral=-1)
        self.late = lanes.column(torch.bool, neutral=False)  # the later profile

    def admit(self, lane: int, request: Request) -> bool:
        params = request.params.entropix
        self.active[lane] = params is not None
        if params is None:
            return False
        self.late[lane] = params.profile == "head"
        self.clarify[lane] = -1 if request.clarify_token is None else request.clarify_token
        for name, value in _in_bits(params).items():
            self.numbers[name][lane] = value
        return True

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        assert rows.signals is not None
        entropy, varentropy = rows.signals.entropy, rows.signals.varentropy
        attention = {name: rows.signals.attention[:, i, None] for i, name in enumerate(_ATTENTION)}
        its = {name: column.at(rows) for name, column in self.numbers.items()}
        active, late = self.active.at(rows), self.late.at(rows)

        sure = active & (entropy < its["low_ent"]) & (varentropy < its["low_vent"])
        lost = active & (entropy > its["high_ent"]) & (varentropy < its["low_vent"]) & ~sure
        forked = active & (entropy < its["high_ent"]) & (varentropy > its["high_vent"])
        forked &= ~sure & ~lost
        wild = active & (entropy > its["med_ent"]) & (varentropy > its["high_vent"])
        wild &= ~sure & ~lost & ~forked
        other = active & ~sure & ~lost & ~forked & ~wild

        settings = _Settings(its, attention, entropy, varentropy)
        settings.use(lost, *settings.lost())
        settings.use(forked, *settings.forked())
        settings.use(wild, *settings.wild())
        settings.use(other, *settings.other())

        asks = lost & ~(self._asked_before(rows) & ~late) & (self.clarify.at(rows) >= 0)
        candidates.divide(torch.where(active, settings.temperature, 1.0))
        shaped = active & ~sure
        candidates.keep_above(candidates.top + settings.min_p.log(), active=shaped)
        candidates.keep_first(settings.top_k.long(), active=shaped)
        candidates.keep_mass(below(settings.top_p), active=shaped)
        candidates.keep_first(torch.ones_like(settings.top_k, dtype=torch.int64), active=sure)
        candidates.draw_often(torch.where(other, _TRIES, 1), again=wild & late)
        candidates.force(asks, self.clarify.at(rows))

    def _asked_before(self, rows: Rows) -> Tensor:
        history = History.of(self.lanes, rows)
        same = history.ids == self.clarify.at(rows)
        return (same & history.generated).any(1, keepdim=True)


class _Settings:
    """The numbers each row is sampled with, [R, 1] each, until a regime says otherwise its own."""

    def __init__(
        self,
        its: dict[str, Tensor],
        attention: dict[str, Tensor],
        entropy: Tensor,
        varentropy: Tensor,
    ) -> None:
        self.its = its
        self.attention = attention
        self.both = entropy + varentropy
        self.temperature = torch.ones_like(entropy)
        self.top_p, self.top_k, self.min_p = its["top_p"], its["top_k"], its["min_p"]

    def use(
        self, where: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor
    ) -> None:
        self.temperature = torch.where(where, temperature, self.temperature)
        self.top_p = torch.where(where, top_p, self.top_p)
        self.top_k = torch.where(where, top_k, self.top_k)
        self.min_p = torch.where(where, min_p, self.min_p)

    def lost(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        its, entropy = self.its, self.attention["entropy"]
        temperature = (its["temperature"] * (1.3 + 0.2 * entropy)).clamp(max=1.5)
        return temperature, its["top_p"], its["top_k"], its["min_p"]

    def forked(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        its, attention = self.its, self.attention
        temperature = (its["temperature"] * (1.2 + 0.3 * attention["interaction"])).clamp(max=1.5)
        wider = its["top_k"] * (1.0 + 0.5 * (1.0 - attention["agreement"]))
        return temperature, its["top_p"], wider.floor().clamp(min=5), its["min_p"]

    def wild(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        its, attention = self.its, self.attention
        temperature = (its["temperature"] * (2.0 + 0.5 * attention["varentropy"])).clamp(min=2.0)
        top_p = (its["top_p"] - 0.2 * attention["entropy"]).clamp(min=0.5)
        return temperature, top_p, its["top_k"], its["min_p"]

    def other(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        its, attention = self.its, self.attention
        spread = attention["entropy"] + attention["varentropy"]
        agreement = 0.2 * attention["agreement"]
        temperature = its["temperature"] * (1.0 + 0.3 * self.both + 0.2 * spread - agreement)
        top_p = (its["top_p"] * (1.0 + 0.1 * attention["varentropy"])).clamp(0.1, 1.0)
        wider = its["top_k"] * (1.0 + 0.3 * attention["interaction"] - agreement)
        min_p = (its["min_p"] * (1.0 - 0.5 * self.both)).clamp(0.01, 0.5)
        return temperature, top_p, wider.round().clamp(1, 100), min_p


_ATTENTION = ("entropy", "varentropy", "agreement", "interaction")
_NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "low_ent",
    "med_ent",
    "high_ent",
    "low_vent",
    "high_vent",
)
_THRESHOLDS = {
    "2024-10-07": (0.1, 3.0, 5.0, 0.1, 5.0),
    "head": (0.3, 1.2, 2.5, 1.2, 2.5),
}


def _in_bits(params: EntropixParams) -> dict[str, float]:
    """All numbers, the profile's where the request has none; thresholds in bits and bits²."""
    numbers = {name: float(getattr(params, name)) for name in _NUMBERS[:4]}
    unit = 1.0 / math.log(2.0) if params.profile == "head" else 1.0
    defaults = zip(_NUMBERS[4:], _THRESHOLDS[params.profile], strict=True)
    for name, default in defaults:
        given = getattr(params, name)
        power = unit if name.endswith("_ent") else unit * unit
        numbers[name] = (default if given is None else given) * power
    return numbers
