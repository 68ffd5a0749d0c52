"""Passes over rows of logits, for each instruction set alike; their references are in numerics."""

import pytest
import torch
from torch import Tensor

from engine.kernels.native import Library
from engine.numerics import NEG_INF
from tests.support.kernels import libraries
from tests.support.logits import hard_rows, random_rows


def rows() -> Tensor:
    """Rows of a size that is no multiple of a vector, some with ties, one with a NaN."""
    logits = random_rows(40, 5003)
    logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = NEG_INF
    logits[7, 4999] = float("nan")
    return torch.cat((hard_rows(5003), logits, logits.round()))


@pytest.mark.parametrize("library", libraries(), ids=lambda library: f"isa {library.isa}")
def test_every_instruction_set_finds_the_same_entries(library: Library) -> None:
    logits = rows()
    widest = libraries()[-1]
    top, first = library.scan(logits)
    want, want_first = widest.scan(logits)
    assert torch.equal(top.nan_to_num(7e9), want.nan_to_num(7e9))
    assert torch.equal(first, want_first)
    assert torch.equal(library.count(logits), (logits > NEG_INF).sum(1))
    for k in (1, 50, 256, 2048, 5003):
        for got, reference in zip(library.select(logits, k), widest.select(logits, k), strict=True):
            assert torch.equal(got.nan_to_num(7e9), reference.nan_to_num(7e9))


@pytest.mark.parametrize("library", libraries(), ids=lambda library: f"isa {library.isa}")
def test_every_instruction_set_measures_what_float64_does(library: Library) -> None:
    logits = random_rows(8, 5003)
    factor = torch.tensor([0.5, 1.0]).repeat(4)
    top, mass, moment = library.measure(logits, factor)
    z = logits.double() - top.double()[:, None]
    e = (z * factor.double()[:, None]).exp()
    torch.testing.assert_close(mass.double().sum(1), e.sum(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(moment.double().sum(1), (e * z).sum(1), rtol=2e-6, atol=0)
    assert torch.equal(top, logits.amax(1))
    wide = logits.double().std(1, correction=0)
    torch.testing.assert_close(library.deviation(logits).double(), wide, rtol=1e-6, atol=0)


@pytest.mark.parametrize("library", libraries(), ids=lambda library: f"isa {library.isa}")
def test_every_instruction_set_finds_the_divergence_of_float64(library: Library) -> None:
    logits, others = random_rows(3, 5003), random_rows(9, 5003, seed=1) * 0.3
    logits[1, ::3] = others[2, 1::3] = NEG_INF
    others[4], others[5] = logits[1], logits[1].roll(1)
    logits[2] += 1e4
    index = torch.tensor([[2, 0, 8], [4, 5, 1], [7, 6, 6]])
    p, q = logits.double().softmax(1).unsqueeze(1), others.double().softmax(1)[index]
    middle = (p + q) / 2
    entropies = [-x.xlogy(x).sum(-1) for x in (middle, p, q)]
    want = entropies[0] - (entropies[1] + entropies[2]) / 2
    got = library.divergence(logits, others, index)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
