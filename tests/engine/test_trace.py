"""Traces: every number against float64 loops, and tokens that do not change."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import LogprobsMode
from engine.core import EngineCore
from engine.logits import ORDERS, STAGES
from engine.logits.pipeline import Pipeline
from engine.messages import Probability, StageTrace, TokenTrace, TraceWish
from engine.rng import derive
from engine.sampler import Sampler, Samples
from engine.tokenizer import Tokenizer
from engine.types import Beside
from tests.support import tiny
from tests.support.engines import (
    Results,
    assert_all_free,
    request,
    run,
    scripted_core,
    tiny_core,
)
from tests.support.logits import (
    DIST_P,
    ROW_A,
    Spec,
    entropy,
    likeliest,
    new_lanes,
    place,
    random_rows,
    rows_of,
)
from tests.support.scripted import ScriptedModel, constant

WISH = TraceWish(top=7)
GONE = -math.inf
Row = list[float]


# -- the stages, as loops over one row


def softmax(row: Row) -> Row:
    top = max(row)
    weights = [math.exp(z - top) for z in row]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def only(row: Row, left: Sequence[int]) -> Row:
    return [z if i in set(left) else GONE for i, z in enumerate(row)]


def penalties(row: Row, spec: Spec) -> Row:
    out = list(row)
    params = spec.params
    for i in set(spec.tokens):
        factor = params.get("repetition_penalty", 1.0)
        out[i] = out[i] * factor if out[i] < 0 else out[i] / factor
    for i in set(spec.output):
        out[i] -= params.get("frequency_penalty", 0.0) * list(spec.output).count(i)
        out[i] -= params.get("presence_penalty", 0.0)
    return out


def logit_bias(row: Row, spec: Spec) -> Row:
    return [z + spec.params["logit_bias"].get(str(i), 0.0) for i, z in enumerate(row)]


def allowed_tokens(row: Row, spec: Spec) -> Row:
    return only(row, spec.params["allowed_token_ids"])


def no_repeat_ngram(row: Row, spec: Spec) -> Row:
    tokens = spec.tokens
    banned = {b for a, b in pairwise(tokens) if a == tokens[-1]}
    return [GONE if i in banned else z for i, z in enumerate(row)]


def top_n_sigma(row: Row, spec: Spec) -> Row:
    finite = [z for z in row if z > GONE]
    mean = math.fsum(finite) / len(finite)
    sigma = math.sqrt(math.fsum((z - mean) ** 2 for z in finite) / len(finite))
    return [z if z >= max(row) - spec.params["top_n_sigma"] * sigma else GONE for z in row]


def min_p(row: Row, spec: Spec) -> Row:
    probs = softmax(row)
    return [
        z if p >= spec.params["min_p"] * max(probs) else GONE
        for z, p in zip(row, probs, strict=True)
    ]


def top_k(row: Row, spec: Spec) -> Row:
    return only(row, likeliest(softmax(row))[: spec.params["top_k"]])


def top_p(row: Row, spec: Spec) -> Row:
    probs, above, left = softmax(row), 0.0, []
    for i in likeliest(probs):
        if not left or above < spec.params["top_p"]:
            left.append(i)
        above += probs[i]
    return only(row, left)


def typical_p(row: Row, spec: Spec) -> Row:
    probs, mass, left = softmax(row), 0.0, []
    mean = entropy(probs)
    for i in sorted(likeliest(probs), key=lambda i: abs(-math.log(probs[i]) - mean)):
        if not left or mass < spec.params["typical_p"]:
            left.append(i)
        mass += probs[i]
    return only(row, left)


Loop = Callable[[Row, Spec], Row]
LOOPS: dict[str, Loop] = {
    one.__name__: one
    for one in (
        logit_bias,
        penalties,
        allowed_tokens,
        no_repeat_ngram,
        top_n_sigma,
        min_p,
        top_k,
        typical_p,
        top_p,
    )
}


def temperature(row: Row, spec: Spec) -> Row:
    return [z / spec.params["temperature"] for z in row]


LOOPS["temperature"] = temperature


@dataclass
class Walk:
    """What a trace should hold of one row."""

    stages: list[StageTrace]
    before: Row  # probabilities
    after: Row
    scaled: Row


def walk(names: Sequence[str], row: Row, spec: Spec) -> Walk:
    """Run the stages one after the other and note those that acted."""
    noted, raw = [], row
    for name in names:
        after = LOOPS[name](row, spec)
        probs = softmax(row)
        removed = math.fsum(p for p, z in zip(probs, after, strict=True) if z == GONE)
        count = sum(z > GONE for z in after)
        warmed = name == "temperature"
        if count != sum(z > GONE for z in row) or warmed or (name in TRANSFORMS and after != row):
            noted.append(StageTrace(name, count, removed))
        row = after
    return Walk(noted, softmax(raw), softmax(row), row)


TRANSFORMS = ("logit_bias", "penalties", "allowed_tokens", "no_repeat_ngram")
PIPELINES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "plain": ([], {}),
    "truncation": (
        ["temperature", "min_p", "top_k", "top_p"],
        {"temperature": 0.8, "min_p": 0.01, "top_k": 12, "top_p": 0.85},
    ),
    "hf order": (
        ["temperature", "top_k", "top_p", "min_p", "typical_p"],
        {
            "temperature": 1.4,
            "min_p": 0.02,
            "top_k": 30,
            "top_p": 0.9,
            "typical_p": 0.9,
            "sampler_order": "hf",
        },
    ),
    "llama.cpp order": (
        ["top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "temperature"],
        {
            "temperature": 0.7,
            "top_n_sigma": 2.5,
            "min_p": 0.02,
            "top_k": 30,
            "top_p": 0.9,
            "typical_p": 0.95,
            "sampler_order": "llama.cpp",
        },
    ),
    "penalties": (
        ["logit_bias", "penalties", "no_repeat_ngram", "temperature"],
        {
            "logit_bias": {"3": 2.0, "4": -1.0},
            "repetition_penalty": 1.3,
            "frequency_penalty": 0.4,
            "presence_penalty": -0.2,
            "no_repeat_ngram_size": 2,
            "temperature": 1.2,
        },
    ),
    "a list of tokens": (
        ["allowed_tokens", "top_p"],
        {"allowed_token_ids": [*range(2, 48, 3)], "top_p": 0.8},
    ),
    "a cut tail": (["min_p"], {"min_p": 0.0005}),
    "nearly all": (["top_k"], {"top_k": 690}),
    "greedy": (
        ["penalties"],
        {"temperature": 0.0, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "top_k": 3},
    ),
}


def sampled(
    specs: Sequence[Spec],
    logits: Tensor,
    traced: Sequence[bool],
    attention: Tensor | None = None,
    forced: int | None = None,
) -> Samples:
    """One step of all sequences together."""
    lanes = new_lanes(len(specs) + 1, 64)
    sampler = Sampler(lanes, Pipeline(STAGES, lanes, ORDERS), LogprobsMode.RAW_LOGPROBS)
    lane_ids = [lanes.take() for _ in specs]
    for lane, spec, wanted in zip(lane_ids, specs, traced, strict=True):
        place(lanes, lane, spec)
        sampler.admit(lane, replace(spec.request, trace=WISH if wanted else None))
    rows = rows_of(specs, lane_ids)
    if attention is not None:
        rows = replace(rows, beside=Beside(attention=attention))
    return sampler(logits.clone(), rows, forced)  # which it may overwrite


def assert_traced(
    trace: TokenTrace, token: int, names: Sequence[str], row: Row, spec: Spec
) -> None:
    want = walk(names, row, spec)
    greedy = spec.request.params.greedy
    own = entropy(want.before)
    spread = math.fsum(p * (math.log(p) + own) ** 2 for p in want.before if p > 0)
    assert (trace.entropy, trace.varentropy) == pytest.approx((own, spread), rel=1e-5, abs=1e-6)
    warmth = spec.params.get("temperature", 1.0)
    assert trace.temperature == pytest.approx(warmth, rel=1e-6)
    assert [(one.stage, one.candidates) for one in trace.stages] == [
        (one.stage, one.candidates) for one in want.stages
    ]
    removed = [one.removed for one in trace.stages]
    assert removed == pytest.approx([one.removed for one in want.stages], rel=1e-4, abs=1e-6)
    for listed, probs in ((trace.before, want.before), (trace.after, want.after)):
        expected = likeliest(probs)[: WISH.top]
        assert [one.token_id for one in listed] == expected
        assert [one.prob for one in listed] == pytest.approx([probs[i] for i in expected], rel=1e-4)
    assert trace.rank == 1 + sum(p > want.before[token] for p in want.before)
    assert trace.prob_before == pytest.approx(want.before[token], rel=1e-4)
    if greedy:
        assert (trace.prob_after, trace.uniform) == (1.0, None)
        assert token == likeliest(want.after)[0]
        return
    assert trace.prob_after == pytest.approx(want.after[token], rel=1e-4)
    if sum(p > 0 for p in want.after) <= 256:
        sums = [z + gumbel(noise(spec, i)) for i, z in enumerate(want.scaled)]
        assert token == max(range(len(sums)), key=sums.__getitem__)
    assert trace.uniform == noise(spec, token)


def noise(spec: Spec, token: int, domain: int = 0) -> float:
    """MurmurHash3 of seed, position and token, as a number between 0 and 1."""
    mask, h = 0xFFFFFFFF, domain
    words = (spec.seed & mask, spec.seed >> 32 & mask, len(spec.tokens) - 1, token)
    for word in words:
        k = word * 0xCC9E2D51 & mask
        k = (k << 15 | k >> 17) & mask
        h ^= k * 0x1B873593 & mask
        h = (h << 13 | h >> 19) & mask
        h = (h * 5 + 0xE6546B64) & mask
    h ^= 16
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    return float(((h ^ h >> 16) + 0.5) / 2**32)


def gumbel(u: float) -> float:
    return -math.log(-math.log1p(-u))


@pytest.mark.parametrize("vocab_size", [50, 700])
def test_every_number_is_that_of_a_loop_over_the_stages(vocab_size: int) -> None:
    """Rows of all pipelines in one batch, every third of them not traced."""
    rng = random.Random(vocab_size)
    logits = 1.5 * random_rows(len(PIPELINES) * 8, vocab_size, seed=2)
    rows = [(name, *PIPELINES[name]) for name in PIPELINES for _ in range(8)]
    specs = [
        Spec(
            params,
            [rng.randrange(3, 10) for _ in range(rng.randint(1, 6))],
            [rng.randrange(3, 10) for _ in range(rng.randint(0, 6))],
            seed=rng.randrange(-(2**63), 2**63),
        )
        for _, _, params in rows
    ]
    traced = [row % 3 != 1 for row in range(len(rows))]

    samples = sampled(specs, logits, traced)

    assert samples.traces.keys() == {row for row, wanted in enumerate(traced) if wanted}
    assert sampled(specs, logits, [False] * len(rows)).token_ids == samples.token_ids
    acted = 0
    for row, trace in samples.traces.items():
        names = rows[row][1]
        assert_traced(trace, samples.token_ids[row], names, logits[row].tolist(), specs[row])
        acted += sum(one.removed > 0.01 for one in trace.stages)
    assert acted > 40


@pytest.mark.parametrize(
    ("seed", "position", "token", "uniform"),
    [(42, 7, 0, 0.398906), (42, 8, 1, 0.320610), (0, 0, 1, 0.002335), (-1, 7, 1, 0.037357)],
)
def test_worked_draws_and_their_uniforms(
    seed: int, position: int, token: int, uniform: float
) -> None:
    spec = Spec(prompt=[1] * (position + 1), seed=seed)
    samples = sampled([spec], ROW_A[None], [True])
    trace = samples.traces[0]
    assert samples.token_ids == [token]
    assert trace.uniform == pytest.approx(uniform, abs=1e-6)
    assert trace.entropy == pytest.approx(0.999973, abs=1e-6)
    assert trace.rank == token + 1
    prob = pytest.approx((0.636409, 0.234122)[token], abs=1e-6)
    assert (trace.prob_before, trace.prob_after) == (prob, prob)


def test_the_worked_distribution_can_be_followed_by_hand() -> None:
    spec = Spec({"temperature": 2.0, "min_p": 0.3})
    trace = sampled([spec], DIST_P[None], [True]).traces[0]
    assert (trace.entropy, trace.varentropy) == pytest.approx((1.392321, 0.350912), abs=1e-6)
    assert trace.temperature == 2.0
    # At twice the temperature .05 has sqrt(.125) = .35 of the likeliest: nothing goes.
    assert trace.stages == (StageTrace("temperature", 5, 0.0),)
    spec = Spec({"temperature": 2.0, "min_p": 0.3, "sampler_order": "llama.cpp"})
    trace = sampled([spec], DIST_P[None], [True]).traces[0]
    assert [(one.stage, one.candidates) for one in trace.stages] == [
        ("min_p", 3),
        ("temperature", 3),
    ]
    assert [one.removed for one in trace.stages] == pytest.approx([0.15, 0.0], abs=1e-6)
    assert [(one.token_id, one.prob) for one in trace.before] == [
        (i, pytest.approx(p)) for i, p in enumerate((0.4, 0.3, 0.15, 0.1, 0.05))
    ]
    roots = [math.sqrt(p) for p in (0.4, 0.3, 0.15)]
    assert [(one.token_id, one.prob) for one in trace.after] == [
        (i, pytest.approx(root / sum(roots))) for i, root in enumerate(roots)
    ]


def test_soft_bans_that_are_lifted_did_nothing() -> None:
    params = {"allowed_token_ids": [4], "no_repeat_ngram_size": 1}
    trace = sampled([Spec(params, [4, 4])], torch.zeros(1, 9), [True]).traces[0]
    assert trace.stages == (StageTrace("allowed_tokens", 1, pytest.approx(8 / 9)),)
    assert trace.after == (Probability(4, 1.0),)


def test_a_temperature_near_0_leaves_one_token() -> None:
    logits = random_rows(8, 700)
    specs = [Spec({"temperature": 2e-5}, seed=row) for row in range(8)]
    samples = sampled(specs, logits, [True] * 8)
    for row, trace in samples.traces.items():
        assert samples.token_ids[row] == int(logits[row].argmax())
        assert trace.after == (Probability(samples.token_ids[row], 1.0),)
        assert (trace.rank, trace.prob_after) == (1, 1.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forced_token_has_the_probability_that_it_had(temperature: float) -> None:
    """As if drawn: 0 where it would not have been left, or was not the likeliest."""
    spec = Spec({"temperature": temperature, "top_k": 2})
    for token in range(5):
        trace = sampled([spec], ROW_A[None], [True], forced=token).traces[0]
        probs = softmax(ROW_A.tolist())
        assert trace.rank == token + 1
        assert trace.prob_before == pytest.approx(probs[token], rel=1e-5)
        left = probs[token] / sum(probs[:2]) if token < 2 else 0.0
        want = float(token == 0) if temperature == 0.0 else left
        assert trace.prob_after == pytest.approx(want, rel=1e-5)


# -- entropix, which warms, filters and draws several times in one stage


@pytest.mark.parametrize("profile", ["2024-10-07", "head"])
def test_entropix_is_one_stage_that_tells_what_it_removed_and_which_draw_counted(
    profile: str,
) -> None:
    logits = random_rows(100, 300, seed=4)
    attention = torch.tensor([[0.5, 0.1, 0.1, 0.5]] * 100)
    given = {"profile": profile, "low_ent": 0.2, "med_ent": 1.0, "high_ent": 2.0}
    given |= {"low_vent": 0.5, "high_vent": 1.0, "clarify_token": 7}
    specs = [Spec({"entropix": given}, seed=row) for row in range(100)]
    samples = sampled(specs, logits, [True] * 100, attention)
    domains = set()
    for row, trace in samples.traces.items():
        token, own = samples.token_ids[row], logits[row].tolist()
        (stage,) = trace.stages
        assert stage.stage == "entropix"
        probs = softmax(own)
        left = [i for i in likeliest(probs) if i != 7 or stage.candidates > 1][: stage.candidates]
        if token == 7 and stage.candidates == 1:
            left = [7]
        assert stage.removed == pytest.approx(1 - sum(probs[i] for i in left), rel=1e-4, abs=1e-6)
        assert [one.token_id for one in trace.after] == left[: WISH.top]
        heated = softmax([own[i] / trace.temperature for i in left])
        assert [one.prob for one in trace.after] == pytest.approx(heated[: WISH.top], rel=1e-4)
        assert trace.prob_after == pytest.approx(heated[left.index(token)], rel=1e-4)
        drawn = {
            domain for domain in range(22) if trace.uniform == noise(specs[row], token, domain)
        }
        (domain,) = drawn
        domains.add(domain)
        sums = {i: own[i] / trace.temperature + gumbel(noise(specs[row], i, domain)) for i in left}
        ranks = sorted(sums, key=lambda i: -sums[i])
        assert token in ranks[: 2 if domain == 16 else 1]  # the second draw is without the first
    assert 0 in domains
    assert domains & set(range(17, 21))
    assert (16 in domains) == (profile == "head")


# -- in the engine


VOCAB = 24
KINDS: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 1.2, "top_p": 0.9, "n": 2},
    "best of": {"best_of": 3, "n": 2},
    "greedy": {"temperature": 0.0, "repetition_penalty": 1.2},
    "mirostat": {"mirostat": 2, "mirostat_tau": 2.0},
    "dry and xtc": {"dry_multiplier": 0.8, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    "beams": {"use_beam_search": True, "beam_width": 3, "n": 2},
    "stochastic beams": {"use_beam_search": True, "beam_width": 3, "stochastic_beams": True},
    "chains of thought": {"cot_branches": 3, "temperature": 0.0},
}


def crowd(tokenizer: Tokenizer, traced: Sequence[str], num_blocks: int = 128) -> Results:
    """All kinds together; some requests ask for traces."""
    model = ScriptedModel(vocab_size=VOCAB, context_len=32, attentive=True)
    core = scripted_core(model, tokenizer, num_blocks=num_blocks)
    requests = [
        request(
            core,
            [5 + index, 6, 7],
            name,
            **{"max_tokens": 12, "temperature": 1.0, "ignore_eos": True, "seed": index} | options,
            trace=WISH if name in traced else None,
        )
        for index, (name, options) in enumerate(KINDS.items())
    ]
    results = run(core, *requests)
    assert not results.failed
    return results


def tokens_of(results: Results) -> dict[tuple[str, int], list[int]]:
    return {key: [token.id for token in delta.tokens] for key, delta in results.choices.items()}


def traces_of(results: Results) -> dict[tuple[str, int], list[TokenTrace | None]]:
    return {key: [token.trace for token in delta.tokens] for key, delta in results.choices.items()}


@pytest.mark.parametrize("some", [[], [*KINDS], [*KINDS][::2], [*KINDS][1::2]])
def test_a_trace_changes_no_token_and_only_those_who_ask_have_one(
    tokenizer: Tokenizer, some: list[str]
) -> None:
    want, got = crowd(tokenizer, []), crowd(tokenizer, some)
    assert tokens_of(got) == tokens_of(want)
    for (name, _), traces in traces_of(got).items():
        assert len(traces) == 12
        assert all((trace is not None) == (name in some) for trace in traces)


def test_a_trace_is_the_same_after_a_preemption(tokenizer: Tokenizer) -> None:
    want, got = crowd(tokenizer, [*KINDS]), crowd(tokenizer, [*KINDS], num_blocks=26)
    assert any(one.num_preemptions for one in got.finished.values())
    assert tokens_of(got) == tokens_of(want)
    assert traces_of(got) == traces_of(want)


def test_a_trace_is_of_its_own_token_and_row(tokenizer: Tokenizer) -> None:
    """Each token's numbers are those of the model's row behind the tokens before it."""
    model = ScriptedModel(vocab_size=VOCAB, context_len=32)
    core = scripted_core(model, tokenizer)
    params: dict[str, Any] = {"temperature": 1.3, "top_k": 9, "frequency_penalty": 0.7}
    one = request(core, [5, 6], max_tokens=20, ignore_eos=True, seed=3, trace=WISH, n=2, **params)
    results = run(core, one)
    for index in range(2):
        tokens = results.choices["r", index].tokens
        ids = [token.id for token in tokens]
        for number, token in enumerate(tokens):
            history = [5, 6, *ids[:number]]
            spec = Spec(params, [5, 6], ids[:number], seed=derive(3, index))
            row = model.script(history[-1], len(history) - 1).tolist()
            assert token.trace is not None
            assert_traced(token.trace, token.id, ["penalties", "temperature", "top_k"], row, spec)


def test_beams_are_traced_as_they_score(tokenizer: Tokenizer) -> None:
    """What was chosen need not be the likeliest of its row."""
    results = crowd(tokenizer, ["beams"])
    ranks = []
    for index in range(2):
        for token in results.choices["beams", index].tokens:
            assert token.trace is not None
            assert (token.trace.temperature, token.trace.uniform) == (0.0, None)
            assert token.trace.prob_after == pytest.approx(token.trace.prob_before, rel=1e-5)
            ranks.append(token.trace.rank)
    assert max(ranks) > 1


def test_lists_are_as_long_as_was_asked_or_as_there_are_tokens(tokenizer: Tokenizer) -> None:
    core = scripted_core(ScriptedModel(constant([0.0] * VOCAB), vocab_size=VOCAB), tokenizer)
    for top in (1, 5, 100):
        wish = TraceWish(top=top)
        results = run(core, request(core, [5], trace=wish, max_tokens=1, temperature=1.0, top_k=4))
        trace = results.choices["r", 0].tokens[0].trace
        assert trace is not None
        assert [one.token_id for one in trace.before] == [*range(min(top, VOCAB))]
        assert [one.token_id for one in trace.after] == [*range(min(top, 4))]
        assert [one.prob for one in trace.after] == [0.25] * min(top, 4)


# -- a text explained as if it had been drawn

WITH_FEEDBACK = {"mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.5}
EXPLAINED: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 1.2, "top_p": 0.9, "min_p": 0.01},
    "greedy": {"temperature": 0.0, "frequency_penalty": 0.6},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "penalty_last_n": 6},
    "dry": {"dry_multiplier": 0.8, "dry_allowed_length": 1, "dry_sequence_breakers": []},
    "bans": {"no_repeat_ngram_size": 2, "min_tokens": 8, "bad_words": ["a", "th"]},
    "length": {"exponential_decay_length_penalty": [2, 1.5]},
    "mirostat": WITH_FEEDBACK,
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    "dynamic": {"dynatemp_range": 0.5, "temperature": 0.8},
    "adapt": {"adapt_temperature": [1.5, 0.5]},
    "entropix": {"entropix": {"clarify_token": 7, "high_ent": 2.0, "low_vent": 9.0}},
    "dola": {"dola_layers": [0, 1], "temperature": 1.3},
    "feedback and dola": WITH_FEEDBACK | {"dola_layers": [0, 1]},
}


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    """Less peaked than other tiny models; 8 tokens a step, so that texts come in parts."""
    hf = tiny.hf_model("llama", initializer_range=0.12)
    folder = tiny.save(hf, tmp_path_factory.mktemp("explained"))
    return tiny_core(folder, max_batch_tokens=8, max_num_seqs=8)[0]


@pytest.mark.parametrize("kind", EXPLAINED)
def test_explaining_what_was_generated_gives_its_traces_again(core: EngineCore, kind: str) -> None:
    options: dict[str, Any] = {"temperature": 1, "seed": 5, "ignore_eos": True} | EXPLAINED[kind]
    prompt, wish = [9, 40, 41, 42], TraceWish(top=5, layers=(0, 1, 2))
    drawn = run(core, request(core, prompt, trace=wish, max_tokens=15, **options))
    tokens = drawn.choices["r", 0].tokens
    ids = [token.id for token in tokens]
    assert len(set(ids)) > 4 or kind == "greedy"
    # All, and then some of them, with the next one too; the prefix is cached by now.
    for behind, chosen in ((15, range(4, 19)), (14, [18]), (14, [5, 6, 12, 18])):
        one = request(
            core,
            [*prompt, *ids[:behind]],
            trace=wish,
            explained=tuple(chosen),
            forced_len=behind,
            **options | {"max_tokens": 0, "min_tokens": 0},
        )
        least = options.get("min_tokens", 0)  # which a limit of no tokens would not go with
        one = replace(one, params=one.params.model_copy(update={"min_tokens": least}))
        results = run(core, one)
        assert not results.failed
        explained = results.choices["r", 0].explained
        assert [position for position, _ in explained] == [*chosen]
        for position, token in explained:
            assert token.id == ids[position - 4]
            assert_close(token.trace, tokens[position - 4].trace)
    assert_all_free(core)


def assert_close(got: TokenTrace | None, want: TokenTrace | None) -> None:
    """The same but for rounding."""
    assert got is not None
    assert want is not None
    for name in ("entropy", "varentropy", "temperature", "prob_before", "prob_after"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-3, abs=1e-5), name
    assert (got.rank, got.uniform) == (want.rank, want.uniform)
    for name in ("stage", "candidates"):
        assert [getattr(s, name) for s in got.stages] == [getattr(s, name) for s in want.stages]
    removed = [one.removed for one in want.stages]
    assert [one.removed for one in got.stages] == pytest.approx(removed, rel=1e-3, abs=1e-5)
    pairs = [(got.before, want.before), (got.after, want.after)]
    pairs += [(one.top, other.top) for one, other in zip(got.layers, want.layers, strict=True)]
    for one, other in pairs:
        assert [each.token_id for each in one] == [each.token_id for each in other]
        probs = [each.prob for each in other]
        assert [each.prob for each in one] == pytest.approx(probs, rel=1e-3, abs=1e-5)


def test_positions_inside_the_prompt_see_only_what_stands_before_them(core: EngineCore) -> None:
    ids = [9, 40, 41, 42, 40, 41, 42, 40, 9, 9, 40, 41]
    options: dict[str, Any] = {"seed": 1, "repetition_penalty": 1.4, "no_repeat_ngram_size": 3}
    options |= {"trace": WISH, "temperature": 1.0}
    chosen = tuple(range(1, 13))
    whole = run(core, request(core, ids, explained=chosen, max_tokens=0, **options))
    explained = whole.choices["r", 0].explained
    assert [position for position, _ in explained] == [*chosen]
    for position, token in explained:
        drawn = run(core, request(core, ids[:position], max_tokens=1, **options))
        (other,) = drawn.choices["r", 0].tokens
        assert token.id == (ids[position] if position < 12 else other.id)
        assert token.trace is not None
        assert other.trace is not None
        both = [
            replace(trace, rank=0, prob_before=0.0, prob_after=0.0, uniform=None)
            for trace in (token.trace, other.trace)
        ]
        assert_close(*both)
