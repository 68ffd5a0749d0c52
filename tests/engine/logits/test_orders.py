"""`sampler_order`: filters in the orders of transformers, llama.cpp and vLLM."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.logits_process import TopHLogitsWarper

from engine.config import LogprobsMode
from engine.logits import ORDERS, STAGES
from engine.logits.pipeline import Pipeline
from engine.logits.stage import Filter
from engine.numerics import NEG_INF
from engine.params import SamplingParams
from engine.rng import Domain, uniform
from engine.sampler import Samples
from engine.types import Rows
from tests.engine.test_sampler import chi_square
from tests.support.logits import (
    DIST_P,
    Spec,
    bits,
    entropy,
    examples,
    histories,
    kept,
    likeliest,
    new_lanes,
    place,
    process,
    random_rows,
    rows_of,
    sampler_for,
    softmax,
    with_signals,
)

NAMES = ("vllm", "hf", "llama.cpp")
NEWLINE = 3


def processed(specs: Sequence[Spec], logits: Tensor) -> Tensor:
    return process(STAGES, specs, logits, ORDERS)


def test_every_order_has_every_filter_once() -> None:
    filters = {stage for stage in STAGES if issubclass(stage, Filter)}
    for order in ORDERS.values():
        assert len(order) == len(filters)
        assert set(order) == filters
    named = SamplingParams.model_json_schema()["properties"]["sampler_order"]["enum"]
    assert set(named) == {"vllm", *ORDERS}


@pytest.mark.parametrize(
    ("params", "want"),
    [
        ({"temperature": 2.0, "min_p": 0.3}, [5, 5, 3]),  # before, before and after
        ({"min_p": 0.3, "top_p": 0.8}, [2, 3, 3]),
        ({"top_k": 3, "top_p": 0.8}, [2, 2, 2]),
        ({"temperature": 0.5, "top_p": 0.65}, [2, 2, 2]),
        ({"temperature": 0.5, "top_p": 0.8}, [2, 2, 3]),
        ({"typical_p": 0.6, "top_k": 1}, [1, 1, 1]),
        ({"typical_p": 0.2, "top_p": 0.3}, [1, 1, 1]),
    ],
)
def test_what_is_left_depends_on_the_order(params: dict[str, Any], want: list[int]) -> None:
    specs = [Spec(params | {"sampler_order": name}) for name in NAMES]
    got = processed(specs, DIST_P.expand(3, -1))
    assert [len(kept(row)) for row in got] == want


# -- transformers


def warpers(params: dict[str, Any]) -> LogitsProcessorList:
    """Its warpers, in the order in which `generate` puts them."""
    makers: dict[str, Callable[[Any], Any]] = {
        "temperature": TemperatureLogitsWarper,
        "top_h": TopHLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
        "typical_p": TypicalLogitsWarper,
        "epsilon_cutoff": EpsilonLogitsWarper,
        "eta_cutoff": EtaLogitsWarper,
    }
    return LogitsProcessorList(
        make(params[name]) for name, make in makers.items() if name in params
    )


HF: dict[str, list[Any]] = {
    "temperature": [0.5, 0.8, 1.5],
    "top_h": [0.5, 0.8],
    "top_k": [20, 300],
    "top_p": [0.7, 0.95],
    "min_p": [0.003, 0.02],
    "typical_p": [0.9, 0.98],
    "epsilon_cutoff": [1e-3, 0.01],
    "eta_cutoff": [2e-3, 0.01],
}


def some_params(choices: dict[str, list[Any]], count: int, **others: Any) -> list[dict[str, Any]]:
    """Half of the fields, at one of their values."""
    rng = random.Random(0)
    return [
        {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.5}
        | others
        for _ in range(count)
    ]


def test_rows_match_the_warpers_of_transformers_in_its_order() -> None:
    logits = random_rows(300, 600)
    params = some_params(HF, 300)
    specs = [Spec(one | {"sampler_order": "hf"}) for one in params]

    got = processed(specs, logits)

    ours = processed([Spec(one) for one in params], logits)
    num_compared = num_different = 0
    for row, one in enumerate(params):
        want = warpers(one)(None, logits[row, None].clone())[0]
        exact = warpers(one)(None, logits[row, None].double())[0]
        if kept(want) == kept(exact):  # else it hangs on rounding
            torch.testing.assert_close(got[row], want, rtol=1e-6, atol=1e-6)
            num_compared += 1
            num_different += kept(want) != kept(ours[row])
    assert num_compared > 280
    assert num_different > 20  # the order does matter


# -- the other two, from their formulas


class Tokens:
    """Tokens on their way through another program, best first, in float64."""

    def __init__(self, row: Tensor) -> None:
        numbers: list[float] = row.double().tolist()
        self.logits = {i: numbers[i] for i in likeliest(softmax(row))}

    @property
    def probs(self) -> dict[int, float]:
        top = max(self.logits.values())
        weights = {i: math.exp(z - top) for i, z in self.logits.items()}
        total = math.fsum(weights.values())
        return {i: weight / total for i, weight in weights.items()}

    def keep(self, ids: Sequence[int]) -> None:
        left = set(ids)
        self.logits = {i: z for i, z in self.logits.items() if i in left}

    def divide(self, temperature: float) -> None:
        self.logits = {i: z / temperature for i, z in self.logits.items()}

    def top_k(self, count: int) -> None:
        self.keep(list(self.logits)[:count])

    def min_p(self, fraction: float) -> None:
        floor = max(self.logits.values()) + math.log(fraction)
        self.keep([i for i, z in self.logits.items() if z >= floor])

    def prefix(self, ids: Sequence[int], mass: float) -> None:
        """The first of these tokens that together have so much."""
        probs, total = self.probs, 0.0
        for count, token_id in enumerate(ids):
            total += probs[token_id]
            if total >= mass:
                self.keep(ids[: count + 1])
                return

    def typical(self, mass: float) -> None:
        probs = self.probs
        height = entropy(probs.values())
        self.prefix(sorted(probs, key=lambda i: abs(-math.log(probs[i]) - height)), mass)

    def top_n_sigma(self, sigmas: float) -> None:
        numbers = list(self.logits.values())
        mean = math.fsum(numbers) / len(numbers)
        spread = math.sqrt(math.fsum((z - mean) ** 2 for z in numbers) / len(numbers))
        self.keep([i for i, z in self.logits.items() if z >= max(numbers) - sigmas * spread])

    def xtc(self, threshold: float) -> None:
        above = [i for i, prob in self.probs.items() if prob >= threshold]
        gone = set(above[:-1])
        self.keep([i for i in self.logits if i not in gone])


def vllm(spec: Spec, params: dict[str, Any], row: Tensor) -> dict[int, float]:
    """bias → penalties → temperature → min_p → top_k → top_p."""
    row = row.double().clone()
    for token_id, bias in params.get("logit_bias", {}).items():
        row[token_id] += bias
    theta = params.get("repetition_penalty", 1.0)
    for token_id in set(spec.tokens):
        row[token_id] = row[token_id] / theta if row[token_id] > 0 else row[token_id] * theta
    for token_id in spec.output:
        row[token_id] -= params.get("frequency_penalty", 0.0)
    for token_id in set(spec.output):
        row[token_id] -= params.get("presence_penalty", 0.0)
    tokens = Tokens(row)
    tokens.divide(params.get("temperature", 1.0))
    if "min_p" in params:
        tokens.min_p(params["min_p"])
    if "top_k" in params:
        tokens.top_k(params["top_k"])
    if "top_p" in params:
        tokens.prefix(list(tokens.logits), params["top_p"])
    return tokens.logits


def llama_cpp(spec: Spec, params: dict[str, Any], row: Tensor) -> dict[int, float]:
    """bias → penalties → top-nσ → top-k → typical → top-p → min-p → XTC → temperature."""
    row = row.double().clone()
    for token_id, bias in params.get("logit_bias", {}).items():
        row[token_id] += bias
    theta = params.get("repetition_penalty", 1.0)
    for token_id in set(spec.tokens[-params.get("penalty_last_n", 64) :]):
        row[token_id] = row[token_id] / theta if row[token_id] > 0 else row[token_id] * theta
    tokens = Tokens(row)
    if "top_n_sigma" in params:
        tokens.top_n_sigma(params["top_n_sigma"])
    if "top_k" in params:
        tokens.top_k(params["top_k"])
    if "typical_p" in params:
        tokens.typical(params["typical_p"])
    if "top_p" in params:
        tokens.prefix(list(tokens.logits), params["top_p"])
    if "min_p" in params:
        tokens.min_p(params["min_p"])
    position = len(spec.tokens) - 1
    if coin(spec.seed, position) < params.get("xtc_probability", 0.0):
        tokens.xtc(params["xtc_threshold"])
    temperature, reach = params.get("temperature", 1.0), params.get("dynatemp_range", 0.0)
    if reach and len(tokens.logits) > 1:
        low = max(0.0, temperature - reach)
        share = entropy(tokens.probs.values()) / math.log(len(tokens.logits))
        share **= params.get("dynatemp_exponent", 1.0)
        temperature = low + (temperature + reach - low) * share
    tokens.divide(temperature)
    return tokens.logits


def coin(seed: int, position: int) -> float:
    nobody = torch.tensor([0])
    return float(uniform(torch.tensor([seed]), torch.tensor([position]), nobody, Domain.COIN))


VLLM: dict[str, list[Any]] = {
    "logit_bias": [{5: 2.0, 8: -5.0}, {400: 3.0}],
    "repetition_penalty": [0.8, 1.3],
    "frequency_penalty": [0.5, -1.0],
    "presence_penalty": [0.7],
    "temperature": [0.5, 0.8, 1.5],
    "min_p": [0.003, 0.02],
    "top_k": [3, 20, 300],
    "top_p": [0.5, 0.8, 0.95],
}
LLAMA_CPP: dict[str, list[Any]] = {
    "logit_bias": [{5: 2.0, 8: -5.0}, {400: 3.0}],
    "repetition_penalty": [0.8, 1.3],
    "penalty_last_n": [1, 5],
    "top_n_sigma": [1.0, 3.0],
    "top_k": [20, 300],
    "typical_p": [0.8, 0.95],
    "top_p": [0.7, 0.95],
    "min_p": [0.003, 0.05],
    "xtc_probability": [0.5, 1.0],
    "temperature": [0.6, 0.8, 1.5],
    "dynatemp_range": [0.3, 0.5],
    "dynatemp_exponent": [2.0],
}


def test_rows_match_the_formulas_of_the_other_two_in_their_orders() -> None:
    """All three orders in one batch."""
    logits = random_rows(360, 600)
    logits[:, NEWLINE] = NEG_INF  # which nobody but us spares from XTC
    params: list[tuple[str, dict[str, Any]]] = [
        *(("vllm", one) for one in some_params(VLLM, 120)),
        *(("llama.cpp", one) for one in some_params(LLAMA_CPP, 120, xtc_threshold=0.06)),
        *(("hf", one) for one in some_params(HF, 120)),
    ]
    random.Random(1).shuffle(params)
    specs = [
        Spec(one | {"sampler_order": name}, *history, seed=row, ends=())
        for row, ((name, one), history) in enumerate(zip(params, histories(360), strict=True))
    ]

    got = processed(specs, logits)

    num_compared = 0
    for row, (name, one) in enumerate(params):
        if name == "hf":
            continue
        chain = vllm if name == "vllm" else llama_cpp
        want = chain(specs[row], one, logits[row])
        around = [
            chain(specs[row], one | _moved(one, factor), logits[row]) for factor in (0.9999, 1.0001)
        ]
        if all(other.keys() == want.keys() for other in around):  # else it may hang on rounding
            assert kept(got[row]) == want.keys(), (name, one)
            left = got[row][sorted(want)].double()
            values = torch.tensor([want[i] for i in sorted(want)], dtype=torch.float64)
            torch.testing.assert_close(left, values, rtol=1e-4, atol=1e-4)
            num_compared += 1
    assert num_compared > 200


def _moved(params: dict[str, Any], factor: float) -> dict[str, Any]:
    limits = ("top_p", "min_p", "typical_p", "top_n_sigma", "xtc_threshold")
    return {name: params[name] * factor for name in limits if name in params}


def test_mirostat_comes_after_the_temperature_in_all_of_them() -> None:
    params = {"mirostat": 2, "mirostat_tau": 1.0, "temperature": 2.0}
    specs = [Spec(params | {"sampler_order": name}) for name in NAMES]
    got = processed(specs, DIST_P.expand(3, -1))
    surprise = -DIST_P.div(2.0).log_softmax(0) / math.log(2)
    for row in got:
        assert kept(row) == set((surprise <= 2.0).nonzero().flatten().tolist())
        assert len(kept(row)) < 5


# -- draws


CASES: list[tuple[str, dict[str, Any]]] = [
    ("vllm", {"temperature": 1.4, "min_p": 0.2, "top_p": 0.8}),
    ("hf", {"temperature": 1.4, "min_p": 0.2, "top_p": 0.8}),
    ("llama.cpp", {"temperature": 1.4, "min_p": 0.2, "top_p": 0.8}),
    (
        "llama.cpp",
        {"temperature": 0.8, "dynatemp_range": 0.5, "xtc_probability": 0.4, "xtc_threshold": 0.08},
    ),
]


def distribution(name: str, params: dict[str, Any], row: Tensor, seed: int) -> Tensor:
    """What is to be drawn from at position 0."""
    spec = Spec(params, seed=seed, ends=())
    if name == "hf":
        left_by_them: Tensor = warpers(params)(None, row[None].double())
        return left_by_them[0].softmax(0)
    probs = torch.zeros(len(row), dtype=torch.float64)
    left = (vllm if name == "vllm" else llama_cpp)(spec, params, row)
    probs[list(left)] = torch.tensor(list(left.values()), dtype=torch.float64).softmax(0)
    return probs


def test_draws_follow_the_distribution_of_each_order() -> None:
    """Many seeds of each order in one batch."""
    row = 1.5 * random_rows(2, 60, seed=7)[1]
    row[NEWLINE] = NEG_INF
    count = 6000
    specs = [Spec(one | {"sampler_order": name}, ends=()) for name, one in CASES]
    sampler, lane_ids = sampler_for(specs, 60, LogprobsMode.PROCESSED_LOGPROBS)
    drawn: list[list[int]] = [[] for _ in CASES]
    for start in range(0, count, 1000):
        positions = [position for position in range(start, start + 1000) for _ in CASES]
        rows = Rows.build(lane_ids * 1000, positions, "cpu")
        tokens = sampler(row.repeat(len(rows), 1), rows).token_ids
        for case, its in enumerate(drawn):
            its += tokens[case :: len(CASES)]
    want = [distribution(*case, row, seed=0) for case in CASES]
    # A coin decides in the last case: either side has its part.
    one = dict(CASES[3][1])
    sides = [distribution("llama.cpp", one | {"xtc_probability": p}, row, 0) for p in (0.0, 1.0)]
    want[3] = 0.6 * sides[0] + 0.4 * sides[1]
    for case, its in enumerate(drawn):
        counts = torch.tensor(its).bincount(minlength=60)
        assert chi_square(counts, want[case]) < 4, CASES[case]
        assert not counts[want[case] == 0].any()
        for other in range(len(CASES)):
            if other != case:
                assert chi_square(counts, want[other] + 1e-9) > 4  # it would notice


FIELDS = [name for stage in STAGES for name in stage.fields]


def mixed(count: int) -> list[Spec]:
    """Any parameters in any order."""
    given = zip(examples(FIELDS, count), histories(count), strict=True)
    return [
        Spec(params | {"sampler_order": NAMES[row % 3]}, *history, seed=row * 31 - 7, logprobs=3)
        for row, (params, history) in enumerate(given)
    ]


def samples(specs: Sequence[Spec], logits: Tensor) -> Samples:
    sampler, lane_ids = sampler_for(specs, logits.shape[1], LogprobsMode.PROCESSED_LOGPROBS)
    return sampler(logits, with_signals(rows_of(specs, lane_ids), logits))


def test_a_row_among_rows_of_other_orders_is_the_row_alone() -> None:
    specs, logits = mixed(90), random_rows(90, 700)
    rows, together = processed(specs, logits), samples(specs, logits)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1)).tolist()
    permuted = samples([specs[row] for row in order], logits[order])
    assert permuted.token_ids == [together.token_ids[row] for row in order]
    for row, spec in enumerate(specs):
        alone = samples([spec], logits[row, None])
        assert alone.token_ids == [together.token_ids[row]], (row, spec)
        # As text, in which a row without any token equals itself.
        assert repr(alone.logprobs[0]) == repr(together.logprobs[row]), (row, spec)
        left = processed([spec], logits[row, None])[0]
        assert torch.equal(bits(left), bits(rows[row])), (row, spec)


def test_a_fork_keeps_the_order_and_a_new_owner_brings_its_own() -> None:
    params = {"temperature": 2.0, "min_p": 0.3}
    lanes = new_lanes(2, 4)
    pipeline = Pipeline(STAGES, lanes, ORDERS)

    def count(lane: int) -> int:
        (part,) = pipeline.filter(DIST_P[None], Rows.build([lane], [0], "cpu"))
        return int(part.candidates.alive.sum())

    place(lanes, 0, Spec(params | {"sampler_order": "llama.cpp"}), pipeline)
    place(lanes, 1, Spec(params), pipeline)
    assert [count(0), count(1)] == [3, 5]
    lanes.fork([0], [1])
    pipeline.fork([0], [1])
    assert [count(0), count(1)] == [3, 3]
    place(lanes, 0, Spec(params | {"sampler_order": "hf"}), pipeline)
    assert [count(0), count(1)] == [5, 3]
