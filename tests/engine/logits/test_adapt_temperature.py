"""AdapT sampling: hot where an indented line of code begins."""

import random
import re
from typing import Any

import pytest
import torch

from engine.logits.adapt_temperature import AdaptTemperature
from engine.tokenizer import Tokenizer
from tests.support.engines import request, run, scripted_core
from tests.support.logits import (
    ROW_A,
    TEXTS,
    Spec,
    apply,
    bits,
    lanes_for,
    place,
    random_rows,
    rows_of,
    run_stage,
)
from tests.support.scripted import ScriptedModel, constant

PAIR = {"adapt_temperature": [0.8, 0.6]}


def temperature(tokens: list[str], prompt_len: int | None = None) -> float:
    """What a row is divided by after these tokens."""
    ids = [TEXTS.index(token) for token in tokens]
    prompt_len = len(ids) if prompt_len is None else prompt_len
    (got,) = apply(AdaptTemperature, [Spec(PAIR, ids[:prompt_len], ids[prompt_len:])], ROW_A[None])
    return float(ROW_A[0] / got[0])


@pytest.mark.parametrize(
    ("tokens", "want"),
    [
        (["a", "b", "\n"], 0.6),
        (["a", "b", "\n", "  "], 0.8),
        (["a", "b", "\n", "  ", "c"], 0.6),
        (["a", "\n "], 0.8),  # break and indentation are one token
        (["a", "\n ", "  "], 0.8),
        (["a", "\n", "  ", "  "], 0.8),
        (["\n", "  "], 0.8),
        (["a", "\n", "\n", "  "], 0.8),
        (["a", "\n", "  ", "\n"], 0.6),
        (["a", "\n ", "\n"], 0.6),
        (["a", "\n", "  ", "b", "  "], 0.6),  # spaces inside a line
        (["a", "  "], 0.6),
        (["  "], 0.6),  # of the first line
        (["  ", "  "], 0.6),
        (["\n"], 0.6),
        (["a"], 0.6),
    ],
)
def test_worked_examples(tokens: list[str], want: float) -> None:
    for prompt_len in {1, len(tokens) // 2, len(tokens)} - {0}:
        assert temperature(tokens, prompt_len) == pytest.approx(want, rel=1e-6)


def test_each_row_matches_the_rule_on_its_own_text() -> None:
    rng = random.Random(0)
    logits = random_rows(400, 600)
    specs = []
    for row in range(400):
        kinds = rng.choice([(3, 4, 5), (3, 4, 5, 6, 7), (3, 4), range(3, 10)])
        pair = [rng.choice([0.2, 1.0, 1.7]), rng.choice([0.5, 1.0, 2.0])]
        tokens = rng.choices(list(kinds), k=rng.randint(1, 12))
        split = rng.randint(1, len(tokens))
        params = {} if row == 17 else {"adapt_temperature": pair}
        specs.append(Spec(params, tokens[:split], tokens[split:]))

    got = apply(AdaptTemperature, specs, logits)

    num_hot = 0
    for row, spec in enumerate(specs):
        text = "".join(TEXTS[token_id] for token_id in spec.tokens)
        hot = re.search(r"\n[ \t]+\Z", text) is not None
        its = spec.request.params.adapt_temperature or (1.0, 1.0)
        torch.testing.assert_close(got[row], logits[row] / (its[0] if hot else its[1]))
        num_hot += hot
    assert 60 < num_hot < 340
    assert torch.equal(bits(got[17]), bits(logits[17]))


def test_what_an_earlier_owner_left_behind_does_not_count() -> None:
    specs = [Spec(PAIR, [6]), Spec(PAIR, [3, 4])]
    lanes, lane_ids = lanes_for(specs, 10)
    stage = AdaptTemperature(lanes)
    lanes.tokens[:] = TEXTS.index("\n ")
    for lane, spec in zip(lane_ids, specs, strict=True):
        place(lanes, lane, spec, stage)
    got = run_stage(stage, ROW_A.repeat(2, 1), rows_of(specs, lane_ids))
    assert (ROW_A[0] / got[:, 0]).tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


def test_in_the_engine_the_texts_are_those_of_its_tokenizer(tokenizer: Tokenizer) -> None:
    """Hot is practically greedy here: after an indentation comes always the same token."""
    (newline,), (space,), (best,) = (
        tokenizer.encode(text, add_special_tokens=False) for text in ("\n", " ", "a")
    )
    row = torch.zeros(128)
    row[best] = 1.0

    core = scripted_core(ScriptedModel(constant(row.tolist())), tokenizer)
    options: dict[str, Any] = {
        "temperature": 1.0,
        "adapt_temperature": [2e-5, 2.0],
        "allowed_token_ids": [newline, space, best],
        "max_tokens": 200,
        "seed": 1,
        "ignore_eos": True,
    }
    text = run(core, request(core, [best], **options)).text()
    assert len(re.findall(r"\n +a", text)) > 5
    assert not re.search(r"\n  ", text)
    assert not re.search(r"\n \n", text)
    assert "  " in text  # elsewhere anything may follow
    assert " \n" in text
