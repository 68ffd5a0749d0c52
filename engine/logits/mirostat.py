"""Mirostat: Basu et al., 2020, arXiv:2007.14966."""

import math

import torch
from torch import Tensor

from engine.lanes import Lanes
from engine.logits.candidates import Candidates
from engine.logits.stage import Filter
from engine.messages import Request
from engine.types import Rows

_FITTED = 100  # of the likeliest tokens, by which version 1 estimates the Zipf exponent


class Mirostat(Filter):
    """Hold the surprise of the drawn tokens near `mirostat_tau` bits.

    A limit mu, 2 tau at first, follows the error of each draw. Version 2 drops tokens more
    surprising than mu. Version 1 estimates how many tokens mu allows from the slope of the
    likeliest 100, as if they followed Zipf's law. At least one token stays.
    """

    fields = ("mirostat", "mirostat_tau", "mirostat_eta")

    def __init__(self, lanes: Lanes) -> None:
        self.version = lanes.column(torch.int64, neutral=0)
        self.tau = lanes.column(torch.float64, neutral=0.0)
        self.eta = lanes.column(torch.float64, neutral=0.0)
        self.mu = lanes.state(torch.float64, neutral=0.0)
        self.first = lanes.flags()

    def admit(self, lane: int, request: Request) -> bool:
        params = request.params
        self.version[lane] = params.mirostat
        self.first[lane] = params.mirostat == 1
        self.tau[lane] = params.mirostat_tau
        self.eta[lane] = params.mirostat_eta
        self.mu[lane] = 2.0 * params.mirostat_tau
        return params.mirostat > 0

    def apply(self, candidates: Candidates, rows: Rows) -> None:
        version, mu = self.version.at(rows), self.mu.at(rows)
        floor = (candidates.total - mu * math.log(2.0)).float()
        candidates.keep_above(floor.minimum(candidates.top), active=version == 2)
        if first := self.first[rows.host_lanes].nonzero()[0].tolist():
            rank = candidates.alive.cumsum(1)
            limit = torch.ones_like(version)
            limit[first] = _allowed(candidates, mu, first)
            seen = rank[:, -1:]
            fitted = seen >= _FITTED
            # A row that may keep all tokens has nothing to look for in its tail.
            active = (version == 1) & ~(fitted & (limit >= candidates.vocab_size))
            candidates.keep(rank <= limit, active, inside=fitted & (seen >= limit))

    def observe(self, candidates: Candidates, rows: Rows, tokens: Tensor) -> None:
        error = -candidates.probs_of(tokens).double().log2() - self.tau.at(rows)
        # Finite, or it could become no number, and no token would be below it.
        largest = torch.finfo(torch.float64).max
        changed = (self.mu.at(rows) - self.eta.at(rows) * error).clamp(-largest, largest)
        # A row that is unsure is drawn from again, with all its tokens as candidates.
        final = (self.version.at(rows) > 0) & ~candidates.unsure.unsqueeze(1)
        self.mu.values[rows.lanes] = torch.where(final, changed, self.mu.at(rows)).squeeze(1)


def _allowed(candidates: Candidates, mu: Tensor, rows: list[int]) -> Tensor:
    """How many tokens a limit of `mu` bits allows in some rows, [r, 1] int64."""
    mu, logits = mu[rows], candidates.logits[rows, :_FITTED].double()
    probs = (logits - candidates.total[rows]).exp_().float().double()
    pairs = (probs[:, 1:] > 0.0).sum(1, keepdim=True)
    index = torch.arange(probs.shape[1] - 1, dtype=torch.float64, device=probs.device)
    used = index < pairs
    steps = torch.where(used, ((index + 2) / (index + 1)).log(), 0.0)
    drops = torch.where(used, (probs[:, :-1] / probs[:, 1:]).log(), 0.0)
    slope = (steps * drops).sum(1, keepdim=True) / (steps * steps).sum(1, keepdim=True)
    epsilon = slope - 1.0
    count = candidates.vocab_size
    # Where the exponent is 1, the sum that the formula approximates is a logarithm.
    usual = epsilon * mu.exp2() / (1.0 - float(count) ** -epsilon)
    limit = torch.where(epsilon.abs() < 1e-9, mu.exp2() / math.log(count), usual)
    allowed = limit.pow(1.0 / slope)
    return allowed.nan_to_num(nan=1.0, posinf=count).clamp(1, count).long()
