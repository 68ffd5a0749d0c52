"""Rows of logits and the sequences behind them, for tests of the pipeline without an engine."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.config import LogprobsMode
from engine.lanes import Lanes
from engine.logits import ORDERS, STAGES
from engine.logits.pipeline import Pipeline, dense, run_filters
from engine.logits.stage import Stage, Transform
from engine.messages import Request
from engine.numerics import NEG_INF
from engine.params import EXCLUDES, NEEDS, SamplingParams
from engine.sampler import Sampler, kl_divergence
from engine.types import Beside, Rows, Signals
from engine.vocabulary import Vocabulary

ROW_A = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
DIST_P = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05]).log()
END = 2  # the end-of-sequence token of sequences here, if they name no others

# Texts of the tokens here; those that sequences are made of are 3 to 9.
TEXTS = ("<pad>", "<s>", "</s>", "\n", "  ", "\n ", "a", "b", "c", "ca")
WORDS = Vocabulary(lambda: (*TEXTS, *["x"] * 50_000))
BREAKERS = {"a": (6,), "b": (7,), "ca": (8, 6), "zz": ()}  # and their tokens

# Values of each field that a stage reads, the extreme ones included. No list of allowed tokens
# leaves out token 5, the only one that some rows of `hard_rows` have.
EXAMPLES: dict[str, list[Any]] = {
    "logit_bias": [{0: 1.5, 5: -100.0}, {300: 100.0}, dict.fromkeys(range(50), -0.25)],
    "repetition_penalty": [1.3, 0.6, 1.0, 2.5],
    "frequency_penalty": [0.5, -2.0, 2.0, 0.0],
    "presence_penalty": [0.0, 1.5, -0.5],
    "penalty_last_n": [-1, 1, 3, 7, 2**63 - 1],
    "penalty_prompt": [True, False],
    "allowed_token_ids": [[5], [0, 5, 9], [*range(0, 600, 3), 5, 5]],
    "min_tokens": [1, 4, 2**63 - 1],
    "bad_words": [["5"], ["6 7"], ["3 4 5", "8"], ["4", "3 4"]],
    "no_repeat_ngram_size": [1, 2, 3, 50, 2**63 - 1],
    "temperature": [0.5, 0.0, 1e-5, 1.7, 2.0],
    "top_n_sigma": [1.0, 0.01, 3.0, 1e-300, 1e300],
    "min_p": [0.05, 0.5, 1.0, 1e-300],
    "top_k": [1, 3, 50, 400, 2**63 - 1],
    "typical_p": [0.2, 0.95, 0.999, 1e-300],
    "top_p": [0.0, 0.3, 0.9, 0.999, 1e-300],
    "top_p_rule": ["strict", "inclusive"],
    "epsilon_cutoff": [3e-4, 0.02, 0.999, 1e-300],
    "eta_cutoff": [3e-4, 0.02, 0.999, 1e-300],
    "dry_multiplier": [0.8, 2.0, 1e300],
    "dry_base": [1.75, 1.0, 3.0, 1e300],
    "dry_allowed_length": [1, 1, 1, 2, 2**63 - 1],
    "dry_penalty_last_n": [-1, -1, -1, 6, 0, 2**63 - 1],
    "dry_sequence_breakers": [[], ["a"], [], ["b", "ca"], ["zz"]],
    "eos_length_penalty": [4.0, 0.5, 1e300],
    "eos_length_window": [1, 10, 100, 2**63 - 1],
    "exponential_decay_length_penalty": [[0, 1.5], [2, 3.0], [5, 0.5], [2**62, 2.0], [0, 1e300]],
    "edt_theta": [0.1, 1.0, 1e-300, 1e300],
    "edt_base": [0.8, 0.1, 0.999, 1e-300],
    "dynatemp_range": [0.5, 1.5, 1e-300, 1e300],
    "dynatemp_exponent": [1.0, 2.0, 0.1, 1e300],
    "adapt_temperature": [[0.8, 0.6], [2.0, 1e-5], [1.0, 0.5]],
    "tfs": [0.95, 0.5, 0.0, 0.9999],
    "top_a": [0.2, 1.0, 0.01, 1e-300],
    "top_h": [0.4, 0.05, 1.0, 1e-300],
    "mirostat": [1, 2, 2],
    "mirostat_tau": [5.0, 1.0, 0.1, 1e300],
    "mirostat_eta": [0.1, 1.0, 1e300],
    "xtc_probability": [1.0, 0.5, 1.0, 0.1],
    "entropix": [
        {},
        {"clarify_token": 5},
        {"profile": "head", "clarify_token": 5, "low_ent": 0.01},
        {"high_ent": 2.0, "low_vent": 3.0, "clarify_token": 9},
        {"low_ent": 5.0, "low_vent": 5.0, "top_k": 3},
    ],
    "use_beam_search": [True],
    "sampler_order": ["hf"],
    "guidance_scale": [1.5, 0.0, -2.0, 1e300],
    "negative_prompt": ["x"],
    "cd_amateur": ["small"],
    "cd_alpha": [0.1, 1.0, 1e-300],
    "cd_beta": [None, 0.5, 0.0, 1e300],
    "cd_temperature": [1.0, 0.5, 1e-300],
    "dola_layers": ["high", "low", [1]],
    "dola_relative_top": [0.1, 1.0, 1e-300],
    "dola_mode": ["paper", "hf"],
    "dola_norm": [False, True],
    "kl_bandwidth": [1.0, 0.1, 1e-300, 1e300],
    "kl_reference_prompt": ["x"],
    "xtc_threshold": [0.1, 0.03, 0.01, 0.05, 0.3, 0.6, 0.0],
}


# Values of the fields that say which sequences there are.
STRATEGIES: dict[str, list[Any]] = {
    "n": [2],
    "best_of": [3],
    "beam_width": [4],
    "length_penalty": [0.5],
    "length_penalty_type": ["gnmt"],
    "early_stopping": ["never"],
    "beam_prune": [3.0],
    "coverage_penalty": [0.2],
    "num_beam_groups": [2],
    "diversity_penalty": [0.5],
    "stochastic_beams": [True],
    "beam_strategy": ["best_first"],
    "beam_memory": [4],
    "penalty_alpha": [0.6],
    "cot_branches": [3],
    "cot_branch_position": [1],
    "cot_aggregate": ["max"],
    "cot_pattern": ["[0-9]"],
    "sed": [{}],
    "pause_token": ["x"],
    "num_pause_tokens": [3],
    "num_latent_thoughts": [2],
}


@dataclass(frozen=True)
class Spec:
    """A sequence: its sampling parameters and its tokens so far.

    A word of `bad_words` is spelled by its token ids: "6 7".
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    prompt: Sequence[int] = (1,)
    output: Sequence[int] = ()
    seed: int = 0
    logprobs: int | None = None
    ends: Sequence[int] = (END,)  # end-of-sequence tokens

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.output]

    @property
    def request(self) -> Request:
        params = SamplingParams.model_validate(dict(self.params))
        return Request(
            request_id="r",
            prompt_ids=tuple(self.prompt),
            params=params,
            max_tokens=100,
            seed=self.seed,
            logprobs=self.logprobs,
            eos_token_ids=frozenset(self.ends),
            stop_tokens={token_id: token_id for token_id in params.stop_token_ids},
            early_layers=(1,) if params.dola_layers else (),
            clarify_token=params.entropix and params.entropix.clarify_token,
            dry_breaker_ids=tuple(BREAKERS.get(word, ()) for word in params.dry_sequence_breakers),
            bad_word_ids=tuple(tuple(map(int, word.split())) for word in params.bad_words),
        )


class Admits(Protocol):
    """A stage, a pipeline or a sampler."""

    def admit(self, lane: int, request: Request) -> Any: ...


def place(lanes: Lanes, lane: int, spec: Spec, *parts: Admits) -> None:
    """Give a sequence a lane and tell the parts about it."""
    lanes.write(lane, spec.tokens, len(spec.prompt), spec.seed)
    for part in parts:
        part.admit(lane, spec.request)


def new_lanes(num_lanes: int, context_len: int) -> Lanes:
    """Lanes whose stages know the texts of the tokens here."""
    return Lanes(num_lanes, context_len, vocabulary=WORDS)


def lanes_for(specs: Sequence[Spec], vocab_size: int) -> tuple[Lanes, list[int]]:
    """Lanes, and one for each sequence, in no order.

    They are full of tokens of earlier owners.
    """
    generator = torch.Generator().manual_seed(len(specs))
    longest = max((len(spec.tokens) for spec in specs), default=0)
    lanes = new_lanes(len(specs) + 3, longest + 2)
    lanes.tokens.random_(0, vocab_size, generator=generator)
    return lanes, torch.randperm(lanes.num_lanes, generator=generator)[: len(specs)].tolist()


def sampler_for(
    specs: Sequence[Spec], vocab_size: int, mode: LogprobsMode = LogprobsMode.RAW_LOGPROBS
) -> tuple[Sampler, list[int]]:
    """A sampler with all stages that knows these sequences, and the lane of each."""
    lanes, lane_ids = lanes_for(specs, vocab_size)
    sampler = Sampler(lanes, Pipeline(STAGES, lanes, ORDERS), mode)
    for lane, spec in zip(lane_ids, specs, strict=True):
        place(lanes, lane, spec, sampler)
    return sampler, lane_ids


def rows_of(specs: Iterable[Spec], lane_ids: list[int]) -> Rows:
    """The rows of a step in which each of these sequences gets a token."""
    return Rows.build(lane_ids, [len(spec.tokens) - 1 for spec in specs], "cpu")


def apply(stage: type[Stage], specs: Sequence[Spec], logits: Tensor) -> Tensor:
    """What a stage makes of these sequences' rows, all in one batch, wanted or not."""
    lanes, lane_ids = lanes_for(specs, logits.shape[1])
    one = stage(lanes)
    for lane, spec in zip(lane_ids, specs, strict=True):
        place(lanes, lane, spec, one)
    return run_stage(one, logits, rows_of(specs, lane_ids))


def process(
    stages: Sequence[type[Stage]],
    specs: Sequence[Spec],
    logits: Tensor,
    orders: Mapping[str, Sequence[type[Stage]]] | None = None,
) -> Tensor:
    """What a pipeline makes of these sequences' rows, all in one batch."""
    lanes, lane_ids = lanes_for(specs, logits.shape[1])
    pipeline = Pipeline(stages, lanes, orders)
    for lane, spec in zip(lane_ids, specs, strict=True):
        place(lanes, lane, spec, pipeline)
    return run_pipeline(pipeline, specs, logits, lane_ids)


def with_signals(rows: Rows, logits: Tensor) -> Rows:
    """The rows with what stages may want to know besides; of attention, always the same."""
    probs = logits.double().softmax(1)
    surprise = torch.where(probs > 0, -probs.log2(), 0.0)
    entropy = (probs * surprise).sum(1, keepdim=True)
    varentropy = (probs * (surprise - entropy) ** 2).sum(1, keepdim=True)
    attention = torch.tensor([2.0, 0.5, 0.1, 1.5]).expand(len(logits), 4)
    # Other rows, made of each row alone, as a companion's and two earlier layers'.
    others = [logits.roll(shift, 1).clamp(-1e30, 1e30) for shift in (1, 2, 3)]
    own = torch.arange(len(logits))
    beside = Beside(
        companions=others[0],
        companion_of=own,
        early=torch.stack(others[1:], 1),
        early_of=own,
        early_count=torch.where(entropy[:, 0] > 3.0, 2, 1),
    )
    other = others[0].double().softmax(1)
    divergence = kl_divergence(probs, other).float().nan_to_num(0.0)
    signals = Signals(entropy.float(), varentropy.float(), attention, divergence)
    return replace(rows, signals=signals, beside=beside)


def run_stage(stage: Stage, logits: Tensor, rows: Rows) -> Tensor:
    """The rows [R, V] after one stage, -inf where a token was dropped."""
    rows = with_signals(rows, logits)
    if isinstance(stage, Transform):
        return stage.apply(logits.clone(), rows)
    return dense(run_filters([stage], logits, rows), logits)


def run_pipeline(
    pipeline: Pipeline, specs: Sequence[Spec], logits: Tensor, lane_ids: list[int]
) -> Tensor:
    """The rows [R, V] after all stages, -inf where a token was dropped."""
    rows = with_signals(rows_of(specs, lane_ids), logits)
    logits = pipeline.transform(logits, rows)
    drawn = [row for row, spec in enumerate(specs) if not spec.request.params.greedy]
    if not drawn:
        return logits
    index = torch.tensor(drawn)
    parts = pipeline.filter(logits[index], rows.select(drawn, index))
    return logits.index_copy(0, index, dense(parts, logits[index]))


def one_row(stage: type[Stage], logits: Tensor, **params: Any) -> Tensor:
    """What a stage makes of a single row [V] of a sequence with these parameters."""
    return apply(stage, [Spec(params)], logits[None])[0]


def kept(row: Tensor) -> set[int]:
    """The tokens that are still possible."""
    ids: list[int] = (row > NEG_INF).nonzero().squeeze(1).tolist()
    return set(ids)


def softmax(row: Tensor) -> list[float]:
    """The probabilities of a row [V], one after the other, in float64."""
    numbers: list[float] = row.double().tolist()
    top = max(numbers)
    weights = [math.exp(number - top) for number in numbers]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def likeliest(probs: Sequence[float]) -> list[int]:
    """Tokens that are possible, likeliest first, equal ones by lowest id."""
    possible = (token_id for token_id, prob in enumerate(probs) if prob > 0.0)
    return sorted(possible, key=lambda token_id: -probs[token_id])


def entropy(probs: Iterable[float]) -> float:
    """In nats."""
    return -math.fsum(prob * math.log(prob) for prob in probs if prob > 0.0)


def only(row: Tensor, token_ids: Iterable[int]) -> Tensor:
    """The row [V] without all other tokens."""
    left = torch.full_like(row, NEG_INF)
    index = torch.tensor([*token_ids], dtype=torch.int64)
    left[index] = row[index]
    return left


def bits(x: Tensor) -> Tensor:
    """The representation of float32 numbers, which tells 0 from -0."""
    return x.view(torch.int32)


@contextmanager
def several_threads() -> Iterator[None]:
    """More threads than tests usually have: torch divides work among them by its size."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_rows(count: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Rows from nearly flat to peaked."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([0.2, 1.0, 3.0, 8.0]).repeat(-(-count // 4))[:count]
    return torch.randn(count, vocab_size, generator=generator) * scales[:, None]


def hard_rows(vocab_size: int) -> Tensor:
    """Rows at which filters may stumble: ties, a single token, huge and tiny numbers."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(9, vocab_size)
    rows[1] = torch.randint(0, 3, (vocab_size,), generator=generator).float()
    rows[2] = NEG_INF
    rows[2, 5] = -7.0
    rows[3] = NEG_INF
    rows[3, [0, 5, vocab_size - 1]] = 1.5
    rows[4] = torch.randn(vocab_size, generator=generator)
    rows[4, ::7] = 3e38
    rows[4, ::11] = -3e38
    rows[5] = 1e-42 * torch.randn(vocab_size, generator=generator)
    rows[6] = -0.0
    rows[7] = torch.linspace(80.0, -80.0, vocab_size)
    rows[8] = torch.where(torch.rand(vocab_size, generator=generator) < 0.9, NEG_INF, rows[7])
    rows[8, 5] = 0.1
    return rows


def examples(fields: Iterable[str], count: int) -> list[dict[str, Any]]:
    """Parameter sets of example values, drawn at random."""
    names = list(fields)
    sets = []
    for rng in (random.Random(index) for index in range(count)):
        params = {name: rng.choice(EXAMPLES[name]) for name in names}
        for name, others in EXCLUDES.items():
            if name in params and params.keys() & set(others):
                for gone in rng.choice([(name,), others]):
                    params.pop(gone, None)
        for name in [name for name, other in NEEDS.items() if other not in params]:
            params.pop(name, None)
        sets.append(params)
    return sets


def asking(name: str) -> dict[str, Any]:
    """A field and an example value with which it asks for something, and what that needs."""
    values, given = EXAMPLES | STRATEGIES, dict[str, Any]()
    needs = {"penalty_alpha": "top_k"} | NEEDS
    other = needs.get(name)
    while other is not None and other != name:
        given[other] = 4 if other == "top_k" else values[other][0]
        other = needs.get(other)
    both = ({name: value} | given for value in values[name])
    return next(one for one in both if SamplingParams.model_validate(one).asks(name))


def histories(count: int, longest: int = 12) -> list[tuple[list[int], list[int]]]:
    """Prompts and outputs of a few tokens, so that all of them recur."""
    rng = random.Random(0)
    return [
        (rng.choices(range(3, 10), k=rng.randint(1, longest)), rng.choices(range(3, 10), k=length))
        for length in (rng.randint(0, longest) for _ in range(count))
    ]


def assert_filters_like(
    stage: type[Stage],
    field_name: str,
    values: Sequence[float],
    oracle: Callable[[float, Tensor], Tensor],
    vocab_size: int,
    **others: Any,
) -> None:
    """Hundreds of rows in one batch, each at its own value, equal what an oracle does to each.

    `oracle` gets a value and a row [1, V]. Left out are rows whose answer hangs on rounding: those
    with ties, and those where the oracle keeps other tokens in float64 when the value and the row
    are a little smaller or larger. One row is neutral.
    """
    logits = random_rows(320, vocab_size)
    values = [values[row // 4 % len(values)] for row in range(len(logits))]
    specs = [Spec({field_name: value} | others) for value in values]
    specs[17] = Spec()

    got = apply(stage, specs, logits)

    assert torch.equal(bits(got[17]), bits(logits[17]))
    num_compared = 0
    for row, (value, scores) in enumerate(zip(values, logits, strict=True)):
        want = oracle(value, scores[None])
        around = [
            oracle(value * factor, scores[None].double() * scale)
            for factor in (1 - 1e-5, 1 + 1e-5)
            for scale in (1 - 1e-6, 1 + 1e-6)
        ]
        steady = all(kept(other[0]) == kept(want[0]) for other in around)
        if row != 17 and steady and len(scores.unique()) == vocab_size:
            torch.testing.assert_close(got[row], want[0], rtol=0, atol=0)
            num_compared += 1
    assert num_compared > 200


def apply_beside(
    stage: type[Stage], specs: Sequence[Spec], logits: Tensor, beside: Beside
) -> Tensor:
    """What a stage makes of these sequences' rows, with what is beside them, all in one batch."""
    lanes, lane_ids = lanes_for(specs, logits.shape[1])
    one = stage(lanes)
    assert isinstance(one, Transform)
    for lane, spec in zip(lane_ids, specs, strict=True):
        place(lanes, lane, spec, one)
    return one.apply(logits.clone(), replace(rows_of(specs, lane_ids), beside=beside))


def companions(logits: Tensor, of: Sequence[int] | None = None) -> Beside:
    """Companions' logits [c, V], and which row has which; -1: none."""
    return Beside(companions=logits, companion_of=torch.tensor(of or range(len(logits))))
