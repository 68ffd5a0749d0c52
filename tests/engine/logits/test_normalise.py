"""Logprobs instead of logits."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from engine.logits.normalise import Normalise
from engine.logits.penalties import Penalties
from engine.numerics import NEG_INF
from tests.support.logits import ROW_A, Spec, apply, bits, hard_rows, one_row, process, random_rows

WANTED = {"use_beam_search": True, "sampler_order": "hf"}


@pytest.mark.parametrize(
    ("row", "want"),
    [
        (torch.tensor([1000.0, 1001.0, 1002.0]), [-2.407606, -1.407606, -0.407606]),
        (ROW_A, [-0.451914, -1.451914, -2.451914, -3.451914, -4.451914]),
    ],
)
def test_worked_numbers(row: torch.Tensor, want: list[float]) -> None:
    assert one_row(Normalise, row, **WANTED).tolist() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("vocab_size", [5, 257, 1000])
def test_rows_of_a_batch_become_logprobs_and_others_stay(vocab_size: int) -> None:
    logits = random_rows(40, vocab_size)
    specs = [Spec(WANTED if row % 3 else {}) for row in range(40)]
    got = apply(Normalise, specs, logits)
    for row, before in enumerate(logits):
        if row % 3:
            want = before.double().log_softmax(0).float()
            torch.testing.assert_close(got[row], want, rtol=1e-6, atol=2e-6)
        else:
            assert torch.equal(bits(got[row]), bits(before))


@pytest.mark.parametrize(
    "params", [{}, {"use_beam_search": True}, {"sampler_order": "hf"}], ids=str
)
def test_nothing_but_beam_search_in_the_order_of_transformers_wants_it(
    params: dict[str, object],
) -> None:
    assert torch.equal(bits(one_row(Normalise, ROW_A, **params)), bits(ROW_A))


def test_what_was_impossible_stays_so_and_the_order_is_kept() -> None:
    logits = hard_rows(700).clamp(max=1e30)
    got = apply(Normalise, [Spec(WANTED)] * len(logits), logits)
    assert torch.equal(got == NEG_INF, logits == NEG_INF)
    assert not got.isnan().any()
    assert (got <= 0.0).all()
    for before, after in zip(logits, got, strict=True):
        assert after[before.argmax()] == after.amax()


def test_a_repetition_penalty_acts_on_logprobs_as_in_transformers() -> None:
    row = torch.tensor([2.0, 1.0, 0.0])
    spec = Spec(WANTED | {"repetition_penalty": 1.5}, prompt=[0])
    (got,) = process([Normalise, Penalties], [spec], row[None])
    oracle = RepetitionPenaltyLogitsProcessor(1.5)
    (want,) = oracle(torch.tensor([[0]]), row.log_softmax(0)[None])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert float(got.softmax(0)[0]) == pytest.approx(0.6184, abs=1e-4)
    # On logits themselves it would be another number.
    (plain,) = process([Penalties], [spec], row[None])
    assert float(plain.softmax(0)[0]) == pytest.approx(0.5050, abs=1e-4)
