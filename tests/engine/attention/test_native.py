"""The CPU kernel against its reference in torch, and that a token's bits are its own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import choose_attention
from engine.attention.native import NativeAttention
from engine.attention.torch_paged import LayerCache, Span, TorchPagedAttention
from engine.kernels import native
from tests.engine.attention.steps import BLOCK, MIXED, Shape, Step
from tests.support.kernels import libraries

# Query heads that fill the kernel's 16 rows evenly, not evenly, and not at all.
SHAPES = [
    Shape(),
    Shape(9, 3, 64, 64),
    Shape(16, 1, 16, 16),
    Shape(5, 1, 48, 32),
    Shape(3, 3, 256, 16),
]
WINDOWS = pytest.mark.parametrize("window", [None, 1, 7, 65])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Listening:
    """The kernels, and what they answered to each call: whether they did the work."""

    def __init__(self, library: native.Library) -> None:
        self.library = library
        self.answers: list[bool] = []

    def attend(self, args: native.AttendArgs, element_size: int) -> bool:
        self.answers.append(self.library.attend(args, element_size))
        return self.answers[-1]


@pytest.fixture(params=libraries(), ids=lambda library: f"isa {library.isa}")
def kernels(request: pytest.FixtureRequest) -> Any:
    return Listening(request.param)


def reference() -> TorchPagedAttention:
    return TorchPagedAttention(BLOCK, "cpu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@WINDOWS
def test_float32_equals_the_reference(shape: Shape, window: int | None, kernels: Any) -> None:
    step, again = Step(MIXED, shape), Step(MIXED, shape)
    got = step.attend(NativeAttention(kernels, BLOCK), window=window)
    want = again.attend(reference(), window=window)
    assert kernels.answers == [True]
    torch.testing.assert_close(torch.cat(got), torch.cat(want), rtol=0, atol=4e-6)
    step.assert_stored()


@WINDOWS
def test_bfloat16_is_rounded_once_at_the_end(window: int | None, kernels: Any) -> None:
    step = Step(MIXED, Shape(9, 3, 64, 64), dtype=torch.bfloat16)
    got = step.attend(NativeAttention(kernels, BLOCK), window=window)
    want = torch.cat(step.expected(window))
    assert kernels.answers == [True]
    # Half a unit in the last of 8 places; small numbers keep float32's own error. With products of
    # bfloat16, weights are rounded, too.
    atol = 4e-3 if kernels.library.isa == 513 else 1e-5
    torch.testing.assert_close(torch.cat(got).double(), want, rtol=2**-8, atol=atol)
    step.assert_stored()


@pytest.mark.parametrize("seed", range(8))
def test_random_steps_equal_the_reference(seed: int, kernels: Any) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    kv_heads, group = draw(1, 4), draw(1, 17)
    shape = Shape(kv_heads * group, kv_heads, 16 * draw(1, 17), 16 * draw(1, 17))
    lengths = sorted(draw(1, 300) for _ in range(draw(0, 12)))
    parts = [(length - 1, 1) for length in lengths]
    parts += [(draw(0, 120), draw(1, 90)) for _ in range(draw(1, 5))]
    window = draw(1, 200) if seed % 2 else None
    got = Step(parts, shape, seed=seed).attend(NativeAttention(kernels, BLOCK), window=window)
    want = Step(parts, shape, seed=seed).attend(reference(), window=window)
    assert kernels.answers == [True]
    torch.testing.assert_close(torch.cat(got), torch.cat(want), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("shape", "softcap", "dtype"),
    [
        (Shape(4, 2, 24, 16), None, torch.float32),  # not a multiple of 16
        (Shape(4, 2, 16, 12), None, torch.float32),
        (Shape(2, 2, 272, 16), None, torch.float32),  # wider than 256
        (Shape(17, 1), None, torch.float32),  # more than 16 query heads to a key
        (Shape(), 5.0, torch.float32),
        (Shape(), None, torch.float16),
    ],
    ids=str,
)
def test_other_shapes_are_left_to_the_reference(
    shape: Shape, softcap: float | None, dtype: torch.dtype, kernels: Any
) -> None:
    step, again = Step(MIXED, shape, dtype=dtype), Step(MIXED, shape, dtype=dtype)
    got = step.attend(NativeAttention(kernels, BLOCK), softcap=softcap)
    want = again.attend(reference(), softcap=softcap)
    assert True not in kernels.answers
    assert torch.equal(torch.cat(got), torch.cat(want))
    step.assert_stored()


def test_rows_that_are_views_into_one_product_are_read_where_they_are(kernels: Any) -> None:
    shape = Shape(4, 2, 16, 16)
    step = Step([(0, 6)], shape)
    (keys, values), queries = step.contexts[0], step.queries[0]
    whole = torch.cat((queries, keys, values), dim=1)  # as the fused projection gives them
    q, k, v = whole.split([4, 2, 2], dim=1)
    assert not q.is_contiguous()
    backend = NativeAttention(kernels, BLOCK)
    got = backend.attend(q, k, v, step.cache, backend.plan(step.spans), scale=shape.scale)
    torch.testing.assert_close(got.double(), step.expected()[0], rtol=0, atol=2e-6)
    step.assert_stored()


@DTYPES
@WINDOWS
def test_a_token_has_the_same_bits_alone_and_in_a_crowd(
    window: int | None, dtype: torch.dtype, kernels: Any
) -> None:
    crowd = Step(MIXED, Shape(9, 3, 64, 64), dtype=dtype)
    backend = NativeAttention(kernels, BLOCK)
    got = crowd.attend(backend, window=window)
    untouched = Step(MIXED, crowd.shape, dtype=dtype).cache
    for index, want in enumerate(got):
        alone = part(crowd, index, crowd.spans[index].start, crowd.spans[index].length)
        alone.cache = LayerCache(untouched.keys.clone(), untouched.values.clone())
        assert torch.equal(alone.attend(backend, window=window)[0], want)


@DTYPES
@WINDOWS
@pytest.mark.parametrize("cuts", [(1, 1, 1), (64, 64, 22), (3, 100, 47), (149, 1), (1, 149)])
def test_a_token_has_the_same_bits_however_its_prompt_is_cut(
    cuts: tuple[int, ...], window: int | None, dtype: torch.dtype, kernels: Any
) -> None:
    whole = Step([(0, sum(cuts))], Shape(9, 3, 64, 64), dtype=dtype)
    backend = NativeAttention(kernels, BLOCK)
    (want,) = whole.attend(backend, window=window)
    again = Step([(0, sum(cuts))], whole.shape, dtype=dtype)
    parts: list[Tensor] = []
    start = 0
    for cut in cuts:
        parts += part(again, 0, start, cut).attend(backend, window=window)
        start += cut
    assert torch.equal(torch.cat(parts), want)


def test_a_token_has_the_same_bits_with_any_number_of_threads(kernels: Any) -> None:
    threads = torch.get_num_threads()
    backend = NativeAttention(kernels, BLOCK)
    want = torch.cat(Step(MIXED, Shape()).attend(backend))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(torch.cat(Step(MIXED, Shape()).attend(backend)), want)
    finally:
        torch.set_num_threads(threads)


def test_the_kernel_is_chosen_where_it_was_compiled() -> None:
    assert isinstance(choose_attention(BLOCK, "cpu"), NativeAttention)
    assert isinstance(choose_attention(BLOCK, "cuda"), TorchPagedAttention)


def part(whole: Step, index: int, start: int, length: int) -> Step:
    """One sequence of a step, over the same cache: its tokens [start, start + length).

    What comes before them must be stored, and the step must begin with the sequence's first.
    """
    first = whole.spans[index].start
    step = Step([(start, length)], whole.shape)
    step.cache = whole.cache
    step.spans = [Span(start, length, whole.spans[index].blocks)]
    keys, values = whole.contexts[index]
    step.contexts = [(keys[: start + length], values[: start + length])]
    step.queries = [whole.queries[index][start - first : start - first + length]]
    return step
