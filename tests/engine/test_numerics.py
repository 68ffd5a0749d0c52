"""Row-wise reductions, by our kernels and by torch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine import numerics
from engine.kernels import native
from engine.numerics import (
    BLOCK,
    NEG_INF,
    best,
    block_masses,
    blocked,
    bounded,
    count_finite,
    cut_,
    deviation,
    divergence,
    log_softmax,
    log_sum_exp,
    moments,
    rank,
    row_sum,
    scan,
    summarise,
)
from tests.support.logits import DIST_P, ROW_A, hard_rows, random_rows, several_threads

SIZES = pytest.mark.parametrize("vocab_size", [5, 16, 256, 257, 1000, 49_152])
close = torch.testing.assert_close


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with our kernels, where they were compiled, and without."""
    if request.param == "torch":
        monkeypatch.setattr(native, "LIBRARY", None)


def with_some_dropped(vocab_size: int) -> Tensor:
    logits = random_rows(64, vocab_size)
    logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(2)) < 0.2] = NEG_INF
    logits[:, vocab_size // 2] = 1.0
    return logits


def ones(logits: Tensor) -> Tensor:
    return torch.ones(len(logits))


def ties(vocab_size: int) -> Tensor:
    """Many ties, few, and none."""
    logits = random_rows(24, vocab_size)
    return torch.cat((hard_rows(vocab_size), logits, logits.round(), (logits * 8).round()))


@SIZES
def test_reductions_match_float64(vocab_size: int) -> None:
    logits = with_some_dropped(vocab_size)
    temperature = torch.tensor([0.5, 1.0, 1.7, 0.01]).repeat(16)
    exact = logits.double() / temperature.double().unsqueeze(1)
    total, entropy = summarise(logits, temperature)
    close(total, exact.logsumexp(1, keepdim=True), rtol=1e-6, atol=2e-6)
    nats = torch.special.entr(exact.softmax(1)).sum(1, keepdim=True)
    close(entropy, nats, rtol=2e-6, atol=2e-5)
    top, rest = log_sum_exp(logits)
    assert torch.equal(top, logits.amax(1, keepdim=True))
    close((top + rest).double(), logits.double().logsumexp(1, keepdim=True), rtol=1e-6, atol=2e-6)
    close(log_softmax(logits).double(), logits.double().log_softmax(1), rtol=1e-6, atol=2e-6)
    below = (logits.double() - logits.amax(1, keepdim=True)).clamp(min=-1e30)
    p = below.softmax(1)
    mean = (p * below).sum(1, keepdim=True)
    total, entropy, varentropy = moments(logits)
    close(total, logits.double().logsumexp(1, keepdim=True), rtol=1e-6, atol=2e-6)
    close(entropy, torch.special.entr(p).sum(1, keepdim=True), rtol=2e-6, atol=2e-5)
    close(varentropy, (p * (below - mean) ** 2).sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    others = random_rows(2, vocab_size, seed=1)
    p, q = logits.double().softmax(1).unsqueeze(1), others.double().softmax(1).flip(0)
    entropies = [torch.special.entr(x).sum(-1) for x in ((p + q) / 2, p, q)]
    between = entropies[0] - (entropies[1] + entropies[2]) / 2
    index = torch.tensor([[1, 0]] * len(logits))
    close(divergence(logits, others, index), between, rtol=2e-6, atol=2e-6)
    alive = [row[row > NEG_INF].double().std(correction=0) for row in logits]
    close(deviation(logits)[:, 0].double(), torch.stack(alive), rtol=1e-5, atol=1e-6)


@SIZES
@pytest.mark.parametrize(
    "reduce",
    [
        lambda x: scan(x)[0],
        lambda x: scan(x)[1],
        lambda x: block_masses(x, 0.7 * ones(x))[1],
        lambda x: block_masses(x, 0.7 * ones(x))[2],
        lambda x: summarise(x, 0.7 * ones(x))[0],
        lambda x: summarise(x, 0.7 * ones(x))[1],
        deviation,
        log_softmax,
        lambda x: divergence(x, random_rows(3, x.shape[1]), torch.tensor([[2, 0]] * len(x))),
    ],
    ids=[
        "max",
        "first",
        "masses",
        "moments",
        "total",
        "entropy",
        "deviation",
        "logprobs",
        "divergence",
    ],
)
def test_a_row_alone_gives_the_same_bits_as_in_a_batch(
    reduce: Callable[[Tensor], Tensor], vocab_size: int
) -> None:
    logits = random_rows(64, vocab_size)
    with several_threads():
        together = reduce(logits)
        for row in range(0, 64, 3):
            assert torch.equal(reduce(logits[row, None])[0], together[row])
        assert torch.equal(reduce(logits[:7]), together[:7])


@SIZES
def test_the_best_of_some_rows_and_all_that_is_to_know_of_rows_in_one_pass(vocab_size: int) -> None:
    logits, temperature = random_rows(9, vocab_size), torch.linspace(0.5, 2.0, 9)
    index = torch.tensor([7, 0, 7, 3])
    for got, want in zip(best(logits, 20, index), best(logits[index], 20), strict=True):
        assert torch.equal(got, want)
    found, summary = rank(logits, 20, temperature)
    for got, want in zip(found, best(logits, 20), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(summary, summarise(logits, temperature))


def test_worked_numbers() -> None:
    large = torch.tensor([[1000.0, 1001.0, 1002.0]])
    top, rest = log_sum_exp(large)
    want = torch.tensor([[-2.407606, -1.407606, -0.407606]])
    close(large - top - rest, want, rtol=0, atol=1e-6)
    top, rest = log_sum_exp(ROW_A[None])
    want = torch.tensor([[-0.451914, -1.451914, -2.451914, -3.451914, -4.451914]])
    close(ROW_A[None] - top - rest, want, rtol=0, atol=1e-6)
    both = torch.stack((ROW_A, DIST_P))
    want = torch.tensor([[0.999973], [1.392321]])
    close(summarise(both, ones(both))[1].float(), want, rtol=0, atol=2e-6)
    sigma = deviation(ROW_A[None])
    close(sigma, torch.tensor([[1.414214]]), rtol=0, atol=1e-6)


def test_rows_with_a_single_finite_entry() -> None:
    logits = torch.full((2, 300), NEG_INF)
    logits[:, 299] = 4.0
    total, entropy = summarise(logits, ones(logits))
    assert total.tolist() == [[4.0], [4.0]]
    assert entropy.tolist() == [[0.0], [0.0]]
    assert deviation(logits).tolist() == [[0.0], [0.0]]
    assert count_finite(logits).tolist() == [[1], [1]]


@SIZES
def test_dropped_entries_are_not_counted(vocab_size: int) -> None:
    logits = with_some_dropped(vocab_size)
    assert torch.equal(count_finite(logits)[:, 0], (logits > NEG_INF).sum(1))


@SIZES
def test_a_floor_cuts_what_is_below_it_after_temperature(vocab_size: int) -> None:
    logits = with_some_dropped(vocab_size)
    logits = torch.cat((logits, logits.round()))
    temperature = torch.tensor([0.7, 1.0, 1.7, 0.01]).repeat(32)
    scaled = logits / temperature[:, None]
    floor = scaled.sort(1, descending=True)[0][:, vocab_size // 3]
    floor[::5] = NEG_INF
    got = logits.clone()
    cut_(got, temperature, floor)
    want = torch.where(scaled < floor[:, None], NEG_INF, logits)
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def test_a_row_without_a_finite_entry_has_the_maximum_minus_infinity() -> None:
    top, first = scan(torch.full((2, 300), NEG_INF))
    assert top.tolist() == [NEG_INF] * 2
    assert ((first >= 0) & (first < 300)).all()


@pytest.mark.parametrize("at", [0, 15, 255, 256, 299])
def test_the_maximum_of_a_row_with_a_nan_is_nan(at: int) -> None:
    logits = random_rows(3, 300)
    logits[1, at] = float("nan")
    top, first = scan(logits)
    assert top.isnan().tolist() == [False, True, False]
    assert 0 <= first[1] < 300
    ids = best(logits, 20)[1]
    assert ((ids >= 0) & (ids < 300)).all()


def test_infinities_become_the_largest_float_and_nothing_else_changes() -> None:
    logits = random_rows(3, 300)
    infinite = logits.clone()
    infinite[1, 7] = float("inf")
    top, first = scan(infinite)
    got = bounded(infinite)
    assert got[1, 7] == torch.finfo(torch.float32).max
    assert (top[1], first[1]) == (float("inf"), 7)
    got[1, 7] = logits[1, 7]
    assert torch.equal(got, logits)


def test_blocks_are_padded_at_the_end() -> None:
    x = torch.arange(600.0).reshape(2, 300)
    got = blocked(x, -1.0)
    assert got.shape == (2, 2, BLOCK)
    assert torch.equal(got.flatten(1)[:, :300], x)
    assert (got.flatten(1)[:, 300:] == -1.0).all()


@pytest.mark.parametrize(
    ("vocab_size", "at", "first"),
    [
        (4, [1, 2], 1),
        (700, [255, 256], 255),
        (700, [600, 256, 257], 256),
        (700, [699], 699),
        (700, [0, 699], 0),
    ],
)
def test_of_equal_maxima_the_lowest_id_is_taken(vocab_size: int, at: list[int], first: int) -> None:
    logits = torch.zeros(vocab_size)
    logits[at] = 3.0
    assert scan(logits[None])[1].tolist() == [first]


def test_the_first_maximum_matches_a_plain_scan() -> None:
    logits = torch.cat((hard_rows(700), (random_rows(60, 700) / 2).round()))
    want = [row.index(max(row)) for row in logits.tolist()]
    assert scan(logits)[1].tolist() == want


@pytest.mark.parametrize("width", [1, 2, 5, 100, 255, 256, 699, 700, 5000])
def test_the_best_come_in_descending_order_and_of_equals_the_lowest_id_first(width: int) -> None:
    logits = ties(700)
    values, ids = best(logits, width)
    want, order = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, want[:, :width])
    # Entries of -inf are tokens that are not there; torch gives them in any order.
    alive = values > NEG_INF
    assert torch.equal(ids[alive], order[:, :width][alive])
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(row.unique()) == len(row) for row in ids)


@pytest.mark.parametrize("width", [900, 2048, 6000, 16_384, 20_000])
def test_many_come_in_the_same_order_as_few(width: int) -> None:
    logits = ties(20_000)[::3]
    values, ids = best(logits, width)
    want, order = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, want[:, :width])
    alive = values > NEG_INF
    assert torch.equal(ids[alive], order[:, :width][alive])


@pytest.mark.parametrize("width", [3, 256])
def test_the_best_of_a_row_do_not_depend_on_the_others(width: int) -> None:
    logits = ties(700)
    values, ids = best(logits, width)
    for row in range(len(logits)):
        alone = best(logits[row, None], width)
        assert torch.equal(alone[0][0], values[row])
        assert torch.equal(alone[1][0], ids[row])


def test_rows_may_lie_apart() -> None:
    wide = random_rows(8, 900)
    part = wide[:, :700]
    assert not part.is_contiguous()
    copy = part.contiguous()
    for reduce in (scan, lambda x: best(x, 50), lambda x: block_masses(x, ones(x))):
        for got, want in zip(reduce(part), reduce(copy), strict=True):
            assert torch.equal(got, want)
    assert torch.equal(deviation(part), deviation(copy))


def test_rows_at_an_index_are_reduced_where_they_are() -> None:
    logits, index = random_rows(8, 700), torch.tensor([5, 0, 5, 7])
    logits[0, ::3] = NEG_INF
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.5])
    some = logits[index]
    pairs = [
        (best(logits, 50, index), best(some, 50)),
        (block_masses(logits, temperature, index), block_masses(some, temperature)),
        (summarise(logits, temperature, index), summarise(some, temperature)),
        (rank(logits, 50, temperature, index)[1], rank(some, 50, temperature)[1]),
        ([deviation(logits, index)], [deviation(some)]),
        ([count_finite(logits, index)], [count_finite(some)]),
    ]
    for got, want in pairs:
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)


def test_the_kernels_are_used_only_for_what_they_can_read() -> None:
    rows = random_rows(2, 300)
    assert numerics.kernels(rows.double()) is None
    assert numerics.kernels(rows.t()) is None
    assert numerics.kernels(rows) is native.LIBRARY


@SIZES
def test_a_sum_has_the_same_bits_in_every_number_of_rows(vocab_size: int) -> None:
    x = random_rows(8, vocab_size).double().exp()  # sums of float32 numbers would be exact
    with several_threads():
        whole = row_sum(x)
        for size in (1, 3):
            assert torch.equal(torch.cat([row_sum(rows) for rows in x.split(size)]), whole)
    close(whole, x.sum(1, keepdim=True))
