"""Packed products against torch's own, and which of their bits depend on what."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.linear import Linear

SIZES = [(96, 64), (33, 17), (576, 1536)]
PACKED = pytest.mark.parametrize("pack", [True, False], ids=["packed", "shared"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def weights(
    size: tuple[int, int], dtype: torch.dtype, biased: bool
) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=generator).to(dtype)
    return weight, torch.randn(size[0], generator=generator).to(dtype) if biased else None


def inputs(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


@PACKED
@DTYPES
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_number_of_rows_equals_the_product_in_float64(
    size: tuple[int, int], biased: bool, dtype: torch.dtype, pack: bool
) -> None:
    weight, bias = weights(size, dtype, biased)
    linear = Linear(weight.clone(), bias, pack=pack)
    x = inputs(70, size[1], dtype)
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # Sums in another order; and in bfloat16 one rounding of the result, to 8 places.
    rtol, atol = 2**-8 if dtype == torch.bfloat16 else 0.0, 2e-6 * float(want.abs().max())
    for rows in range(1, 71):
        got = linear(x[:rows])
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want[:rows], rtol=rtol, atol=atol)


@PACKED
@DTYPES
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_row_has_the_same_bits_among_any_number_of_others(
    size: tuple[int, int], dtype: torch.dtype, pack: bool
) -> None:
    weight, bias = weights(size, dtype, biased=True)
    linear = Linear(weight, bias, pack=pack)
    x = inputs(300, size[1], dtype)
    whole = linear(x)
    for first, rows in [
        *((0, rows) for rows in range(1, 71)),
        (5, 1),
        (5, 2),
        (100, 200),
        (299 - 64, 64),
    ]:
        assert torch.equal(linear(x[first : first + rows]), whole[first : first + rows]), rows


@PACKED
def test_leading_dimensions_and_strides_of_the_input_do_not_matter(pack: bool) -> None:
    weight, bias = weights((33, 17), torch.float32, biased=True)
    linear = Linear(weight.clone(), bias, pack=pack)
    wide = inputs(12, 40, torch.float32)
    x = wide[:, 5:22]  # rows apart
    want = F.linear(x, weight, bias)
    torch.testing.assert_close(linear(x), want)
    torch.testing.assert_close(linear(x.unflatten(0, (3, 4))), want.unflatten(0, (3, 4)))
    assert linear(x[:0]).shape == (0, 33)


def test_a_weight_that_is_a_view_is_packed_as_it_reads() -> None:
    weight, _ = weights((33, 17), torch.float32, biased=False)
    x = inputs(5, 33, torch.float32)
    torch.testing.assert_close(Linear(weight.t())(x), x @ weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_unpacked_weight_is_the_very_same_memory(dtype: torch.dtype) -> None:
    weight, _ = weights((33, 17), dtype, biased=False)
    linear = Linear(weight, pack=False)
    assert linear.weight.data_ptr() == weight.data_ptr()
    weight.zero_()
    assert not linear(inputs(3, 17, dtype)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_types_are_left_to_torch(dtype: torch.dtype) -> None:
    weight, bias = weights((33, 17), dtype, biased=True)
    x = inputs(5, 17, dtype)
    assert torch.equal(Linear(weight, bias)(x), F.linear(x, weight, bias))
