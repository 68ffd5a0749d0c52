"""The head: logits in float32 whatever the rest runs in, from weights that may be shared."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.base import Head, KVShape, RowByRow, head_dtype


def test_candidates_that_bfloat16_would_tie_stay_apart() -> None:
    # Between 16 and 32 bfloat16's numbers are 0.125 apart.
    weight = torch.tensor([[16.0, 0.03], [16.0, 0.05], [16.0, 0.01]])
    hidden = torch.ones(1, 2, dtype=torch.bfloat16)
    assert len(F.linear(hidden, weight.bfloat16()).unique()) == 1
    logits = Head(weight)(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.tensor([[16.03, 16.05, 16.01]]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_the_head_is_a_product(tied: bool, biased: bool, rows: int) -> None:
    weight, hidden = torch.randn(33, 16), torch.randn(rows, 16)
    bias = torch.randn(33, dtype=torch.bfloat16) if biased else None
    want = F.linear(hidden, weight, None if bias is None else bias.float())
    got = Head(weight.clone(), bias, tied=tied)(hidden)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)


def test_a_tied_weight_is_read_where_it_is() -> None:
    weight = torch.randn(33, 16)
    head = Head(weight, tied=True)
    weight.zero_()
    assert not head(torch.ones(3, 16)).any()


def test_on_cpu_the_heads_weight_is_float32() -> None:
    assert head_dtype(torch.bfloat16, "cpu") == torch.float32
    assert head_dtype(torch.bfloat16, "cuda") == torch.bfloat16


def test_a_layer_keeps_keys_and_values_of_their_own_widths() -> None:
    assert KVShape(heads=3, key_dim=8, value_dim=16).numel == 72


@pytest.mark.parametrize("function", [F.silu, F.gelu])
@pytest.mark.parametrize("width", [5, 100, 1000])
def test_row_by_row_a_row_has_the_same_bits_in_every_batch(
    function: Callable[[Tensor], Tensor], width: int
) -> None:
    apart = RowByRow(function)
    both = torch.randn(70, 2 * width)
    x = both[:, :width]  # as half of a product
    whole = apart(x)
    torch.testing.assert_close(whole, function(x))
    for size in (1, 3, 33):
        assert torch.equal(torch.cat([apart(rows) for rows in x.split(size)]), whole)
    assert torch.equal(apart(x.view(1, 70, width))[0], whole)
