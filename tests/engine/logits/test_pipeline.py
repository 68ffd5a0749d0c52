"""The stages together: their order, what greedy rows skip, which bans are lifted."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from engine.logits import STAGES
from engine.logits.pipeline import Pipeline
from engine.logits.stage import Filter, Transform
from engine.numerics import NEG_INF
from tests.support.logits import (
    DIST_P,
    END,
    ROW_A,
    Spec,
    bits,
    examples,
    histories,
    kept,
    lanes_for,
    new_lanes,
    place,
    process,
    random_rows,
    rows_of,
    run_pipeline,
    with_signals,
)

FILTERS = {
    "temperature": 0.0,
    "top_n_sigma": 0.1,
    "min_p": 1.0,
    "top_k": 2,
    "typical_p": 0.1,
    "top_p": 0.1,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
}


def processed(logits: Tensor, **params: Any) -> Tensor:
    return process(STAGES, [Spec(params, prompt=(len(logits) - 1,))], logits[None])[0]


@pytest.mark.parametrize(
    ("params", "survivors"),
    [
        ({"temperature": 2.0, "min_p": 0.3}, {0, 1, 2, 3, 4}),  # temperature comes before filters
        ({"min_p": 0.3, "top_p": 0.8}, {0, 1}),  # min-p comes before top-p
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # top-p is of what top-k left
        ({"top_p": 0.8}, {0, 1, 2}),
    ],
)
def test_filters_see_what_those_before_them_left(
    params: dict[str, Any], survivors: set[int]
) -> None:
    assert kept(processed(DIST_P, **params)) == survivors


def test_what_is_left_is_renormalised() -> None:
    for params, want in (
        ({"top_k": 3}, [0.470588, 0.352941, 0.176471, 0.0, 0.0]),
        ({"top_k": 3, "top_p": 0.8}, [0.571429, 0.428571, 0.0, 0.0, 0.0]),
    ):
        got = processed(DIST_P, **params).softmax(0)
        torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-6)


def test_biases_come_before_penalties_and_these_before_temperature() -> None:
    spec = Spec(
        {
            "logit_bias": {0: -2.0, 1: 1.0},
            "repetition_penalty": 2.0,
            "frequency_penalty": 0.5,
            "temperature": 0.5,
        },
        prompt=(0,),
        output=(1, 1),
    )
    got = process(STAGES, [spec], torch.ones(1, 3))[0]
    # Token 0: (1 - 2) * 2 / 0.5. Token 1: ((1 + 1) / 2 - 2 * 0.5) / 0.5.
    assert got.tolist() == [-4.0, 0.0, 2.0]


def test_no_bias_undoes_a_ban() -> None:
    spec = Spec(
        {
            "logit_bias": dict.fromkeys(range(8), 100.0),
            "allowed_token_ids": [END, 3, 4, 5],
            "bad_words": ["3"],
            "min_tokens": 5,
            "no_repeat_ngram_size": 1,
            "frequency_penalty": -2.0,
        },
        output=(4,),
    )
    assert kept(process(STAGES, [spec], torch.zeros(1, 8))[0]) == {5}


def test_greedy_rows_skip_temperature_and_filters_and_keep_the_rest() -> None:
    others = {"logit_bias": {3: 2.0}, "repetition_penalty": 1.5, "bad_words": ["7"]}
    logits = random_rows(20, 600)
    want = process(STAGES, [Spec(others | {"temperature": 0.0})] * 20, logits)
    specs = [Spec(others | FILTERS), Spec(FILTERS | {"temperature": 0.7})] * 10

    got = process(STAGES, specs, logits)

    assert torch.equal(bits(got[::2]), bits(want[::2]))
    assert not torch.equal(want[0], logits[0])
    assert all(len(kept(row)) <= 2 for row in got[1::2])


@pytest.mark.parametrize(
    ("allowed", "output", "survivors"),
    [
        ([END, 3, 4, 5], [4], {5}),  # each bans a token, and one is left
        ([END, 3, 4], [4], {4}),  # without no_repeat_ngram
        ([END, 3, 4], [3, 4], {4}),
        ([END, 3], [4], {3}),  # without bad_words too
        ([END, 3], [3], {3}),
        ([END], [4], {END}),  # without min_tokens too
        ([END], [END], {END}),
        ([7], [4], set()),  # which the model itself rules out
    ],
)
def test_soft_bans_are_lifted_in_turn_where_nothing_would_be_left(
    allowed: list[int], output: list[int], survivors: set[int]
) -> None:
    bans = {"min_tokens": 9, "bad_words": ["3"], "no_repeat_ngram_size": 1}
    logits = torch.zeros(3, 8)
    logits[:, 7] = NEG_INF
    stuck = Spec(bans | {"allowed_token_ids": allowed}, (1,), output)
    free = Spec(bans, (1,), output)

    got = process(STAGES, [free, stuck, Spec()], logits)

    assert kept(got[1]) == survivors
    assert kept(got[0]) == {0, 4, 5, 6} - set(output)
    assert torch.equal(bits(got[2]), bits(logits[2]))


def test_where_a_ban_is_lifted_all_else_is_done_once() -> None:
    rest = {"allowed_token_ids": [3], "repetition_penalty": 1.5, "frequency_penalty": 0.5}
    rest |= {"dry_multiplier": 0.8, "dry_allowed_length": 1}
    specs = [Spec(params, (3, 4, 3), [3, 4, 3]) for params in (rest, rest | {"bad_words": ["3"]})]
    logits = random_rows(1, 600).expand(2, -1).clone()
    want, got = process(STAGES, specs, logits)
    assert kept(want) == {3}
    assert not torch.equal(want[3], logits[0, 3])
    assert torch.equal(bits(got), bits(want))


def test_bans_are_only_lifted_where_the_request_has_them() -> None:
    stuck = Spec({"allowed_token_ids": [3], "no_repeat_ngram_size": 1}, (3,))
    banned = Spec({"bad_words": ["3"]})
    got = process(STAGES, [stuck, banned], torch.zeros(2, 5))
    assert [kept(row) for row in got] == [{3}, {0, 1, 2, 4}]


def oracle(params: dict[str, Any]) -> LogitsProcessorList:
    """What transformers has of the stages, in our order."""
    makers = {
        "logit_bias": lambda bias: SequenceBiasLogitsProcessor({(k,): v for k, v in bias.items()}),
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "min_p": MinPLogitsWarper,
        "top_k": TopKLogitsWarper,
        "typical_p": TypicalLogitsWarper,
        "top_p": TopPLogitsWarper,
        "epsilon_cutoff": EpsilonLogitsWarper,
        "eta_cutoff": EtaLogitsWarper,
    }
    return LogitsProcessorList(
        make(params[name]) for name, make in makers.items() if name in params
    )


def test_whole_rows_match_transformers_with_parameters_of_their_own() -> None:
    choices: dict[str, list[Any]] = {
        "logit_bias": [{3: 2.0, 8: -5.0}, {400: 3.0}],
        "repetition_penalty": [0.8, 1.3],
        "no_repeat_ngram_size": [1, 2],
        "temperature": [0.5, 0.8, 1.5],
        "min_p": [0.003, 0.02],
        "top_k": [20, 300],
        "typical_p": [0.9, 0.98],
        "top_p": [0.7, 0.95],
        "epsilon_cutoff": [1e-3, 0.01],
        "eta_cutoff": [2e-3, 0.01],
    }
    generator = torch.Generator().manual_seed(0)
    logits = random_rows(240, 600)
    params = []
    for _ in logits:
        picks = torch.randint(0, 6, (len(choices),), generator=generator).tolist()
        params.append(
            {
                name: values[pick % len(values)]
                for (name, values), pick in zip(choices.items(), picks, strict=True)
                if pick < 3
            }
        )
    specs = [Spec(one, *history) for one, history in zip(params, histories(240), strict=True)]

    got = process(STAGES, specs, logits)

    num_compared = 0
    for row, (one, spec) in enumerate(zip(params, specs, strict=True)):
        ids = torch.tensor([spec.tokens])
        want = oracle(one)(ids, logits[row, None].clone())[0]
        exact = oracle(one)(ids, logits[row, None].double())[0]
        if kept(want) == kept(exact):  # else it hangs on rounding
            torch.testing.assert_close(got[row], want, rtol=1e-6, atol=1e-6)
            num_compared += 1
    assert num_compared > 220


def test_a_batch_that_wants_nothing_is_handed_back() -> None:
    lanes, lane_ids = lanes_for([Spec()] * 3, 600)
    pipeline = Pipeline(STAGES, lanes)
    for lane in lane_ids:
        place(lanes, lane, Spec(), pipeline)
    logits = random_rows(3, 600)
    before = logits.clone()
    rows = rows_of([Spec()] * 3, lane_ids)
    assert pipeline.transform(logits, rows) is logits
    (part,) = pipeline.filter(logits, rows)
    assert part.subset is None
    assert part.candidates.raw is logits
    assert not part.candidates.ranked  # nobody looked for the best
    assert torch.equal(bits(logits), bits(before))


def test_a_lane_forgets_what_its_former_owner_wanted() -> None:
    lanes = new_lanes(2, 50)
    pipeline = Pipeline(STAGES, lanes)
    logits = random_rows(2, 700)
    fields = [name for stage in STAGES for name in stage.fields]
    for params in examples(fields, 20):
        place(lanes, 1, Spec(params, (3, 4), (3, 4, 5)), pipeline)
        place(lanes, 1, Spec(), pipeline)
        place(lanes, 0, Spec(params, (3, 4), (3, 4, 5)), pipeline)
        both = [Spec(params, (3, 4), (3, 4, 5)), Spec()]
        got = run_pipeline(pipeline, both, logits, [0, 1])
        assert torch.equal(bits(got[1]), bits(logits[1]))


def test_stages_of_sampled_rows_come_last() -> None:
    kinds = [issubclass(stage, Filter) for stage in STAGES]
    assert kinds == sorted(kinds)
    soft = [s.__name__ for s in STAGES if issubclass(s, Transform) and s.soft_ban]
    assert soft == ["MinTokens", "BadWords", "NoRepeatNgram"]


def test_transforms_in_place_come_out_the_same() -> None:
    logits = random_rows(120, 600)
    fields = [name for stage in STAGES for name in stage.fields]
    params = [one if i % 3 else {} for i, one in enumerate(examples(fields, len(logits)))]
    seqs = histories(len(logits), 50)
    specs = [Spec(one, *seq) for one, seq in zip(params, seqs, strict=True)]
    lanes, lane_ids = lanes_for(specs, 600)
    pipeline = Pipeline(STAGES, lanes)
    for lane, spec in zip(lane_ids, specs, strict=True):
        place(lanes, lane, spec, pipeline)
    rows = with_signals(rows_of(specs, lane_ids), logits)
    some = pipeline.transformed(rows)
    assert 10 < len(some) < len(logits)
    for chosen in (list(range(len(logits))), some, some[:1]):
        given, its = logits[chosen], rows.select(chosen, torch.tensor(chosen))
        before = given.clone()
        want = pipeline.transform(given, its)
        assert torch.equal(bits(given), bits(before))
        got = pipeline.transform(given, its, in_place=True)
        assert torch.equal(bits(got), bits(want))


def test_a_step_without_rows_is_possible() -> None:
    pipeline = Pipeline(STAGES, new_lanes(1, 1))
    assert pipeline.transform(torch.zeros(0, 600), rows_of([], [])).shape == (0, 600)


def test_row_a_is_untouched_by_defaults() -> None:
    assert torch.equal(bits(processed(ROW_A)), bits(ROW_A))
