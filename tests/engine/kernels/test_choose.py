"""One pass to a token, for rows with common filters: the tokens are those of the stages' way."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import native
from engine.logits.common import Common
from engine.numerics import NEG_INF
from tests.support.kernels import libraries
from tests.support.logits import Spec, hard_rows, random_rows, rows_of, sampler_for

LIBRARIES = pytest.mark.parametrize("library", libraries(), ids=lambda one: f"isa {one.isa}")
METHODS: list[dict[str, Any]] = [
    {"temperature": temperature} | min_p | top_k | top_p
    for temperature, min_p, top_k, top_p in product(
        (0.0, 5e-5, 0.6, 1.0, 2.0),
        ({}, {"min_p": 1e-9}, {"min_p": 0.02}, {"min_p": 1.0}),
        ({}, {"top_k": 1}, {"top_k": 40}, {"top_k": 300}),
        ({}, {"top_p": 1e-6}, {"top_p": 0.9}, {"top_p": 0.5, "top_p_rule": "inclusive"}),
    )
]
OTHERS: list[dict[str, Any]] = [
    {"temperature": 0.9, "dynatemp_range": 0.5},
    {"temperature": 0.9, "top_k": 40, "typical_p": 0.5},
    {"temperature": 0.9, "top_k": 40, "sampler_order": "llama.cpp"},
    {"temperature": 0.9, "xtc_probability": 1.0, "xtc_threshold": 0.01},
]


def tokens_of(specs: Sequence[Spec], logits: Tensor, common: type[Common] = Common) -> list[int]:
    sampler, lane_ids = sampler_for(specs, logits.shape[1])
    sampler.common.__class__ = common
    return sampler(logits.clone(), rows_of(specs, lane_ids)).token_ids


class Nothing(Common):
    """Leaves all that is sampled to the stages."""

    def choose(self, logits: Tensor, rows: Any) -> tuple[Tensor, Tensor, list[int]]:
        top, ids = logits.max(1)
        where = torch.arange(logits.shape[1]).expand_as(logits)
        ids = torch.where(logits == top[:, None], where, logits.shape[1]).amin(1)
        return top, ids, (~self.greedy[rows.host_lanes]).nonzero()[0].tolist()


def rows(count: int, vocab_size: int) -> Tensor:
    """Rows with few and many ties, bans, flat and steep ones, and ones near the ends of float32."""
    smooth = random_rows(count, vocab_size)
    banned = smooth.masked_fill(random_rows(count, vocab_size).roll(7, 1) < 0.5, NEG_INF)
    banned[:, vocab_size // 3] = 0.5
    low = torch.full_like(smooth, NEG_INF)  # by a temperature below 1, too low for float32
    low[:, -1] = -3e38
    low[::3, -3:] = torch.tensor([-3.1e38, -3.2e38, -3.1e38])
    hard = hard_rows(vocab_size)
    kinds = (smooth, smooth * 5, smooth.round(), (smooth * 6).round() / 2, banned, smooth / 50, low)
    kinds += (hard.repeat(-(-count // len(hard)), 1),)
    return torch.stack([kinds[i % len(kinds)][i // len(kinds) % count] for i in range(count)])


@LIBRARIES
@pytest.mark.parametrize("vocab_size", [7, 255, 257, 3001])
def test_the_tokens_are_those_that_the_stages_lead_to(
    library: native.Library, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "LIBRARY", library)
    methods = (METHODS + OTHERS) * 4
    specs = [Spec(params, seed=seed * 977) for seed, params in enumerate(methods)]
    logits = rows(len(specs), vocab_size)
    got = tokens_of(specs, logits)
    assert got == tokens_of(specs, logits, Nothing)
    monkeypatch.setattr(native, "LIBRARY", None)
    assert got == tokens_of(specs, logits)


@LIBRARIES
def test_only_what_is_common_and_certain_is_chosen_at_once(
    library: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "LIBRARY", library)
    params: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 1e-9},
        {"temperature": 0.8},
        {"temperature": 5e-5, "top_k": 300},
        {"temperature": 0.8, "top_k": 257},
        {"temperature": 0.8, "top_p": 0.9999},
        {"temperature": 0.8, "min_p": 1e-9},
        *OTHERS,
    ]
    specs = [Spec(its) for its in params]
    flat = random_rows(1, 700).expand(len(specs), -1) / 4
    sampler, lane_ids = sampler_for(specs, 700)
    late = sampler.common.choose(flat, rows_of(specs, lane_ids))[2]
    assert late == [4, 5, 6, 7, 8, 9, 10]
    for bad in (float("nan"), float("inf")):
        broken = flat.clone()
        broken[:, 3] = bad
        top, ids, late = sampler.common.choose(broken, rows_of(specs, lane_ids))
        assert late == [*range(1, len(specs))]
        assert torch.equal(top.nan_to_num(7.0), broken[:, 3].nan_to_num(7.0))
        assert bad != bad or ids.tolist() == [3] * len(specs)
