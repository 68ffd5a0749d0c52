"""Passes over candidates, for each instruction set alike, against the torch they stand for."""

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import native
from engine.logits.candidates import Candidates
from engine.logits.tfs import _bent
from engine.logits.typical_p import _typical
from engine.numerics import NEG_INF
from engine.rng import Domain, winner
from tests.support.kernels import libraries
from tests.support.logits import hard_rows, random_rows

ROWS = 24
LIBRARIES = pytest.mark.parametrize("library", libraries(), ids=lambda one: f"isa {one.isa}")


def with_some_dropped(candidates: Candidates) -> None:
    generator = torch.Generator().manual_seed(candidates.width)
    dropped = torch.rand(ROWS, candidates.width, generator=generator) < 0.2
    dropped[:, candidates.width // 2] = False
    candidates.drop(dropped, sure=torch.ones(ROWS, 1, dtype=torch.bool))


def with_nine(candidates: Candidates) -> None:
    everywhere = torch.ones(ROWS, 1, dtype=torch.bool)
    candidates.keep_first(torch.full((ROWS, 1), 9), active=everywhere)


def with_all(_: Candidates) -> None:
    pass


def built(logits: Tensor, width: int, change: Callable[[Candidates], None]) -> Candidates:
    candidates = Candidates(logits, width)
    _ = candidates.ids
    candidates.divide(torch.full((ROWS, 1), 0.7))
    change(candidates)
    _ = candidates.probs, candidates.alive
    return candidates


def cases() -> Iterator[Candidates]:
    """Rows with and without ties and bans, at several widths, after several other filters."""
    for vocab_size in (7, 40, 300, 5003):
        smooth = random_rows(ROWS, vocab_size)
        banned = smooth.clone()
        banned[torch.rand(banned.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = NEG_INF
        banned[:, vocab_size // 2] = 1.0
        hard = hard_rows(vocab_size).repeat(ROWS, 1)[:ROWS]
        for logits in (smooth, smooth.round(), (smooth * 4).round() / 4, banned, hard):
            for width in (3, 16, 256, 2048):
                for change in (with_all, with_some_dropped, with_nine):
                    yield built(logits, width, change)


def limits() -> Tensor:
    limit = torch.rand(ROWS, 1, generator=torch.Generator().manual_seed(3))
    limit[0], limit[1] = 1e-4, 0.999999
    return limit


def both_ways(
    library: native.Library,
    monkeypatch: pytest.MonkeyPatch,
    decide: Callable[..., tuple[Tensor, ...]],
    *args: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the kernels and torch decide, one tensor after the other."""
    monkeypatch.setattr(native, "LIBRARY", None)
    wanted = decide(*args)
    monkeypatch.setattr(native, "LIBRARY", library)
    yield from zip(decide(*args), wanted, strict=True)


CHANGES: dict[str, Callable[[Candidates, Tensor, Tensor], None]] = {
    "a mask": lambda its, active, limit: its.keep(its.ids % 3 > 0, active, limit > 0.5),
    "above": lambda its, active, limit: its.keep_above(its.top - 9 * limit, active),
    "the first": lambda its, active, limit: its.keep_first((limit * its.width).long(), active),
    "a mass": lambda its, active, limit: its.keep_mass(limit, active),
}


@LIBRARIES
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_same_candidates_stay(
    library: native.Library,
    change: Callable[[Candidates, Tensor, Tensor], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(4)
    active = torch.rand(ROWS, 1, generator=generator) < 0.8

    def changed(candidates: Candidates) -> tuple[Tensor, ...]:
        its = copy(candidates)
        change(its, active, limits())
        assert its.alive is not candidates.alive  # which is of what was there before
        return its.logits, its.unsure, its.tail, its.whole, its.raw

    for candidates in cases():
        candidates.unsure[0] = True
        for got, want in both_ways(library, monkeypatch, changed, candidates):
            assert torch.equal(got, want)


@LIBRARIES
def test_the_curve_is_cut_at_the_same_place(
    library: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = limits().double()
    for candidates in cases():
        for got, want in both_ways(library, monkeypatch, _bent, candidates, limit):
            left = candidates.alive if got.shape[1] > 1 else torch.tensor(True)
            assert torch.equal(got & left, want & left)


def typical(candidates: Candidates, limit: Tensor) -> tuple[Tensor, ...]:
    total, entropy = candidates.total.float(), candidates.entropy.float()
    keep, mass, farthest = _typical(candidates, total, entropy, limit)
    # Where the limit is not reached, the farthest does not matter.
    return keep & candidates.alive, mass, farthest.masked_fill(mass < limit, 0.0)


@LIBRARIES
def test_the_same_tokens_are_typical(
    library: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = limits()
    for candidates in cases():
        for got, want in both_ways(library, monkeypatch, typical, candidates, limit):
            assert torch.equal(got, want)


@LIBRARIES
def test_probabilities_are_those_of_float64(library: native.Library) -> None:
    logits = random_rows(50, 3001) * 20
    logits[3, ::2] = NEG_INF
    logits[4] = -1e30
    logits[5] = 0.0
    total = logits.double().logsumexp(1, keepdim=True)
    want = (logits.double() - total).exp().float()
    torch.testing.assert_close(library.probs(logits, total), want, rtol=1e-7, atol=0)
    assert torch.equal(
        library.probs(logits[5:6, :4], torch.full((1, 1), 4.0).double().log()),
        torch.full((1, 4), 0.25),
    )


@LIBRARIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_entry_wins(
    library: native.Library, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, width = 200, 301
    generator = torch.Generator().manual_seed(5)
    values = (random_rows(rows, width) * 3).to(dtype)
    values[::2, 7:] = NEG_INF
    values[5] = NEG_INF
    seeds = torch.randint(-(1 << 62), 1 << 62, (rows,), generator=generator)
    positions = torch.randint(0, 9000, (rows,), generator=generator)
    ids = torch.randint(0, 200_000, (rows, width), generator=generator)
    for its in (ids, ids[:1]):
        args = values, seeds, positions, its, Domain.EXTRA + 1
        monkeypatch.setattr(native, "LIBRARY", library)
        got = winner(*args)
        monkeypatch.setattr(native, "LIBRARY", None)
        assert torch.equal(got, winner(*args))
        assert len(got.unique()) > 20
