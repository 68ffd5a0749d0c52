"""Self-evaluation decoding: every number it reports is computed again, and worked numbers."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import InvalidRequest
from engine.messages import Request
from engine.params import SedParams
from engine.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.beams import ENDS, prompts_of
from tests.support.company import (
    assert_an_abort_leaves_nothing,
    assert_an_error_leaves_nothing,
    assert_the_same_in_company,
    cramped,
    run_checked,
)
from tests.support.engines import (
    EOS,
    Results,
    assert_all_free,
    collect,
    record_plans,
    request,
    run,
    scripted_core,
    tiny_core,
)
from tests.support.scripted import ScriptedModel

START, X, Y, Z, W = 5, 59, 60, 61, 58
YES, NO = 92, 81  # "y" and "n"

QUESTION = {"eval_prompt": "ok?", "verdict_tokens": ["y", "n"]}


# -- worked numbers


def chain(
    rows: dict[int, dict[int, float]], verdicts: dict[int, float], asked: int
) -> ScriptedModel:
    """A Markov chain; the rest of a row's mass is spread over tokens nobody looks for.

    Behind `asked`, the question's last token, "y" has a probability by the position, of the
    mass that it has together with "n".
    """

    def script(token: int, position: int) -> Tensor:
        given = rows.get(token, {EOS: 1.0})
        if token == asked:
            right = verdicts[position]
            given = {YES: right / 2, NO: (1 - right) / 2}
        rest = [token for token in range(100, 128) if token not in given]
        row = torch.full((tiny.VOCAB,), 1e-30)
        row[rest] = (1 - sum(given.values())) / len(rest) + 1e-30
        for following, prob in given.items():
            row[following] = prob
        return row.double().log()

    return ScriptedModel(script)


# The second try is one token longer than the first, and the question "ok?" stands further back.
TWO = {START: {X: 0.30, Y: 0.28}, X: {EOS: 0.9, Z: 0.05}, Y: {Z: 0.9, X: 0.05}, Z: {EOS: 1.0}}


@pytest.mark.parametrize(
    ("alpha", "propensity", "text"),
    [(0.5, [0.35, 0.59], "YZ"), (0.0, [0.30, 0.28], "X"), (1.0, [0.4, 0.9], "YZ")],
)
def test_worked_example(
    tokenizer: Tokenizer, alpha: float, propensity: list[float], text: str
) -> None:
    question = tokenizer.encode("ok?", add_special_tokens=False)
    # START at 0, the candidate at 1, what it leads to, the question.
    verdicts = {1 + len(question): 0.4, 2 + len(question): 0.9}
    core = scripted_core(chain(TWO, verdicts, question[-1]), tokenizer)
    results = run_checked(core, request(core, [START], sed={**QUESTION, "alpha": alpha}))
    assert results.text() == text
    (point,) = results.choices["r", 0].report["sed"]
    assert point["position"] == 0
    assert point["ratio"] == pytest.approx(0.933333, abs=1e-5)
    rest = 0.42 / 28
    entropy = -(0.3 * math.log(0.3) + 0.28 * math.log(0.28) + 0.42 * math.log(rest))
    assert point["entropy"] == pytest.approx(entropy, abs=1e-5)
    assert point["chosen"] == propensity.index(max(propensity))
    first, second = point["candidates"]
    assert [first["token_id"], second["token_id"]] == [X, Y]
    assert [first["p_gen"], second["p_gen"]] == pytest.approx([0.30, 0.28], abs=1e-6)
    assert [first["p_se"], second["p_se"]] == pytest.approx([0.4, 0.9], abs=1e-6)
    assert [first["propensity"], second["propensity"]] == pytest.approx(propensity, abs=1e-6)
    assert [first["rollout_token_ids"], second["rollout_token_ids"]] == [[X, EOS], [Y, Z, EOS]]


ENTROPY = 0.5 * math.log(2) * 2  # of two equals
FLAT = {START: {X: 0.5, Y: 0.5}, X: {EOS: 1.0}, Y: {EOS: 1.0}}
LEANING = {START: {X: 0.6, Y: 0.3}, X: {EOS: 1.0}, Y: {EOS: 1.0}}  # ratio 0.5


@pytest.mark.parametrize(
    ("rows", "options", "chaotic"),
    [
        (LEANING, {"delta_r": 0.49}, True),
        (LEANING, {"delta_r": 0.51}, False),
        (LEANING, {"delta_r": 0.49, "detector": "entropy", "delta_e": 9.0}, False),
        (LEANING, {"delta_r": 0.51, "detector": "entropy", "delta_e": 0.5}, True),
        (LEANING, {"delta_r": 0.51, "detector": "either", "delta_e": 0.5}, True),
        (LEANING, {"delta_r": 0.49, "detector": "either", "delta_e": 9.0}, True),
        (LEANING, {"delta_r": 0.51, "detector": "either", "delta_e": 9.0}, False),
        (LEANING, {"delta_r": 0.51, "detector": "either"}, False),
        (LEANING, {"delta_r": 0.51, "delta_e": 0.5}, False),  # nobody measures the entropy
        (FLAT, {"delta_r": 0.99}, True),
        (FLAT, {"delta_r": 1.0}, False),  # nothing is above it
        (FLAT, {"detector": "entropy", "delta_e": ENTROPY - 1e-4}, True),
        (FLAT, {"detector": "entropy", "delta_e": ENTROPY + 1e-4}, False),
    ],
    ids=str,
)
def test_a_point_is_chaotic_by_ratio_or_entropy(
    tokenizer: Tokenizer,
    rows: dict[int, dict[int, float]],
    options: dict[str, Any],
    chaotic: bool,
) -> None:
    question = tokenizer.encode("ok?", add_special_tokens=False)
    model = chain(rows, dict.fromkeys(range(20), 0.5), question[-1])
    core = scripted_core(model, tokenizer)
    results = run_checked(core, request(core, [START], sed={**QUESTION, **options}))
    points = results.choices["r", 0].report["sed"]
    assert [point["position"] for point in points] == [0] * chaotic
    assert results.text() == "X"


# -- numbers computed again


class Oracle:
    """A tiny model in both programs. Some of its tokens end a text."""

    def __init__(self, folder: Path) -> None:
        self.core, _ = tiny_core(folder, kv_cache_memory=1 << 23)
        self.model = tiny.load(folder).double()
        self.known: dict[tuple[int, ...], Tensor] = {}

    def request(self, prompt: list[int], request_id: str = "r", **options: Any) -> Request:
        made = request(self.core, prompt, request_id, **options)
        return replace(made, eos_token_ids=frozenset(ENDS))

    def next(self, ids: list[int]) -> Tensor:
        """Logits [V]."""
        key = tuple(ids)
        if key not in self.known:
            with torch.inference_mode():
                self.known[key] = self.model(torch.tensor([ids])).logits[0, -1].double()
        return self.known[key].clone()

    def processed(self, ids: list[int], options: dict[str, Any]) -> Tensor:
        """Logits [V] with the repetition penalty."""
        logits, penalty = self.next(ids), options.get("repetition_penalty", 1.0)
        for token in set(ids):
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        return logits

    def judge(self, ids: list[int], sed: SedParams) -> float:
        question = self.core.tokenizer.encode(sed.eval_prompt, add_special_tokens=False)
        verdicts = [self.core.tokenizer.encode(v, False)[0] for v in sed.verdict_tokens]
        return float(self.next([*ids, *question])[verdicts].softmax(0)[0])

    def roll(self, ids: list[int], first: int, room: int, cap: int, options: dict[str, Any]) -> Any:
        """What a try says, and the tokens that the question is put behind."""
        tried = [first]
        while tried[-1] not in ENDS and len(tried) < min(cap, room):
            tried.append(int(self.processed([*ids, *tried], options).argmax()))
        ended = tried[-1] in ENDS or len(tried) == room
        return tried, [*ids, *(tried[:-1] if ended else tried)]

    def check(self, asked: Request, results: Results, options: dict[str, Any]) -> int:
        """Hold a whole answer and its report against the formulas; returns the number of points."""
        sed = asked.params.sed
        assert sed is not None
        prompt, output = list(asked.prompt_ids), results.ids(asked.request_id)
        points = results.choices[asked.request_id, 0].report["sed"]
        waiting = list(points)
        for position, token in enumerate(output):
            ids = prompt + output[:position]
            probs = self.processed(ids, options).softmax(0)
            own, best = probs.topk(sed.k)
            ratio = float(own[1] / own[0])
            entropy = float(-(probs * probs.log()).sum())
            chaotic = sed.detector != "entropy" and ratio > sed.delta_r
            if sed.detector != "ratio" and sed.delta_e is not None:
                chaotic |= entropy > sed.delta_e
            if not chaotic or len(points) - len(waiting) == sed.max_points:
                if asked.params.greedy:
                    assert token == int(probs.argmax())
                continue
            point = waiting.pop(0)
            assert point["position"] == position
            assert point["ratio"] == pytest.approx(ratio, abs=1e-4)
            assert point["entropy"] == pytest.approx(entropy, abs=1e-4)
            room = asked.max_tokens - position
            worth = []
            for told, first, prob in zip(
                point["candidates"], best.tolist(), own.tolist(), strict=True
            ):
                tried, said = self.roll(ids, first, room, sed.rollout_tokens, options)
                right = self.judge(said, sed)
                worth.append(sed.alpha * right + (1 - sed.alpha) * prob)
                assert told["token_id"] == first
                assert told["rollout_token_ids"] == tried
                assert told["p_gen"] == pytest.approx(prob, abs=1e-4)
                assert told["p_se"] == pytest.approx(right, abs=1e-4)
                assert told["propensity"] == pytest.approx(worth[-1], abs=1e-4)
            assert point["chosen"] == worth.index(max(worth))
            assert token == int(best[point["chosen"]])
        assert not waiting
        assert len(output) == asked.max_tokens or output[-1] in ENDS
        return len(points)


def compare(oracle: Oracle, count: int, sed: dict[str, Any], **options: Any) -> int:
    requests = [
        oracle.request(prompt, str(index), sed=sed, **({"max_tokens": 9} | options))
        for index, prompt in enumerate(prompts_of(count, seed=options.get("seed", 1)))
    ]
    results = run_checked(oracle.core, *requests)
    assert not results.failed
    return sum(oracle.check(one, results, options) for one in requests)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    model = tiny.hf_model("llama", initializer_range=0.15)
    return Oracle(tiny.save(model, tmp_path_factory.mktemp("sed")))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"k": 3, "alpha": 0.9},
    {"k": 5, "rollout_tokens": 3, "alpha": 0.3},
    {"rollout_tokens": 1, "delta_r": 0.5},
    {"detector": "entropy", "delta_e": 3.0, "k": 4, "max_points": 2},
    {"detector": "either", "delta_e": 3.6, "delta_r": 0.9, "alpha": 1.0},
    {"detector": "either", "delta_r": 0.6, "alpha": 0.0, "max_points": 1},
    {"verdict_tokens": ["He said", "No"], "eval_prompt": " Right?\n"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_number_is_what_the_formulas_give(
    oracle: Oracle, settings: dict[str, Any], temperature: float
) -> None:
    num_points = compare(oracle, 2, QUESTION | settings, temperature=temperature, seed=5)
    assert num_points > 0


def test_numbers_are_of_what_penalties_leave(oracle: Oracle) -> None:
    for penalty in (1.4, 0.7):
        assert compare(oracle, 2, QUESTION | {"k": 3}, repetition_penalty=penalty) > 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_many_more_points_are_what_the_formulas_give(
    oracle: Oracle, settings: dict[str, Any]
) -> None:
    found = [
        compare(oracle, 4, QUESTION | settings, temperature=temperature, max_tokens=12, seed=seed)
        for seed in (6, 7)
        for temperature in (0.0, 0.8)
    ]
    assert sum(found) > 5


def test_ordinary_choices_are_those_of_an_ordinary_request(oracle: Oracle) -> None:
    """Up to the first chaotic point, at any temperature, and if nothing is chaotic to the end."""
    for prompt in prompts_of(3, seed=9):
        for temperature in (0.0, 0.9):
            options = {"temperature": temperature, "seed": 4, "logprobs": 2}
            plain = run(oracle.core, oracle.request(prompt, **options))
            never = oracle.request(prompt, sed=QUESTION | {"delta_r": 1.0}, **options)
            never_answer = run(oracle.core, never)
            pairs = zip(
                never_answer.choices["r", 0].tokens, plain.choices["r", 0].tokens, strict=True
            )
            for got, want in pairs:
                assert (got.id, got.text) == (want.id, want.text)
                assert got.logprob == pytest.approx(want.logprob, abs=1e-5)
                assert [one for one, _ in got.top] == [one for one, _ in want.top]
            assert never_answer.choices["r", 0].report == {"sed": []}
            some = run(oracle.core, oracle.request(prompt, sed=QUESTION, **options))
            points = some.choices["r", 0].report["sed"]
            first = points[0]["position"] if points else len(plain.ids())
            assert some.ids()[:first] == plain.ids()[:first]


def test_all_points_but_the_first_few_are_ordinary(oracle: Oracle) -> None:
    for most in (1, 2, 3):
        sed = QUESTION | {"delta_r": 0.0, "max_points": most}
        results = run(oracle.core, oracle.request([5, 6, 7], sed=sed, ignore_eos=True))
        points = results.choices["r", 0].report["sed"]
        assert [point["position"] for point in points] == list(range(most))


# -- ends


def test_a_stop_string_ends_tries_and_the_text(tokenizer: Tokenizer) -> None:
    question = tokenizer.encode("ok?", add_special_tokens=False)
    rows = {START: {X: 0.4, Y: 0.38}, X: {Z: 1.0}, Y: {W: 1.0}, Z: {Z: 1.0}, W: {W: 1.0}}
    # Behind "X" and behind "YWW".
    verdicts = {1 + len(question): 0.2, 3 + len(question): 0.7}
    core = scripted_core(chain(rows, verdicts, question[-1]), tokenizer)
    asked = request(core, [START], sed=QUESTION, stop=["XZ", "WWW"], max_tokens=8)
    results = run_checked(core, asked)
    (point,) = results.choices["r", 0].report["sed"]
    assert [one["rollout_token_ids"] for one in point["candidates"]] == [[X, Z], [Y, W, W, W]]
    assert [one["p_se"] for one in point["candidates"]] == pytest.approx([0.2, 0.7], abs=1e-6)
    assert results.text() == "Y"
    assert results.choices["r", 0].stop_reason == "WWW"


def test_a_candidate_may_be_the_end_itself(tokenizer: Tokenizer) -> None:
    question = tokenizer.encode("ok?", add_special_tokens=False)
    rows = {START: {EOS: 0.5, Y: 0.45}, Y: {EOS: 1.0}}
    for right, text in (({0: 0.9, 1: 0.5}, ""), ({0: 0.5, 1: 0.9}, "Y")):
        verdicts = {place + len(question): value for place, value in right.items()}
        core = scripted_core(chain(rows, verdicts, question[-1]), tokenizer)
        results = run_checked(core, request(core, [START], sed=QUESTION))
        (point,) = results.choices["r", 0].report["sed"]
        assert [one["rollout_token_ids"] for one in point["candidates"]] == [[EOS], [Y, EOS]]
        assert results.text() == text
        assert results.choices["r", 0].finish_reason == "stop"


def test_a_try_that_nothing_may_follow_is_judged_as_it_is(tokenizer: Tokenizer) -> None:
    question = tokenizer.encode("ok?", add_special_tokens=False)

    def script(token: int, position: int) -> Tensor:
        row = torch.full((tiny.VOCAB,), -torch.inf)
        follows = {START: [X, Y], X: [], Y: [Z], Z: [EOS], question[-1]: [YES, NO]}
        row[follows.get(token, [START])] = 1.0
        row[YES] += float(position)
        return row

    core = scripted_core(ScriptedModel(script), tokenizer)
    results = run_checked(core, request(core, [START], sed=QUESTION | {"alpha": 1.0}))
    (point,) = results.choices["r", 0].report["sed"]
    assert [one["rollout_token_ids"] for one in point["candidates"]] == [[X], [Y, Z, EOS]]
    assert results.text() == "YZ"


def test_where_only_one_token_is_allowed_nothing_is_chaotic(oracle: Oracle) -> None:
    asked = oracle.request([5], sed=QUESTION | {"delta_r": 0.0}, allowed_token_ids=[40])
    results = run_checked(oracle.core, asked)
    assert results.ids() == [40] * 8
    assert results.choices["r", 0].report == {"sed": []}


def test_fewer_tokens_than_candidates_are_all_tried(oracle: Oracle) -> None:
    sed = QUESTION | {"delta_r": 0.0, "k": 5, "max_points": 2}
    results = run_checked(oracle.core, oracle.request([5], sed=sed, allowed_token_ids=[40, 41, 42]))
    for point in results.choices["r", 0].report["sed"]:
        assert sorted(one["token_id"] for one in point["candidates"]) == [40, 41, 42]


def test_min_tokens_holds_for_tries_and_the_text(oracle: Oracle) -> None:
    for prompt in prompts_of(2, seed=2):
        asked = oracle.request(prompt, sed=QUESTION | {"delta_r": 0.3, "k": 3}, min_tokens=5)
        results = run_checked(oracle.core, asked)
        assert len(results.ids()) >= 6
        for point in results.choices["r", 0].report["sed"]:
            for one in point["candidates"]:
                assert not set(ENDS) & set(one["rollout_token_ids"][: 5 - point["position"]])


# -- what is asked


def test_the_question_goes_to_where_the_verdicts_part(tokenizer: Tokenizer) -> None:
    core = scripted_core(ScriptedModel(), tokenizer)

    def asked(*verdicts: str) -> Request:
        return request(core, [5], sed={"eval_prompt": "ok?", "verdict_tokens": list(verdicts)})

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    made = asked("y", "n")
    assert (made.question_ids, made.verdict_ids) == (ids("ok?"), (YES, NO))
    made = asked(" True", " False")
    assert made.question_ids == (*ids("ok?"), *ids(" "))
    assert made.verdict_ids == (ids("T")[0], ids("F")[0])
    made = asked("abX", "abYZ")
    assert (made.question_ids, made.verdict_ids) == ((*ids("ok?"), *ids("ab")), (X, Y))
    for same in (("y", "y"), ("ab", "abc")):
        with pytest.raises(InvalidRequest, match="neither begins with the other"):
            asked(*same)


def test_the_question_must_fit_behind_the_longest_try(tokenizer: Tokenizer) -> None:
    core = scripted_core(ScriptedModel(context_len=32), tokenizer, num_blocks=8)
    question = "x" * 10
    sed = {"eval_prompt": question, "verdict_tokens": ["y", "n"], "delta_r": 0.0}
    with pytest.raises(InvalidRequest, match="maximum context length is 32"):
        request(core, [5] * 4, sed=sed, max_tokens=19)
    # Two tries of five blocks each, the first of which they share.
    with pytest.raises(InvalidRequest, match="need 9 blocks"):
        request(core, [5] * 4, sed=sed, max_tokens=5)
    results = run_checked(core, request(core, [5] * 4, sed=sed, max_tokens=2, ignore_eos=True))
    assert len(results.choices["r", 0].report["sed"]) == 2


# -- cost, company, and what is given back


def test_tries_run_side_by_side_and_the_sequence_sleeps(tokenizer: Tokenizer) -> None:
    question = tokenizer.encode("ok?", add_special_tokens=False)
    verdicts = {6 + len(question): 0.4, 7 + len(question): 0.9}
    core = scripted_core(chain(TWO, verdicts, question[-1]), tokenizer)
    plans = record_plans(core)
    results = run_checked(core, request(core, [W] * 5 + [START], sed=QUESTION))
    assert results.text() == "YZ"
    # The prompt; both candidates; the question behind "X", and "Z"; the question behind "YZ"; then
    # the sequence goes on with "Y".
    want = [6, 2, len(question) + 1, len(question), 1, 1]
    assert [plan.num_tokens for plan in plans] == want
    assert sum(len(plan.copies) for plan in plans) == 2


def test_a_stream_tells_nobody_of_tries(oracle: Oracle) -> None:
    for prompt in prompts_of(2, seed=4):
        asked = oracle.request(prompt, sed=QUESTION | {"delta_r": 0.4}, logprobs=1, max_tokens=9)
        whole = run(oracle.core, asked)
        oracle.core.submit(replace(asked, stream=True))
        results = Results()
        for _ in range(500):
            if not oracle.core.has_work:
                break
            before = len(results.deltas)
            collect(results, oracle.core.step()[0])
            assert len(results.deltas) - before <= 1
        assert results.merge().choices == whole.choices
        assert_all_free(oracle.core)


def mixed(oracle: Oracle) -> list[Request]:
    """Requests that evaluate themselves, and others."""
    kinds: list[dict[str, Any]] = [
        {"sed": QUESTION},
        {"temperature": 1.0, "seed": 3},
        {"sed": QUESTION | {"k": 4, "delta_r": 0.5, "rollout_tokens": 3}, "temperature": 0.8},
        {"use_beam_search": True, "beam_width": 3, "n": 2},
        {"sed": QUESTION | {"detector": "entropy", "delta_e": 3.0}, "repetition_penalty": 1.3},
        {"penalty_alpha": 0.6, "top_k": 3},
        {"sed": QUESTION | {"k": 3, "delta_r": 0.3, "max_points": 2}, "logprobs": 2},
    ]
    return [
        oracle.request(
            prompt, str(index), max_tokens=8, **({"seed": index} | kinds[index % len(kinds)])
        )
        for index, prompt in enumerate(prompts_of(len(kinds), seed=12))
    ]


def test_company_changes_nothing(oracle: Oracle) -> None:
    assert_the_same_in_company(oracle.core, oracle.core, *mixed(oracle))


def test_neither_does_preemption(oracle: Oracle) -> None:
    short = cramped(oracle.core, 18)
    assert_the_same_in_company(oracle.core, short, *mixed(oracle))
    assert short.scheduler.num_preemptions > 1


ALWAYS = QUESTION | {"delta_r": 0.0, "k": 3, "rollout_tokens": 3, "max_points": 2}


def test_aborted_midway_it_gives_everything_back(oracle: Oracle) -> None:
    asked = oracle.request([5, 6, 7], "it", sed=ALWAYS, ignore_eos=True, max_tokens=4)
    assert_an_abort_leaves_nothing(oracle.core, asked, oracle.request([8, 9], "other"))


def test_failing_midway_it_gives_everything_back(oracle: Oracle) -> None:
    asked = oracle.request([5, 6, 7], "it", sed=ALWAYS, ignore_eos=True, max_tokens=4)
    assert_an_error_leaves_nothing(oracle.core, asked, oracle.request([8, 9], "other"))
