"""Entropix: which regime a row is in, what each of them does, and the token put in once."""

import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import LogprobsMode
from engine.errors import InvalidRequest
from engine.lanes import Lanes
from engine.logits import STAGES
from engine.logits.pipeline import Pipeline
from engine.numerics import NEG_INF
from engine.sampler import Sampler, Samples
from engine.tokenizer import Tokenizer
from engine.types import Beside
from tests.support import tiny
from tests.support.engines import request, run, scripted_core
from tests.support.logits import (
    Spec,
    likeliest,
    new_lanes,
    place,
    random_rows,
    rows_of,
    softmax,
)
from tests.support.scripted import ScriptedModel

ATTENTION = (2.0, 0.5, 0.1, 1.5)  # entropy, its variance, agreement, interaction
NOTHING = (0.0, 0.0, 0.0, 0.0)
FLAT = [1 / 64] * 64
SURE = [0.9999, *[0.0001 / 63] * 63]
FORKED = [0.75, *[0.25 / 16384] * 16384]
WILD = [0.3, *[0.7 / 16384] * 16384]
PLAIN = [0.5, 0.25, 0.125, 0.125]
CLARIFY = 5
HEAD = {"profile": "head"}


# -- the formulas, in float64, one row at a time


@dataclass(frozen=True)
class Setting:
    """How a row is sampled."""

    regime: str
    temperature: float
    top_p: float
    top_k: int
    min_p: float


def moments(probs: list[float]) -> tuple[float, float]:
    """Entropy in bits and varentropy in bits²."""
    entropy = -math.fsum(p * math.log2(p) for p in probs if p > 0)
    return entropy, math.fsum(p * (math.log2(p) + entropy) ** 2 for p in probs if p > 0)


def thresholds(given: dict[str, Any]) -> dict[str, float]:
    """In bits, those of the profile where none are given."""
    late = given.get("profile") == "head"
    names = ("low_ent", "med_ent", "high_ent", "low_vent", "high_vent")
    defaults = (0.3, 1.2, 2.5, 1.2, 2.5) if late else (0.1, 3.0, 5.0, 0.1, 5.0)
    bits = {name: given.get(name, default) for name, default in zip(names, defaults, strict=True)}
    for name in names if late else ():
        bits[name] /= math.log(2) ** (1 if name.endswith("_ent") else 2)
    return bits


def setting(
    given: dict[str, Any], entropy: float, varentropy: float, attention: tuple[float, ...]
) -> Setting:
    """The regime of a row and the numbers it is sampled with."""
    its = thresholds(given)
    warmth, top_p = given.get("temperature", 0.666), given.get("top_p", 0.9)
    top_k, min_p = given.get("top_k", 27), given.get("min_p", 0.03)
    spread, variance, agreement, interaction = attention
    if entropy < its["low_ent"] and varentropy < its["low_vent"]:
        return Setting("sure", 1.0, 1.0, 1, 0.0)
    if entropy > its["high_ent"] and varentropy < its["low_vent"]:
        return Setting("lost", min(1.5, warmth * (1.3 + 0.2 * spread)), top_p, top_k, min_p)
    if entropy < its["high_ent"] and varentropy > its["high_vent"]:
        heat = min(1.5, warmth * (1.2 + 0.3 * interaction))
        wider = max(5, int(top_k * (1 + 0.5 * (1 - agreement))))
        return Setting("forked", heat, top_p, wider, min_p)
    if entropy > its["med_ent"] and varentropy > its["high_vent"]:
        heat = max(2.0, warmth * (2.0 + 0.5 * variance))
        return Setting("wild", heat, max(0.5, top_p - 0.2 * spread), top_k, min_p)
    both = entropy + varentropy
    heat = 1 + 0.3 * both + 0.2 * (spread + variance) - 0.2 * agreement
    return Setting(
        "other",
        warmth * heat,
        min(max(top_p * (1 + 0.1 * variance), 0.1), 1.0),
        min(max(round(top_k * (1 + 0.3 * interaction - 0.2 * agreement)), 1), 100),
        min(max(min_p * (1 - 0.5 * both), 0.01), 0.5),
    )


def survivors(probs: list[float], one: Setting) -> dict[int, float]:
    """The tokens left and their probabilities: min-p, then top-k, then top-p."""
    heated = [p ** (1 / one.temperature) for p in probs]
    ranks = likeliest(heated)
    ranks = [i for i in ranks if heated[i] >= one.min_p * heated[ranks[0]]][: one.top_k]
    total, above, left = math.fsum(heated[i] for i in ranks), 0.0, []
    for token in ranks:
        if left and above >= one.top_p:
            break
        left.append(token)
        above += heated[token] / total
    total = math.fsum(heated[i] for i in left)
    return {token: heated[token] / total for token in left}


# -- through the sampler


@dataclass
class Run:
    """Sequences that draw from given rows, and what was left of these."""

    specs: list[Spec]
    attention: list[tuple[float, ...]]
    lane_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lanes: Lanes = new_lanes(len(self.specs) + 1, 64)
        pipeline = Pipeline(STAGES, self.lanes)
        self.sampler = Sampler(self.lanes, pipeline, LogprobsMode.PROCESSED_LOGITS)
        self.lane_ids = [self.lanes.take() for _ in self.specs]
        for lane, spec in zip(self.lane_ids, self.specs, strict=True):
            place(self.lanes, lane, spec, self.sampler)

    def step(self, logits: Tensor) -> Samples:
        """Draw, and put what was drawn behind each sequence."""
        rows = replace(
            rows_of(self.specs, self.lane_ids),
            beside=Beside(attention=torch.tensor(self.attention)),
        )
        samples = self.sampler(logits, rows)
        positions = [len(spec.tokens) for spec in self.specs]
        self.lanes.append(self.lane_ids, positions, samples.token_ids)
        self.specs = [
            replace(spec, output=[*spec.output, token])
            for spec, token in zip(self.specs, samples.token_ids, strict=True)
        ]
        return samples


def asking(params: dict[str, Any], **others: Any) -> Spec:
    token = {"clarify_token": params["clarify_token"]} if "clarify_token" in params else {}
    return Spec({"entropix": params | token} | others, logprobs=200)


def left_of(
    probs: list[float], given: dict[str, Any], attention: tuple[float, ...] = ATTENTION
) -> dict[int, float]:
    """The logits, divided by the temperature, of the tokens left of one row."""
    one = Run([asking(given)], [attention])
    _, listed = one.step(torch.tensor([probs]).log()).logprobs[0]
    return {token: logit for token, logit in listed if logit > NEG_INF}


def assert_sampled_as(
    probs: list[float], given: dict[str, Any], want: Setting, attention: tuple[float, ...]
) -> None:
    """The row keeps the tokens that these numbers keep, divided by this temperature."""
    got = left_of(probs, given, attention)
    kept = sorted(survivors(probs, want))[:200]
    assert sorted(got) == kept
    logits = torch.tensor(probs).log().tolist()
    for token, logit in got.items():
        assert logit == pytest.approx(logits[token] / want.temperature, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("probs", "entropy", "varentropy", "regime"),
    [
        ([0.999, 0.0005, 0.0005], 0.012408, 0.120097, "other"),
        (FLAT, 6.0, 0.0, "lost"),
        (FORKED, 4.311278, 45.542073, "forked"),
        (WILD, 10.681291, 34.286124, "wild"),
        (PLAIN, 1.75, 0.6875, "other"),
        (SURE, None, None, "sure"),
    ],
)
def test_worked_rows_are_in_their_regimes(
    probs: list[float], entropy: float | None, varentropy: float | None, regime: str
) -> None:
    own = moments(probs)
    if entropy is not None:
        assert own == pytest.approx((entropy, varentropy), abs=1e-6)
    want = setting({}, *own, ATTENTION)
    assert want.regime == regime
    assert_sampled_as(probs, {}, want, ATTENTION)


@pytest.mark.parametrize(
    ("probs", "attention", "want"),
    [
        (PLAIN, ATTENTION, Setting("other", 1.472693, 0.945, 39, 0.01)),
        (FLAT, (3.0, 0.0, 0.0, 0.0), Setting("lost", 1.2654, 0.9, 27, 0.03)),
        (FORKED, (0.0, 0.0, 0.1, 2.0), Setting("forked", 1.1988, 0.9, 39, 0.03)),
        (FLAT, (20.0, 0.0, 0.0, 0.0), Setting("lost", 1.5, 0.9, 27, 0.03)),
        (FORKED, (0.0, 0.0, 3.0, 9.0), Setting("forked", 1.5, 0.9, 5, 0.03)),
        (WILD, (3.0, 1.0, 0.0, 0.0), Setting("wild", 2.0, 0.5, 27, 0.03)),
        (WILD, (1.0, 4.0, 0.0, 0.0), Setting("wild", 2.664, 0.7, 27, 0.03)),
        (PLAIN, (0.0, 9.0, 0.0, -9.0), Setting("other", 2.3518125, 1.0, 1, 0.01)),
    ],
)
def test_worked_numbers_of_each_regime(
    probs: list[float], attention: tuple[float, ...], want: Setting
) -> None:
    got = setting({}, *moments(probs), attention)
    assert replace(got, temperature=want.temperature, top_p=want.top_p) == want
    assert (got.temperature, got.top_p) == pytest.approx((want.temperature, want.top_p), abs=1e-6)
    assert_sampled_as(probs, {}, want, attention)


@pytest.mark.parametrize("vocab_size", [5, 97, 700])
@pytest.mark.parametrize("profile", ["2024-10-07", "head"])
def test_each_row_matches_the_formulas_at_its_own_numbers(profile: str, vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    logits = random_rows(160, vocab_size, seed=3)
    params, attention = [], []
    for row in range(len(logits)):
        own = moments(softmax(logits[row]))
        # In the profile's units; around the row's own numbers, so that all regimes occur.
        unit = math.log(2) if profile == "head" else 1.0
        near = {
            name: rng.choice([0.3, 0.8, 1.25, 3.0]) * own[index] * unit ** (index + 1)
            for index, names in enumerate((("low_ent", "med_ent", "high_ent"), ("low_vent",)))
            for name in names
        }
        near["high_vent"] = rng.choice([0.3, 0.8, 1.25, 3.0]) * own[1] * unit**2
        given = {"profile": profile, "temperature": rng.choice([0.3, 0.666, 1.7])} | near
        given |= {"top_p": rng.choice([0.5, 0.9, 1.0]), "top_k": rng.choice([1, 9, 27, 100])}
        params.append(given | {"min_p": rng.choice([0.0, 0.03, 0.4])})
        late = profile == "head"
        attention.append(NOTHING if late else tuple(rng.uniform(0, 3) for _ in range(4)))

    some = Run([asking(one) for one in params], attention)
    samples = some.step(logits)

    seen: Counter[str] = Counter()
    for row, given in enumerate(params):
        probs = softmax(logits[row])
        want = setting(given, *moments(probs), attention[row])
        variants = (
            replace(want, top_p=want.top_p * factor, min_p=want.min_p / factor)
            for factor in (1 - 1e-5, 1 + 1e-5)
        )
        left = survivors(probs, want)
        if any(survivors(probs, other).keys() != left.keys() for other in variants):
            continue  # hangs on rounding
        listed = dict(samples.logprobs[row][1])
        assert {i for i, logit in listed.items() if logit > NEG_INF} == left.keys(), (row, want)
        assert samples.token_ids[row] in left
        for token in left:
            scaled = float(logits[row, token]) / want.temperature
            assert listed[token] == pytest.approx(scaled, rel=1e-5, abs=1e-5)
        seen[want.regime] += 1
    assert seen.total() > 130
    assert min(seen[name] for name in ("sure", "lost", "forked", "wild", "other")) > 5


@pytest.mark.parametrize(
    ("name", "value", "probs", "before", "after"),
    [
        ("low_ent", 0.001, SURE, "sure", "other"),
        ("low_vent", 0.001, SURE, "sure", "other"),
        ("low_vent", 1.0, [0.999, 0.0005, 0.0005], "other", "sure"),
        ("high_ent", 7.0, FLAT, "lost", "other"),
        ("high_ent", 4.0, FORKED, "forked", "wild"),
        ("high_vent", 50.0, FORKED, "forked", "other"),
        ("med_ent", 12.0, WILD, "wild", "other"),
    ],
)
def test_a_threshold_of_the_request_moves_the_border(
    name: str, value: float, probs: list[float], before: str, after: str
) -> None:
    for given, regime in (({}, before), ({name: value}, after)):
        want = setting(given, *moments(probs), ATTENTION)
        assert want.regime == regime
        assert_sampled_as(probs, given, want, ATTENTION)


def test_the_later_profile_has_its_own_thresholds_in_nats() -> None:
    """Rows between what the thresholds would be in nats and in bits."""
    entropy_of = {32: 3.4657, 8: 2.0794}  # nats
    for size, entropy in entropy_of.items():
        own = moments([1 / size] * size)
        assert own[0] * math.log(2) == pytest.approx(entropy, abs=1e-4)
        want = setting(HEAD, *own, NOTHING)
        assert want.regime == ("lost" if entropy > 2.5 else "other")
        assert_sampled_as([1 / size] * size, HEAD, want, NOTHING)
    probs = [0.94, 0.03, 0.03]  # 0.27 nats, 0.39 bits; 0.68 nats², 1.42 bits²
    want = setting(HEAD, *moments(probs), NOTHING)
    assert want.regime == "sure"
    assert_sampled_as(probs, HEAD, want, NOTHING)


# -- what the regime is decided by, and what is drawn from


def test_the_regime_is_the_model_s_own_and_the_draw_is_of_what_penalties_leave() -> None:
    probs = [0.9999, *[0.0001 / 63] * 63]
    params = {"entropix": {}, "logit_bias": {"0": -100.0}}
    one = Run([Spec(params, logprobs=64)], [ATTENTION])
    samples = one.step(torch.tensor([probs]).log())
    # Still sure, as the model was: the likeliest of the rest.
    assert samples.token_ids == [1]
    assert [i for i, logit in samples.logprobs[0][1] if logit > NEG_INF] == [1]
    # Flat again once the only candidate is gone: as the model was not, so nothing is put in.
    flat = {"entropix": {"clarify_token": CLARIFY}, "allowed_token_ids": [*range(1, 64)]}
    one = Run([Spec(flat)], [ATTENTION])
    assert one.step(torch.tensor([probs]).log()).token_ids == [1]


def test_only_its_own_rows_are_touched() -> None:
    logits = random_rows(4, 700)
    specs = [asking({}), Spec(logprobs=700), Spec({"temperature": 0.0}), Spec(logprobs=700)]
    some = Run(specs, [ATTENTION] * 4)
    samples = some.step(logits)
    for row in (1, 3):
        listed = dict(samples.logprobs[row][1])
        assert torch.tensor([listed[i] for i in range(700)]).equal(logits[row])
    assert samples.token_ids[2] == int(logits[2].argmax())


# -- the token that is put in


def drawn(one: Run, rows: list[list[float]]) -> list[int]:
    return [one.step(torch.tensor([row]).log()).token_ids[0] for row in rows]


def test_a_lost_row_gets_the_clarify_token_once_and_then_draws_warmer() -> None:
    one = Run([asking({"clarify_token": CLARIFY})], [ATTENTION])
    logits = torch.tensor([FLAT]).log()
    first = one.step(logits)
    assert first.token_ids == [CLARIFY]
    assert [i for i, logit in first.logprobs[0][1] if logit > NEG_INF] == [CLARIFY]
    second = one.step(logits)
    want = setting({}, 6.0, 0.0, ATTENTION)
    assert want.regime == "lost"
    listed = {i: logit for i, logit in second.logprobs[0][1] if logit > NEG_INF}
    assert sorted(listed) == sorted(survivors(FLAT, want))
    scaled = [math.log(1 / 64) / want.temperature] * len(listed)
    assert list(listed.values()) == pytest.approx(scaled, rel=1e-5)


@pytest.mark.parametrize(
    ("params", "prompt", "output", "want"),
    [
        ({}, (1, 2), (), True),
        ({}, (1, CLARIFY), (), True),  # what is in the prompt was not put in
        ({}, (1,), (3, 4), True),
        ({}, (1,), (CLARIFY,), False),
        ({}, (1,), (CLARIFY, 3, 3), False),  # not right behind it either: never again
        (HEAD, (1,), (CLARIFY,), True),  # the later profile does not look back
        (HEAD, (1,), (3, CLARIFY, CLARIFY), True),
    ],
)
def test_it_is_put_in_once_for_a_generation(
    params: dict[str, Any], prompt: tuple[int, ...], output: tuple[int, ...], want: bool
) -> None:
    spec = replace(asking(params | {"clarify_token": CLARIFY}), prompt=prompt, output=output)
    attention = NOTHING if params == HEAD else ATTENTION
    tokens = {
        Run([replace(spec, seed=seed)], [attention]).step(torch.tensor([FLAT]).log()).token_ids[0]
        for seed in range(20)
    }
    assert (tokens == {CLARIFY}) == want
    assert want or len(tokens) > 5


def test_it_is_put_in_though_it_is_no_candidate_but_not_where_it_is_banned() -> None:
    row = torch.zeros(1, 700)
    row[0, 600:] = -3.0
    wide = {"low_vent": 9.0, "high_vent": 10.0}
    for token in (CLARIFY, 650):
        one = Run([asking({"clarify_token": token} | wide)], [ATTENTION])
        assert one.step(row).token_ids == [token]
        banned = row.clone()
        banned[0, token] = NEG_INF
        one = Run([asking({"clarify_token": token} | wide)], [ATTENTION])
        (left,) = one.step(banned).token_ids
        assert left != token
        assert left < 600
    params: dict[str, Any] = {"entropix": {"clarify_token": CLARIFY} | wide}
    params |= {"logit_bias": {str(CLARIFY): -100.0}}
    assert Run([Spec(params)], [ATTENTION]).step(row).token_ids == [CLARIFY]
    params |= {"allowed_token_ids": [*range(6, 700)]}
    assert Run([Spec(params)], [ATTENTION]).step(row).token_ids != [CLARIFY]


def test_without_a_clarify_token_a_lost_row_draws_warmer() -> None:
    want = setting({}, 6.0, 0.0, ATTENTION)
    assert_sampled_as(FLAT, {}, want, ATTENTION)
    one = Run([asking({})], [ATTENTION])
    assert len(set(drawn(one, [FLAT] * 30))) > 5


# -- several draws


def shares(probs: list[float], given: dict[str, Any], attention: tuple[float, ...]) -> Counter[int]:
    """How often each token is drawn, by many seeds."""
    specs = [Spec({"entropix": given}, seed=seed) for seed in range(1500)]
    some = Run(specs, [attention] * len(specs))
    return Counter(some.step(torch.tensor([probs] * len(specs)).log()).token_ids)


def assert_follows(counts: Counter[int], want: dict[int, float]) -> None:
    assert counts.keys() <= want.keys()
    for token, prob in want.items():
        spread = math.sqrt(counts.total() * prob * (1 - prob))
        assert abs(counts[token] - counts.total() * prob) < 4.5 * spread + 1, token


def test_where_nothing_stands_out_the_likeliest_of_five_independent_draws_counts() -> None:
    probs = [0.3, 0.22, 0.2, 0.15, 0.08, 0.05]
    one = setting({"temperature": 1.2}, *moments(probs), NOTHING)
    left = survivors(probs, one)
    assert (one.regime, len(left)) == ("other", 6)
    want, above = {}, 0.0
    for token, prob in left.items():  # none of the draws is likelier, one is it
        want[token] = (1 - above) ** 5 - (1 - above - prob) ** 5
        above += prob
    assert want[0] > 2 * left[0]
    assert_follows(shares(probs, {"temperature": 1.2}, NOTHING), want)


def test_a_row_torn_apart_draws_once_and_in_the_later_profile_never_the_first_draw() -> None:
    probs = [0.5, 0.3, 0.1, *[0.1 / 40] * 40]
    given = {"med_ent": 0.5, "high_ent": 0.6, "high_vent": 1.0, "top_k": 3, "top_p": 1.0}
    early = setting(given, *moments(probs), NOTHING)
    assert early.regime == "wild"
    once = survivors(probs, early)
    assert_follows(shares(probs, given, NOTHING), once)
    late = setting(given | HEAD, *moments(probs), NOTHING)
    assert late.regime == "wild"
    left = survivors(probs, late)
    again = {
        token: math.fsum(left[first] * prob / (1 - left[first]) for first in left if first != token)
        for token, prob in left.items()
    }
    assert len(left) == 3
    assert_follows(shares(probs, given | HEAD, NOTHING), again)


def test_a_second_draw_needs_a_second_token() -> None:
    given = HEAD | {"med_ent": 0.5, "high_ent": 0.6, "high_vent": 1.0, "top_k": 1}
    probs = [0.5, 0.3, 0.1, *[0.1 / 40] * 40]
    assert setting(given, *moments(probs), NOTHING).regime == "wild"
    assert drawn(Run([asking(given)], [NOTHING]), [probs] * 5) == [0] * 5


@pytest.mark.parametrize("given", [{}, HEAD])
def test_a_draw_does_not_depend_on_the_rows_beside_it(given: dict[str, Any]) -> None:
    logits = random_rows(40, 300)
    specs = [replace(asking(given | {"clarify_token": CLARIFY}), seed=row) for row in range(40)]
    specs[::5] = [Spec({"top_p": 0.9}, seed=row) for row in range(0, 40, 5)]
    attention = [ATTENTION] * 40
    together = Run(specs, attention).step(logits).token_ids
    for row in range(40):
        alone = Run([specs[row]], [ATTENTION]).step(logits[row, None])
        assert alone.token_ids == [together[row]]


# -- in the engine


def test_the_token_put_in_is_one_of_the_text_like_any_other(tokenizer: Tokenizer) -> None:
    vocab_size = 100
    model = ScriptedModel(lambda _token, _position: torch.zeros(vocab_size), vocab_size=vocab_size)
    core = scripted_core(model, tokenizer)
    options: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "temperature": 1.0, "seed": 4}
    one = request(core, [5, 6], entropix=HEAD | {"clarify_token": "t"}, logprobs=1, **options)
    results = run(core, one)
    (token,) = tokenizer.encode("t", add_special_tokens=False)
    assert one.clarify_token == token
    assert results.ids() == [token] * 12
    assert results.text() == "t" * 12
    # Its logprob is that of the model's own row.
    logprobs = [given.logprob for given in results.choices["r", 0].tokens]
    assert logprobs == pytest.approx([-math.log(vocab_size)] * 12, abs=1e-5)


def test_the_clarify_token_is_one_token_given_by_id_or_text(tokenizer: Tokenizer) -> None:
    core = scripted_core(ScriptedModel(), tokenizer)
    (token,) = tokenizer.encode("t", add_special_tokens=False)
    options: dict[str, Any] = {"temperature": 1.0}
    for given in ("t", token):
        one = request(core, [5], entropix={"clarify_token": given}, **options)
        assert one.clarify_token == token
    # Three dots behind a space, where they are one token: here they are four.
    assert request(core, [5], entropix={}, **options).clarify_token is None
    assert request(core, [5], **options).clarify_token is None
    for bad in ("to be", tokenizer.size):
        with pytest.raises(InvalidRequest) as refusal:
            request(core, [5], entropix={"clarify_token": bad}, **options)
        assert refusal.value.param == "entropix.clarify_token"


class Dots(Tokenizer):
    """One whose three dots are one token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [77] if text == " ..." else super().encode(text, add_special_tokens)


def test_by_default_it_is_three_dots_behind_a_space(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    core = scripted_core(ScriptedModel(), Dots(tmp_path))
    assert request(core, [5], entropix={}, temperature=1.0).clarify_token == 77
