"""Sampling parameters: who reads them, which values are neutral, how they are read."""

from typing import Any

import pytest
from pydantic import ValidationError

from engine.logits import STAGES
from engine.logits.pipeline import Pipeline
from engine.params import EXCLUDES, INT64, TRUNCATION, SamplingParams, combinable
from tests.support.logits import STRATEGIES, Spec, asking, new_lanes

STOPPING = ("max_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos")
SAMPLER = ("seed",)


def test_every_field_is_claimed_exactly_once() -> None:
    stages = [name for stage in STAGES for name in stage.fields]
    assert sorted([*stages, *STOPPING, *STRATEGIES, *SAMPLER]) == sorted(
        SamplingParams.model_fields
    )


@pytest.mark.parametrize(
    "params",
    [
        {},
        {name: field.default for name, field in SamplingParams.model_fields.items()},
        {"top_k": -1, "top_n_sigma": 0.0},
        {"top_p_rule": "inclusive", "penalty_prompt": False, "penalty_last_n": 5},
        {"penalty_last_n": 0, "repetition_penalty": 2.0, "frequency_penalty": 1.0},
        {"temperature": 0.0, "top_k": 1, "top_p": 0.5, "min_p": 0.5, "typical_p": 0.5},
    ],
)
def test_neutral_values_are_wanted_by_no_stage(params: dict[str, Any]) -> None:
    pipeline = Pipeline(STAGES, new_lanes(1, 8))
    pipeline.admit(0, Spec(params).request)
    assert not any(pipeline.wanted)


def test_defaults_sample_one_sequence_and_stop_nowhere() -> None:
    params = SamplingParams()
    assert not params.greedy
    assert params.num_sequences == 1
    claimed = {name: getattr(params, name) for name in (*STOPPING, "n", "best_of", *SAMPLER)}
    assert claimed == {
        "max_tokens": None,
        "stop": [],
        "stop_token_ids": [],
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "n": 1,
        "best_of": None,
        "seed": None,
    }


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9.9e-6, True), (1e-5, False)])
def test_a_temperature_of_practically_zero_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy == greedy


@pytest.mark.parametrize(
    ("field", "given", "read"),
    [
        ("max_tokens", 16.0, 16),
        ("max_tokens", None, None),
        ("temperature", None, 1.0),
        ("temperature", 2, 2.0),
        ("top_k", None, 0),
        ("seed", -INT64, -INT64),
        ("seed", INT64 - 1, INT64 - 1),
        ("n", 128, 128),
        ("stop", "x", ["x"]),
        ("stop", ["x", "y"], ["x", "y"]),
        ("logit_bias", {"5": 3, 7: -250.0, "9": 1e300}, {5: 3.0, 7: -100.0, 9: 100.0}),
        ("top_p", 0.0, 0.0),
        ("min_p", 1.0, 1.0),
        ("frequency_penalty", -2.0, -2.0),
        ("presence_penalty", 2.0, 2.0),
        ("penalty_last_n", -1, -1),
        ("dry_base", 1, 1.0),
        ("dry_penalty_last_n", -1.0, -1),
        ("exponential_decay_length_penalty", [20.0, 2], (20, 2.0)),
        ("exponential_decay_length_penalty", (20, 2.0), (20, 2.0)),  # as it was read before
        ("adapt_temperature", [2, 0.6], (2.0, 0.6)),
        ("adapt_temperature", None, None),
        ("top_h", 1, 1.0),
        ("top_h", None, None),
        ("mirostat", 2.0, 2),
        ("tfs", 0, 0.0),
    ],
)
def test_values_inside_the_bounds_are_read(field: str, given: object, read: object) -> None:
    got = getattr(SamplingParams.model_validate({field: given}), field)
    assert (got, type(got)) == (read, type(read))


NOT_NUMBERS = [float("nan"), float("inf"), "1", True, [1]]
NOT_INTEGERS = [*NOT_NUMBERS, 1.5, 2**63]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [-1, *NOT_INTEGERS]),
        ("min_tokens", [-1, *NOT_INTEGERS]),
        ("stop", ["", [""], ["x"] * 65, 5, [5]]),
        ("stop_token_ids", ["2", 2, [1.5], ["2"]]),
        ("include_stop_str_in_output", [1, "true"]),
        ("ignore_eos", [0, "false"]),
        ("n", [0, 129, *NOT_INTEGERS]),
        ("best_of", [0, 129, *NOT_INTEGERS]),
        ("seed", [INT64, -INT64 - 1, *NOT_INTEGERS]),
        ("logit_bias", [[], {"x": 1.0}, {"1.5": 1.0}, {"1": "1"}, {"1": float("nan")}]),
        ("repetition_penalty", [0.0, -1.0, *NOT_NUMBERS]),
        ("frequency_penalty", [-2.01, 2.01, *NOT_NUMBERS]),
        ("presence_penalty", [-2.01, 2.01, *NOT_NUMBERS]),
        ("penalty_last_n", [-2, *NOT_INTEGERS]),
        ("penalty_prompt", [1, "true"]),
        ("allowed_token_ids", [[], 5, [1.5], ["5"]]),
        ("bad_words", ["x", [""], [5], ["x"] * 1025]),
        ("no_repeat_ngram_size", [-1, *NOT_INTEGERS]),
        ("temperature", [-0.01, 2.01, *NOT_NUMBERS]),
        ("top_n_sigma", NOT_NUMBERS),
        ("min_p", [-0.01, 1.01, *NOT_NUMBERS]),
        ("top_k", [-2, *NOT_INTEGERS]),
        ("typical_p", [0.0, 1.01, *NOT_NUMBERS]),
        ("top_p", [-0.01, 1.01, *NOT_NUMBERS]),
        ("top_p_rule", ["", "Strict", 1]),
        ("epsilon_cutoff", [-0.01, 1.0, *NOT_NUMBERS]),
        ("eta_cutoff", [-0.01, 1.0, *NOT_NUMBERS]),
        ("dry_multiplier", [-0.01, *NOT_NUMBERS]),
        ("dry_base", [0.99, *NOT_NUMBERS]),
        ("dry_allowed_length", [0, *NOT_INTEGERS]),
        ("dry_penalty_last_n", [-2, *NOT_INTEGERS]),
        ("dry_sequence_breakers", ["x", [""], ["x" * 41], [5], ["x"] * 257]),
        ("eos_length_penalty", [-0.01, *NOT_NUMBERS]),
        ("eos_length_window", [0, *NOT_INTEGERS]),
        (
            "exponential_decay_length_penalty",
            [5, [1], [1, 2, 3], (1,), {}, "12", [1.5, 2.0], [INT64, 2.0], [1, float("nan")]],
        ),
        ("dynatemp_range", [-0.01, *NOT_NUMBERS]),
        ("dynatemp_exponent", [0.0, *NOT_NUMBERS]),
        ("edt_theta", [0.0, *NOT_NUMBERS]),
        ("edt_base", [0.0, 1.0, *NOT_NUMBERS]),
        ("adapt_temperature", [0.5, [1], [0, 1], [1, 2.01], ["1", 1], {}, "12"]),
        ("sampler_order", ["", "HF", "llamacpp", 1]),
        ("tfs", [-0.01, 1.01, *NOT_NUMBERS]),
        ("top_a", [-0.01, 1.01, *NOT_NUMBERS]),
        ("top_h", [0.0, 1.01, *NOT_NUMBERS]),
        ("mirostat", [-1, 3, *NOT_INTEGERS]),
        ("mirostat_tau", [0.0, *NOT_NUMBERS]),
        ("mirostat_eta", [0.0, *NOT_NUMBERS]),
        ("xtc_probability", [-0.01, 1.01, *NOT_NUMBERS]),
        ("xtc_threshold", [-0.01, 1.01, *NOT_NUMBERS]),
    ],
)
def test_other_values_are_refused_in_the_name_of_the_field(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValidationError) as caught:
            SamplingParams.model_validate({field: value})
        assert {error["loc"][0] for error in caught.value.errors()} == {field}, value


@pytest.mark.parametrize(
    ("params", "blamed"),
    [({"n": 3, "best_of": 2}, "best_of"), ({"min_tokens": 9, "max_tokens": 8}, "min_tokens")],
)
def test_fields_that_disagree_are_refused_and_one_is_blamed(
    params: dict[str, int], blamed: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        SamplingParams.model_validate(params)
    assert caught.value.errors()[0]["ctx"]["param"] == blamed
    equal = {"n": 2, "best_of": 2, "min_tokens": 8, "max_tokens": 8}
    assert SamplingParams.model_validate(equal).num_sequences == 2


# -- fields that cannot be combined

PAIRS = [(name, other) for name, others in EXCLUDES.items() for other in others]


@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_two_fields_that_exclude_each_other_are_refused_by_both_names(
    name: str, other: str
) -> None:
    for both in (asking(name) | asking(other), asking(other) | asking(name)):
        with pytest.raises(ValidationError) as caught:
            SamplingParams.model_validate(both)
        (error,) = caught.value.errors()
        assert error["type"] == "incompatible_parameters"
        assert error["ctx"]["param"] == name
        assert name in error["msg"]
        assert other in error["msg"]
        SamplingParams.model_validate(asking(name) | {other: None})
        SamplingParams.model_validate(asking(other) | {name: None})
        neutral = SamplingParams.model_fields[other].default
        assert SamplingParams.model_validate(asking(name) | {other: neutral}).asks(name)


def test_mirostat_goes_without_all_other_truncation() -> None:
    truncating = [
        field
        for stage in STAGES
        for field in stage.fields
        if stage.__name__.startswith(
            ("Top", "MinP", "Typical", "TailFree", "Epsilon", "Eta", "Xtc")
        )
    ]
    switches = set(truncating) - {"top_p_rule", "xtc_threshold"}
    assert switches == set(TRUNCATION) == set(EXCLUDES["mirostat"])


@pytest.mark.parametrize(
    "params",
    [
        {"mirostat": 2, "top_k": -1, "top_n_sigma": -3.0, "top_p_rule": "inclusive"},
        {"mirostat": 1, "temperature": 0.7, "dynatemp_range": 0.5},
        {"mirostat": 0, "top_p": 0.9},
        {"mirostat": 2, "edt_theta": 0.1, "xtc_threshold": 0.3},
        {"adapt_temperature": [0.8, 0.6], "top_p": 0.95, "dynatemp_exponent": 2.0},
        {"edt_theta": 0.1, "temperature": 0.7, "top_k": 5},
    ],
)
def test_what_does_not_contradict_is_accepted(params: dict[str, Any]) -> None:
    SamplingParams.model_validate(params)


@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_what_is_asked_for_goes_before_a_default_that_excludes_it(name: str, other: str) -> None:
    for mine, default in ((name, other), (other, name)):
        own = SamplingParams.model_validate(asking(mine))
        rest = {"repetition_penalty": 1.3, "mirostat_tau": 2.0}
        kept = combinable(asking(default) | rest, own)
        assert default not in kept
        assert rest.items() <= kept.items()
        SamplingParams.model_validate(kept | asking(mine))
        assert combinable(asking(default), SamplingParams()) == asking(default)
        neutral = SamplingParams.model_validate({mine: SamplingParams.model_fields[mine].default})
        assert combinable(asking(default), neutral) == asking(default)


def test_every_field_is_described() -> None:
    for name, field in SamplingParams.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(" * 490 + "a" + ")" * 490, "nested too deeply"),
        ("(?:" * 18 + "a" + "+)" * 18, "compiling it takes over"),
        ("(", "no regular expression"),
    ],
    ids=["deep", "slow", "wrong"],
)
def test_a_pattern_that_cannot_be_compiled_is_refused_by_name(pattern: str, reason: str) -> None:
    with pytest.raises(ValidationError) as raised:
        SamplingParams(cot_branches=2, cot_pattern=pattern)
    (problem,) = raised.value.errors()
    assert problem["ctx"]["param"] == "cot_pattern"
    assert reason in problem["msg"]


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("dola_layers", [1, 3, 1], "no layer twice, but 1 is"),
        ("dola_layers", list(range(1025)), "at most 1024"),
        ("stop", ["x" * 1025], "at most 1024"),
    ],
)
def test_lists_hold_no_more_than_can_matter(field: str, value: Any, shown: str) -> None:
    with pytest.raises(ValidationError, match=shown):
        SamplingParams.model_validate({field: value})


def test_token_ids_may_be_integral_numbers_and_nothing_else() -> None:
    params = SamplingParams.model_validate({"stop_token_ids": [1.0, 2], "allowed_token_ids": [3]})
    assert (params.stop_token_ids, params.allowed_token_ids) == ([1, 2], [3])
    for wrong in (1.5, True, "1", None, [1]):
        with pytest.raises(ValidationError) as raised:
            SamplingParams.model_validate({"stop_token_ids": [0, wrong]})
        assert raised.value.errors()[0]["loc"] == ("stop_token_ids", 1)
