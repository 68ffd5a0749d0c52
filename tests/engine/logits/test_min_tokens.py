"""No end before enough tokens are out."""

import pytest
import torch
from transformers import MinNewTokensLengthLogitsProcessor

from engine.logits.min_tokens import MinTokens
from tests.support.logits import END, Spec, apply, kept, random_rows


def test_each_row_matches_transformers_at_its_own_value_and_length() -> None:
    logits = random_rows(240, 600)
    specs = [
        Spec(
            {"min_tokens": row % 5, "stop_token_ids": [7, 300][: row % 3]},
            prompt=[1] * (1 + row % 4),
            output=[3] * (row % 7),
        )
        for row in range(240)
    ]

    got = apply(MinTokens, specs, logits)

    for row, spec in enumerate(specs):
        params = spec.request.params
        oracle = MinNewTokensLengthLogitsProcessor(
            len(spec.prompt), params.min_tokens, [END, *params.stop_token_ids]
        )
        assert torch.equal(got[row], oracle(torch.tensor([spec.tokens]), logits[row, None])[0])


@pytest.mark.parametrize(("num_generated", "possible"), [(0, False), (2, False), (3, True)])
def test_the_end_is_possible_from_the_token_after_the_last_required_one(
    num_generated: int, possible: bool
) -> None:
    spec = Spec({"min_tokens": 3, "ignore_eos": True}, prompt=(1, 1), output=[3] * num_generated)
    assert (END in kept(apply(MinTokens, [spec], torch.zeros(1, 5))[0])) == possible
