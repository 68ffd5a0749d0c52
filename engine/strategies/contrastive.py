"""Contrastive search: Su et al., 2022, arXiv:2202.06417."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.messages import NO_VALID_TOKEN, Request, Token
from engine.strategies.base import Branch, Plain, View, Wants
from engine.types import Sequence


class Contrastive(Plain):
    """Of the k likeliest tokens, the one that is likely and unlike what came before.

    The candidates are computed as drafts; their hidden states decide, and the winner's own next
    candidates follow at once, so a token costs one step of k sequences.
    """

    streams = True

    def __init__(self, request: Request) -> None:
        self.width = request.params.top_k
        self.alpha = float(request.params.penalty_alpha or 0.0)
        self.wants = Wants(top=self.width, hidden=True)
        self.capacity = request.num_prompt + request.max_tokens
        self.before: Tensor | None = None  # [capacity, H], of length 1 each
        self.num_before = 0

    def remember(self, start: int, hidden: Tensor) -> None:
        """Take in the hidden states [T, H] of the prompt's tokens from position `start` on."""
        self._keep(hidden[self.num_before - start :])

    def advance(self, live: list[Sequence], view: View) -> list[Branch]:
        if len(live) == 1 and not live[0].pending:
            return self._drafts(live[0], 0, view)
        assert view.hidden is not None
        assert self.before is not None
        states = F.normalize(view.hidden.float(), dim=-1)
        likeness = (states @ self.before[: self.num_before].T).amax(1).tolist()
        scores = [
            (1.0 - self.alpha) * math.exp(sequence.score) - self.alpha * like
            for sequence, like in zip(live, likeness, strict=True)
        ]
        best = max(range(len(live)), key=lambda index: scores[index])
        self._keep(view.hidden[best, None])
        if live[best].memory:  # it ends by its candidate
            return [Branch(live[best])]
        return self._drafts(live[best], best, view)

    def _drafts(self, sequence: Sequence, index: int, view: View) -> list[Branch]:
        """A sequence's candidates, each behind what is pending of it, which counts by now."""
        drafts = [
            Branch(
                sequence,
                (candidate.token,),
                score=candidate.logprob,
                draft=True,
                memory=view.ends(sequence, candidate.token),
            )
            for candidate in view.top[index]
        ]
        return drafts or [Branch(sequence, (Token(NO_VALID_TOKEN, ""),))]

    def _keep(self, hidden: Tensor) -> None:
        if self.before is None:
            self.before = torch.empty(self.capacity, hidden.shape[1], device=hidden.device)
        end = self.num_before + len(hidden)
        self.before[self.num_before : end] = F.normalize(hidden.float(), dim=-1)
        self.num_before = end

    def rank(self, finished: list[Sequence]) -> list[Sequence]:
        return finished
