"""DoLa: contrasting layers."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.logits.dola import Dola, _distances
from engine.numerics import NEG_INF
from engine.prepare import early_layers
from engine.types import Beside
from tests.support.logits import (
    Spec,
    apply_beside,
    bits,
    hard_rows,
    kept,
    random_rows,
    softmax,
)

FINAL = [0.7, 0.2, 0.1]
EARLY = [[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"dola_mode": "hf"},
    {"dola_relative_top": 0.01},
    {"dola_relative_top": 0.5, "dola_mode": "hf"},
    {"dola_relative_top": 1.0},
]


def beside(early: Tensor, of: Sequence[int], counts: Sequence[int]) -> Beside:
    return Beside(early=early, early_of=torch.tensor(of), early_count=torch.tensor(counts))


def asking(**params: Any) -> Spec:
    return Spec({"dola_layers": "low"} | params)


def contrasted(row: Tensor, early: Tensor, **params: Any) -> Tensor:
    """A row [V] and its earlier layers' [M, V]."""
    return apply_beside(
        Dola, [asking(**params)], row[None], beside(early[None], [0], [len(early)])
    )[0]


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0.0)


def naive(
    row: Tensor, early: Tensor, *, dola_relative_top: float = 0.1, dola_mode: str = "paper"
) -> tuple[int, list[float]]:
    """The layer and the scores by the formula, in float64."""
    p = softmax(row)
    others = [softmax(one) for one in early]
    distances = []
    for q in others:
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        paper = (kl(p, m) + kl(q, m)) / 2
        theirs = (kl(m, p) + kl(m, q)) / 2 / len(p)
        distances.append(paper if dola_mode == "paper" else theirs)
    layer, least = distances.index(max(distances)), dola_relative_top * max(p)
    return layer, [
        math.log(a) - math.log(b) if a >= least else NEG_INF
        for a, b in zip(p, others[layer], strict=True)
    ]


# -- worked numbers


@pytest.mark.parametrize(
    ("as_transformers", "want"), [(False, [0.006959, 0.253102]), (True, [0.002344, 0.110224])]
)
def test_worked_distances(as_transformers: bool, want: list[float]) -> None:
    final, early = torch.tensor([FINAL]).log(), torch.tensor([EARLY]).log()
    got = _distances(final, early[0], torch.tensor([[0, 1]]), torch.tensor([[as_transformers]]))
    assert got[0].tolist() == pytest.approx(want, abs=2e-6)


@pytest.mark.parametrize("mode", ["paper", "hf"])
def test_worked_scores(mode: str) -> None:
    got = contrasted(torch.tensor(FINAL).log(), torch.tensor(EARLY).log(), dola_mode=mode)
    assert got.tolist() == pytest.approx([1.945910, 0.0, -1.945910], abs=1e-5)
    assert got.softmax(0).tolist() == pytest.approx([0.859649, 0.122807, 0.017544], abs=1e-5)


# -- against the formula


@pytest.mark.parametrize("vocab_size", [5, 257, 600])
def test_each_row_is_the_formula_at_its_own_settings_and_layers(vocab_size: int) -> None:
    count, most = 60, 3
    logits = random_rows(count, vocab_size)
    early = random_rows(count * most, vocab_size, seed=1).unflatten(0, (count, most)).flip(0)
    settings = [SETTINGS[row % len(SETTINGS)] for row in range(count)]
    neutral = set(range(3, count, 7))
    specs = [Spec() if row in neutral else asking(**one) for row, one in enumerate(settings)]
    of = [-1 if row in neutral else count - 1 - row for row in range(count)]
    counts = [1 + place % most for place in range(count)]

    got = apply_beside(Dola, specs, logits, beside(early, of, counts))

    layers, modes_differ = set(), 0
    for row in range(count):
        if row in neutral:
            assert torch.equal(bits(got[row]), bits(logits[row]))
            continue
        own = early[of[row], : counts[of[row]]]
        layer, want = naive(logits[row], own, **settings[row])
        layers.add(layer)
        others = [naive(logits[row], own, dola_mode=mode)[0] for mode in ("paper", "hf")]
        modes_differ += len(set(others)) - 1
        assert kept(got[row]) == {token for token, one in enumerate(want) if one > NEG_INF}
        torch.testing.assert_close(got[row], torch.tensor(want), rtol=1e-5, atol=1e-4)
    assert layers == {0, 1, 2}
    assert modes_differ > 0


def test_both_ways_of_measuring_in_one_batch_may_choose_different_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 3 * torch.randn(400, 3, 20, generator=generator)
    differing = [
        row
        for row in rows
        if naive(row[0], row[1:])[0] != naive(row[0], row[1:], dola_mode="hf")[0]
    ]
    assert len(differing) > 5
    row = differing[0]
    specs = [asking(), asking(dola_mode="hf"), asking()]
    got = apply_beside(
        Dola, specs, row[None, 0].repeat(3, 1), beside(row[None, 1:], [0, 0, 0], [2])
    )
    for one, mode in zip(got, ("paper", "hf", "paper"), strict=True):
        want = naive(row[0], row[1:], dola_mode=mode)[1]
        assert one.tolist() == pytest.approx(want, rel=1e-5, abs=1e-4)


# -- edges


def test_a_margin_of_one_keeps_the_likeliest_and_its_equals() -> None:
    row, early = torch.tensor([1.0, 3.0, 2.99999, 3.0]), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    got = contrasted(row, early, dola_relative_top=1.0)
    assert kept(got) == {1, 3}
    assert got[3] > got[1]


def test_a_layer_that_says_the_same_leaves_nothing_to_choose_by() -> None:
    row = torch.tensor([1.0, 0.9, 0.8])
    assert contrasted(row, row[None]).tolist() == [0.0, 0.0, 0.0]


def test_what_is_impossible_at_last_stays_so_and_what_was_before_is_far_above() -> None:
    row = torch.tensor([1.0, NEG_INF, NEG_INF, 0.5])
    early = torch.tensor([[1.0, NEG_INF, 3.0, NEG_INF]])
    for mode in ("paper", "hf"):
        got = contrasted(row, early, dola_mode=mode)
        assert kept(got) == {0, 3}
        assert got[3] > got[0]
        assert got[3] < float("inf")


@pytest.mark.parametrize("params", [*SETTINGS, {"dola_relative_top": 1e-300}], ids=str)
def test_hard_rows_keep_their_best_token(params: dict[str, Any]) -> None:
    logits = hard_rows(700).clamp(max=1e37)
    early = torch.stack((logits.roll(1, 0), logits.roll(2, 0)), 1)
    count = len(logits)
    got = apply_beside(
        Dola, [asking(**params)] * count, logits, beside(early, range(count), [2] * count)
    )
    assert not got.isnan().any()
    assert got.amax() < float("inf")
    for before, after in zip(logits, got, strict=True):
        assert after[before.argmax()] > NEG_INF
        assert not kept(after) - kept(before)


# -- which layers


@pytest.mark.parametrize(
    ("chosen", "num_layers", "tied", "want"),
    [
        ("low", 30, False, [*range(0, 15, 2)]),
        ("high", 30, False, [*range(15, 30, 2)]),
        ("low", 30, True, [*range(2, 15, 2)]),
        ("high", 30, True, [*range(15, 30, 2)]),
        ("low", 40, False, [*range(0, 20, 2)]),
        ("high", 40, False, [*range(20, 40, 2)]),
        ("low", 48, False, [*range(0, 20, 2)]),
        ("high", 48, False, [*range(28, 48, 2)]),
        ("low", 80, True, [*range(2, 20, 2)]),
        ("high", 81, True, [*range(61, 81, 2)]),
        # Few layers: never none, and of tied ones the embedding only if there is nothing else.
        ("low", 4, True, [2]),
        ("low", 3, True, [2]),
        ("low", 2, True, [1]),
        ("low", 1, True, [0]),
        ("low", 2, False, [0]),
        ("low", 1, False, [0]),
        ("high", 2, True, [1]),
        ("high", 1, True, [0]),
        ([0, 3, 1], 4, True, [0, 3, 1]),
    ],
)
def test_the_layers_are_those_of_transformers(
    chosen: str | list[int], num_layers: int, tied: bool, want: list[int]
) -> None:
    assert list(early_layers(chosen, num_layers, tied)) == want
