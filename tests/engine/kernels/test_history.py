"""What looks at the tokens so far, for each instruction set alike, against its torch."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import native
from engine.logits.dry import Dry
from engine.logits.penalties import Penalties
from engine.logits.stage import Stage
from tests.support.kernels import libraries
from tests.support.logits import Spec, apply, bits, random_rows

VOCAB = 300
LIBRARIES = pytest.mark.parametrize("library", libraries(), ids=lambda one: f"isa {one.isa}")
PENALTIES: dict[str, list[Any]] = {
    "repetition_penalty": [1.0, 0.7, 1.3],
    "frequency_penalty": [0.0, 0.3, -1.1],
    "presence_penalty": [0.0, 0.7],
    "penalty_last_n": [-1, 5, 30],
    "penalty_prompt": [True, False],
}
DRY: dict[str, list[Any]] = {
    "dry_multiplier": [0.5, 0.8, 2.0],
    "dry_base": [1.0, 1.3, 1.75],
    "dry_allowed_length": [1, 1, 2, 5],
    "dry_penalty_last_n": [-1, -1, 5, 30],
    "dry_sequence_breakers": [[], ["a"], ["ca"]],
}


def both_ways(
    stage: type[Stage],
    choices: dict[str, list[Any]],
    library: native.Library,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows before a stage, and what the kernels and torch make of them."""
    rng = random.Random(5)
    specs = [
        Spec(
            {name: rng.choice(values) for name, values in choices.items()},
            prompt=rng.choices(range(3, 9 + row), k=rng.randint(1, 60)),
            output=rng.choices(range(3, 9), k=rng.randint(0, 60)),
        )
        for row in range(60)
    ]
    logits = random_rows(len(specs), VOCAB) * 3
    monkeypatch.setattr(native, "LIBRARY", library)
    got = apply(stage, specs, logits)
    monkeypatch.setattr(native, "LIBRARY", None)
    want = apply(stage, specs, logits)
    assert (want != logits).any(1).sum() > 25
    return logits, got, want


@LIBRARIES
def test_penalties_have_the_same_bits(
    library: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, got, want = both_ways(Penalties, PENALTIES, library, monkeypatch)
    assert torch.equal(got, want)


@LIBRARIES
def test_dry_lowers_the_same_tokens_by_as_much(
    library: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, got, want = both_ways(Dry, DRY, library, monkeypatch)
    assert torch.equal(bits(got) != bits(logits), bits(want) != bits(logits))
    # Powers are libm's in one and torch's own in the other.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
