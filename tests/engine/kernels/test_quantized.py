"""Products with weights of 4 and 8 bits against the formula, and that a row's bits are its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import native
from engine.kernels.quantized import GROUP, Groups, QuantizedLinear, stacked
from tests.support.kernels import libraries

LIBRARIES = pytest.mark.parametrize(
    "library", libraries(), ids=lambda library: f"isa {library.isa}"
)
BITS = pytest.mark.parametrize("bits", [4, 8])
SIZES = [(16, 32), (48, 64), (33, 96), (7, 576)]  # outputs in whole panels of 32 or not


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(size: tuple[int, int], bits: int) -> Groups:
    """Random codes, with the scales and offsets that real weights have."""
    rows, columns = size
    codes = torch.randint(0, 1 << bits, size, generator=random(0), dtype=torch.uint8)
    d = (torch.rand(rows, columns // GROUP, generator=random(1)) * 0.02 + 0.001).half()
    if bits == 8:
        return Groups(8, codes, d.float(), -128.0 * d.float())
    m = (torch.randn(rows, columns // GROUP, generator=random(2)) * 0.1).half()
    return Groups(4, codes, d, m)


def exact_inputs(rows: int, columns: int) -> Tensor:
    """Numbers that 8 bits hold exactly, with a scale for each group of a row."""
    codes = torch.randint(-126, 127, (rows, columns // GROUP, GROUP), generator=random(3))
    codes[..., 5] = 127 * (1 - 2 * (codes[..., 5] & 1))  # the largest of its group
    scales = torch.rand(rows, columns // GROUP, 1, generator=random(4)) + 0.1
    return (codes * scales).flatten(1)


@LIBRARIES
@BITS
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_follows_the_formula(
    biased: bool, size: tuple[int, int], bits: int, library: native.Library
) -> None:
    groups = weight(size, bits)
    bias = torch.randn(size[0], generator=random(5)) if biased else None
    linear = QuantizedLinear(library, groups, bias)
    x = exact_inputs(19, size[1])
    want = F.linear(x.double(), groups.floats().double(), None if bias is None else bias.double())
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 19):
        torch.testing.assert_close(
            linear(x[:rows]).double(), want[:rows], rtol=0, atol=1e-5 * float(want.abs().max())
        )


@LIBRARIES
@BITS
def test_a_row_has_the_same_bits_among_any_number_of_others(
    bits: int, library: native.Library
) -> None:
    linear = QuantizedLinear(library, weight((33, 96), bits))
    x = torch.randn(40, 96, generator=random(6))
    whole = linear(x)
    for first, rows in [*((0, rows) for rows in range(1, 41)), (5, 1), (7, 13), (39, 1)]:
        assert torch.equal(linear(x[first : first + rows]), whole[first : first + rows])


@LIBRARIES
@BITS
def test_rounding_the_inputs_costs_little(bits: int, library: native.Library) -> None:
    groups = weight((64, 576), bits)
    x = torch.randn(20, 576, generator=random(7))
    want = x @ groups.floats().t()
    error = (QuantizedLinear(library, groups)(x) - want).square().mean().sqrt()
    assert error < 0.01 * want.square().mean().sqrt()


@LIBRARIES
def test_types_shapes_and_strides_of_the_input_do_not_matter(library: native.Library) -> None:
    linear = QuantizedLinear(library, weight((33, 64), 8))
    wide = torch.randn(12, 100, generator=random(8))
    x = wide[:, 3:67]
    want = linear(x.contiguous())
    assert torch.equal(linear(x), want)
    assert torch.equal(linear(x.unflatten(0, (3, 4))), want.unflatten(0, (3, 4)))
    assert linear(x[:0]).shape == (0, 33)
    narrow = linear(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), want, rtol=0, atol=0.02 * float(want.abs().max()))


@LIBRARIES
def test_zeros_and_huge_numbers_are_numbers(library: native.Library) -> None:
    linear = QuantizedLinear(library, weight((16, 64), 8))
    x = torch.zeros(3, 64)
    x[1, :32] = 1e30
    x[2] = 1e-30
    out = linear(x)
    assert not out[0].any()
    assert out.isfinite().all()


def test_rounding_a_weight_keeps_it_within_half_a_step() -> None:
    values = torch.randn(6, 96, generator=random(9)) * torch.logspace(-3, 3, 6).unsqueeze(1)
    values[2, 32:64] = 0.0
    groups = Groups.of(values)
    step = values.unflatten(1, (-1, GROUP)).abs().amax(-1, keepdim=True) / 127
    error = (groups.floats() - values).unflatten(1, (-1, GROUP)).abs()
    assert (error <= step / 2 * 1.001 + 1e-12).all()
    assert not groups.floats()[2, 32:64].any()


def test_codes_stand_for_the_numbers_of_the_formula() -> None:
    for bits in (4, 8):
        groups = weight((5, 64), bits)
        codes, d, m = groups.codes.double(), groups.d.double(), groups.m.double()
        want = codes * d.repeat_interleave(GROUP, 1) + m.repeat_interleave(GROUP, 1)
        torch.testing.assert_close(groups.floats().double(), want)


def test_weights_above_one_another_are_read_as_one() -> None:
    parts = [weight((5, 64), 4), weight((3, 64), 4)]
    assert stacked(parts).bits == 4
    assert torch.equal(stacked(parts).floats(), torch.cat([part.floats() for part in parts]))
    mixed = [weight((5, 64), 4), weight((3, 64), 8)]
    assert stacked(mixed).bits == 8
    want = torch.cat([part.floats() for part in mixed])
    torch.testing.assert_close(stacked(mixed).floats(), want, rtol=0, atol=2e-3)


def test_rows_can_be_put_in_another_order() -> None:
    groups, order = weight((5, 64), 4), torch.tensor([4, 0, 3, 1, 2])
    assert torch.equal(groups.reordered(order).floats(), groups.floats()[order])
