"""CoT-decoding against its formula in a loop, and worked numbers."""

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.core import EngineCore
from engine.errors import InvalidRequest
from engine.messages import Delta, Request
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
    record_plans,
    request,
    run,
    scripted_core,
    tiny_core,
)
from tests.support.scripted import ScriptedModel

NUMBER = r"-?\d+(?:[.,]\d+)*"
# Tokens of one or two whole characters, and those that end a text.
PLAIN = sorted({*range(3, 100), *range(109, 122), *ENDS})
DIGITS = range(19, 29)


@dataclass(frozen=True)
class Way:
    """A branch as the loop finds it."""

    rank: int
    ids: list[int]
    answer: str | None
    confidence: float


class Oracle:
    """A tiny model in both programs. It likes digits, and some of its tokens end a text."""

    def __init__(self, folder: Path) -> None:
        self.core, _ = tiny_core(folder, kv_cache_memory=1 << 23)
        self.model = tiny.load(folder).double()
        self.bias = torch.full((tiny.VOCAB,), -torch.inf, dtype=torch.float64)
        self.bias[PLAIN] = 0.0
        self.bias[DIGITS] = 2.0
        self.known: dict[tuple[int, ...], Tensor] = {}

    def request(self, prompt: list[int], request_id: str = "r", **options: Any) -> Request:
        liked = {
            "allowed_token_ids": PLAIN,
            "logit_bias": {str(digit): 2.0 for digit in DIGITS},
            "cot_branches": 3,
        }
        made = request(self.core, prompt, request_id, **liked | options)
        return replace(made, eos_token_ids=frozenset(ENDS))

    def ways(self, prompt: list[int], k: int, position: int, max_tokens: int, pattern: str) -> Any:
        """What the paper's loop finds, in the order of the tokens it branches on."""
        found: list[tuple[list[int], list[float]]] = [([], [])]
        for length in range(max_tokens):
            following = []
            for ids, gaps in found:
                if ids and ids[-1] in ENDS:
                    following.append((ids, gaps))
                    continue
                probs, tokens = self.next(prompt + ids).sort(descending=True, stable=True)
                gap = float(probs[0] - probs[1])
                chosen = tokens[: k if length == position else 1].tolist()
                following += [([*ids, token], [*gaps, gap]) for token in chosen]
            found = following
        return [self._judge(rank, *one, pattern) for rank, one in enumerate(found)]

    def next(self, ids: list[int]) -> Tensor:
        """Probabilities [V] after the bans and biases of these requests."""
        key = tuple(ids)
        if key not in self.known:
            with torch.inference_mode():
                logits = self.model(torch.tensor([ids])).logits[0, -1].double()
            self.known[key] = (logits + self.bias).softmax(-1)
        return self.known[key]

    def _judge(self, rank: int, ids: list[int], gaps: list[float], pattern: str) -> Way:
        texts = ["" if i in ENDS else self.core.tokenizer.text_of(i) for i in ids]
        owners = [index for index, text in enumerate(texts) for _ in text]
        matches = list(re.finditer(pattern, "".join(texts)))
        if not matches:
            return Way(rank, ids, None, sum(gaps) / len(gaps))
        its = sorted(set(owners[matches[-1].start() : matches[-1].end()]))
        return Way(rank, ids, matches[-1].group(), sum(gaps[i] for i in its) / len(its))


def ranked(ways: list[Way], aggregate: str) -> list[Way]:
    """The best first; those without an answer last, unless nobody has one."""
    answered = [way for way in ways if way.answer is not None]
    if not answered:
        return ways
    silent = [way for way in ways if way.answer is None]

    def worth(way: Way) -> float:
        if aggregate == "max":
            return way.confidence
        return sum(other.confidence for other in answered if other.answer == way.answer)

    best = sorted(answered, key=lambda way: (-round(worth(way), 9), -way.confidence, way.rank))
    return best + sorted(silent, key=lambda way: (-way.confidence, way.rank))


def choices(results: Results, request_id: str = "r") -> list[Delta]:
    return [
        results.choices[key]
        for key in sorted(key for key in results.choices if key[0] == request_id)
    ]


def cot(delta: Delta) -> Any:
    return delta.report["cot"]


def compare(
    oracle: Oracle,
    prompts: list[list[int]],
    k: int,
    position: int,
    aggregate: str = "sum",
    pattern: str | None = None,
    max_tokens: int = 9,
) -> list[list[Way]]:
    """Run all prompts together, hold each against the loop, and return its branches."""
    options = {"max_tokens": max_tokens, "cot_branch_position": position}
    options |= {"cot_branches": k, "cot_aggregate": aggregate}
    if pattern is not None:
        options["cot_pattern"] = pattern
    requests = [
        oracle.request(prompt, str(index), n=1 + index % k, **options)
        for index, prompt in enumerate(prompts)
    ]
    results = run_checked(oracle.core, *requests)
    assert not results.failed
    found = []
    for index, prompt in enumerate(prompts):
        ways = oracle.ways(prompt, k, position, max_tokens, pattern or NUMBER)
        want = ranked(ways, aggregate)[: requests[index].params.n]
        got = choices(results, str(index))
        assert [[token.id for token in delta.tokens] for delta in got] == [w.ids for w in want]
        assert [cot(delta)["branch"] for delta in got] == [way.rank for way in want]
        for delta, way in zip(got, want, strict=True):
            for told, its in zip([cot(delta), *cot(delta)["branches"]], [way, *ways], strict=True):
                assert (told["branch"], told["answer"]) == (its.rank, its.answer)
                assert told["confidence"] == pytest.approx(its.confidence, abs=2e-5)
        assert results.finished[str(index)].completion_tokens == sum(len(w.ids) for w in want)
        found.append(ways)
    return found


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    model = tiny.hf_model("llama", initializer_range=0.15)
    return Oracle(tiny.save(model, tmp_path_factory.mktemp("cot")))


# -- worked numbers


START = 5
X, Y, Z = 59, 60, 61


def chain(rows: dict[int, dict[int, float]]) -> ScriptedModel:
    """A Markov chain; what is left of a row's mass is spread over tokens nobody looks for."""

    def script(token: int, _position: int) -> Tensor:
        given = rows.get(token, {EOS: 1.0})
        rest = [token for token in range(122, 128) if token not in given]
        row = torch.full((tiny.VOCAB,), (1 - sum(given.values())) / len(rest) + 1e-30)
        row[: rest[0]] = 1e-30
        for following, prob in given.items():
            row[following] = prob
        return row.double().log()

    return ScriptedModel(script)


def digit(text: str) -> int:
    return 19 + int(text)


# Confidences of A, B and B: 0.775, 0.4 and 0.5.
THREE = {
    START: {X: 0.5, Y: 0.3, Z: 0.15},
    X: {digit("4"): 0.9, digit("3"): 0.05},
    digit("4"): {digit("2"): 0.8, digit("1"): 0.1},
    digit("2"): {EOS: 1.0},
    Y: {digit("7"): 0.6, digit("8"): 0.2},
    Z: {digit("7"): 0.65, digit("8"): 0.15},
    digit("7"): {EOS: 1.0},
}


@pytest.mark.parametrize(
    ("aggregate", "order"), [("max", [0, 2, 1]), ("sum", [2, 1, 0])]
)  # 0.9 together
def test_worked_example_of_confidences(
    tokenizer: Tokenizer, aggregate: str, order: list[int]
) -> None:
    core = scripted_core(chain(THREE), tokenizer)
    asked = request(core, [START], cot_branches=3, n=3, cot_aggregate=aggregate)
    results = run_checked(core, asked)
    texts, answers = ["X42", "Y7", "Z7"], ["42", "7", "7"]
    for place, branch in enumerate(order):
        delta = results.choices["r", place]
        assert delta.text == texts[branch]
        assert delta.finish_reason == "stop"
        told = cot(delta)
        assert (told["branch"], told["answer"]) == (branch, answers[branch])
        assert told["confidence"] == pytest.approx([0.775, 0.4, 0.5][branch], abs=1e-6)
        assert [one["confidence"] for one in told["branches"]] == pytest.approx(
            [0.775, 0.4, 0.5], abs=1e-6
        )
        assert [one["answer"] for one in told["branches"]] == answers
        assert [one["branch"] for one in told["branches"]] == [0, 1, 2]


def test_of_equals_the_branch_whose_token_is_likelier_goes_first(tokenizer: Tokenizer) -> None:
    rows = {
        START: {Z: 0.5, X: 0.3, Y: 0.1},
        # Of two numbers the sum is the same wherever they are.
        **{token: {digit(str(value)): 0.75, 122: 0.25} for value, token in enumerate((X, Y, Z))},
    }
    core = scripted_core(chain(rows), tokenizer)
    for aggregate in ("max", "sum"):
        asked = request(core, [START], cot_branches=3, n=3, cot_aggregate=aggregate)
        results = run(core, asked)
        assert [delta.text for delta in choices(results)] == ["Z2", "X0", "Y1"]


# -- the loop


@pytest.mark.parametrize("position", [0, 1, 4])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_branches_and_confidences_are_those_of_the_loop(
    oracle: Oracle, k: int, position: int
) -> None:
    aggregate = ("max", "sum")[(k + position) % 2]
    found = compare(oracle, prompts_of(4, seed=10 * k + position), k, position, aggregate)
    for ways in found:
        if len(ways) > 1:
            assert len({tuple(way.ids[:position]) for way in ways}) == 1
            assert len({way.ids[position] for way in ways}) == len(ways) == k


@pytest.mark.parametrize("pattern", [r"[a-z]", r"[a-zA-Z]{2}", r"\d+\D", r"[a-t]", r"[0-4]"])
@pytest.mark.parametrize("aggregate", ["max", "sum"])
def test_the_answer_is_the_patterns_last_match(
    oracle: Oracle, aggregate: str, pattern: str
) -> None:
    found = compare(oracle, prompts_of(4, seed=3), 4, 0, aggregate, pattern)
    answers = [way.answer for ways in found for way in ways]
    assert len(set(answers)) > 2
    assert None in answers


@pytest.mark.slow
@pytest.mark.parametrize("aggregate", ["max", "sum"])
@pytest.mark.parametrize("k", [2, 4, 9])
def test_many_more_branchings_are_those_of_the_loop(oracle: Oracle, k: int, aggregate: str) -> None:
    for position, pattern in ((0, None), (0, "[a-z0-4]"), (3, None)):
        compare(oracle, prompts_of(6, seed=100 * k), k, position, aggregate, pattern, 10)


def test_what_is_compared_differs(oracle: Oracle) -> None:
    """So that the tests around this one show something."""
    found = compare(oracle, prompts_of(10, seed=5), 7, 0, pattern=r"\d")
    assert sum(ranked(ways, "sum")[0].rank != 0 for ways in found) > 4
    assert sum(ranked(ways, "sum")[0] != ranked(ways, "max")[0] for ways in found) > 0
    lengths = {len(way.ids) for ways in found for way in ways}
    assert len(lengths) > 4
    answers = [way.answer for ways in found for way in ways]
    assert len(set(answers)) > 5


def test_where_nobody_answers_the_greedy_branch_goes_first(oracle: Oracle) -> None:
    for aggregate in ("max", "sum"):
        found = compare(oracle, prompts_of(4, seed=6), 3, 0, aggregate, "nowhere to be found")
        assert all(way.answer is None for ways in found for way in ways)
        sure = [max(ways, key=lambda way: way.confidence).rank for ways in found]
        assert any(sure)


def test_a_text_that_ends_before_the_branching_is_the_only_result(tokenizer: Tokenizer) -> None:
    core = scripted_core(chain(THREE), tokenizer)
    asked = request(core, [START], cot_branches=3, n=2, cot_branch_position=4, max_tokens=9)
    results = run_checked(core, asked)
    (delta,) = choices(results)
    assert delta.text == "X42"
    assert len(cot(delta)["branches"]) == 1


def test_with_fewer_tokens_to_choose_from_there_are_fewer_branches(tokenizer: Tokenizer) -> None:
    core = scripted_core(ScriptedModel(), tokenizer)
    asked = request(core, [START], cot_branches=4, n=3, allowed_token_ids=[X, Y], ignore_eos=True)
    found = choices(run_checked(core, asked))
    assert {delta.text[0] for delta in found} == {"X", "Y"}
    assert len(found) == 2


@pytest.mark.parametrize(
    "options", [{"no_repeat_ngram_size": 1}, {"min_tokens": 8}, {"bad_words": ["1", "th"]}], ids=str
)
def test_penalties_and_bans_act_on_every_branch(oracle: Oracle, options: dict[str, Any]) -> None:
    acted = 0
    for prompt in prompts_of(4, seed=8):
        asked = oracle.request(prompt, cot_branches=4, n=4, max_tokens=9, **options)
        plain = oracle.request(prompt, cot_branches=4, n=4, max_tokens=9)
        found = choices(run(oracle.core, asked))
        acted += found != choices(run(oracle.core, plain))
        assert len(found) == 4
        for delta in found:
            ids = [token.id for token in delta.tokens]
            if "no_repeat_ngram_size" in options:
                assert len({*prompt, *ids}) == len({*prompt}) + len(ids)
            elif "min_tokens" in options:
                assert len(ids) == 9
            else:
                assert not {digit("1"), 109} & set(ids)
    assert acted > 1


# -- what counts as text


def test_what_the_client_does_not_see_is_no_answer(tokenizer: Tokenizer) -> None:
    """Neither what a stop string cuts away, nor the token that ends the text."""
    rows = {
        START: {X: 0.6, Y: 0.3},
        X: {digit("4"): 0.7},
        digit("4"): {Z: 0.8},
        Z: {digit("9"): 0.9},
        digit("9"): {Y: 1.0},
        Y: {digit("5"): 0.55},
        digit("5"): {EOS: 1.0},
    }
    core = scripted_core(chain(rows), tokenizer)
    for options, seen in (
        ({"stop": ["Z9"]}, ["X4", "Y5"]),
        ({"stop_token_ids": [digit("9")]}, ["X4Z", "Y5"]),
        ({"stop_token_ids": [digit("9")], "stop": ["Z9"]}, ["X4Z", "Y5"]),
    ):
        results = run(core, request(core, [START], cot_branches=2, n=2, **options))
        assert [delta.text for delta in choices(results)] == seen
        assert [cot(delta)["answer"] for delta in choices(results)] == ["4", "5"]
        assert cot(results.choices["r", 0])["confidence"] == pytest.approx(0.7 - 0.05, abs=1e-6)
    kept = {"stop": ["Z9"], "include_stop_str_in_output": True}
    results = run(core, request(core, [START], cot_branches=2, n=2, **kept))
    told = cot(results.choices["r", 0])
    assert results.text() == "X4Z9"
    assert (told["answer"], told["confidence"]) == ("9", pytest.approx(0.9 - 0.1 / 6, abs=1e-6))


def test_special_tokens_are_no_text_unless_they_are_shown(tokenizer: Tokenizer) -> None:
    bos = 1
    rows = {START: {X: 0.6, Y: 0.3}, X: {digit("4"): 0.7}, digit("4"): {bos: 0.8}, Y: {Y: 0.5}}
    core = scripted_core(chain(rows), tokenizer)
    options = {"cot_branches": 2, "cot_pattern": "[s4]"}
    results = run(core, request(core, [START], **options))
    assert (results.text(), cot(results.choices["r", 0])["answer"]) == ("X4", "4")
    results = run(core, request(core, [START], skip_special_tokens=False, **options))
    assert (results.text(), cot(results.choices["r", 0])["answer"]) == ("X4<s>", "s")
    assert cot(results.choices["r", 0])["confidence"] == pytest.approx(0.8 - 0.2 / 6, abs=1e-6)


def test_an_answer_may_be_a_character_of_several_tokens(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("é", add_special_tokens=False)
    rows = {START: {X: 0.6, Y: 0.3}, X: {first: 0.7}, first: {second: 0.9}, second: {Z: 0.8}}
    core = scripted_core(chain(rows), tokenizer)
    for pattern, answer, confidence in (
        ("é", "é", 0.7 - 0.3 / 6),
        ("Xé", "Xé", (0.3 + 0.7 - 0.3 / 6) / 2),
        ("Z", "Z", 0.8 - 0.2 / 6),
    ):
        asked = request(core, [START], cot_branches=2, cot_pattern=pattern, max_tokens=6)
        told = cot(run(core, asked).choices["r", 0])
        assert (told["answer"], told["confidence"]) == (answer, pytest.approx(confidence, abs=1e-6))


# -- patterns


def test_a_pattern_that_takes_too_long_fails_its_request_alone(tokenizer: Tokenizer) -> None:
    rows = {START: {X: 0.6, Y: 0.3}, X: {68: 0.9}, Y: {68: 0.9}, 68: {68: 0.9}}
    core = scripted_core(chain(rows), tokenizer, num_blocks=128)
    slow = request(core, [START], "slow", cot_branches=2, cot_pattern="(?:a|aa)+!", max_tokens=40)
    assert run(core, request(core, [START], cot_branches=2, cot_pattern="a+", max_tokens=3)).text()
    other = request(core, [START], "other", max_tokens=60)
    results = run_checked(core, slow, other)
    error = results.failed["slow"].error
    assert isinstance(error, InvalidRequest)
    assert error.param == "cot_pattern"
    assert "takes over 0.03 s" in str(error)
    assert len(results.ids("other")) == 60
    assert not [key for key in results.choices if key[0] == "slow"]
    assert run(core, request(core, [START], cot_branches=2)).finished


# -- cost, company, and what is given back


def test_branches_share_the_prompt_and_give_back_what_they_hold_as_they_end(
    tokenizer: Tokenizer,
) -> None:
    core = scripted_core(chain(THREE), tokenizer)
    plans = record_plans(core)
    run_checked(core, request(core, [START] * 9, cot_branches=3, n=3))
    assert [plan.num_tokens for plan in plans] == [9, 3, 3, 1]
    # Two blocks are full and shared by all; of the third, two branches take copies.
    assert [[copy.num_tokens for copy in plan.copies] for plan in plans] == [[], [1, 1], [], []]


def test_no_branch_is_told_of_before_all_have_ended(oracle: Oracle) -> None:
    core = oracle.core
    core.submit(oracle.request([5, 6], cot_branches=3, n=2, stream=True, max_tokens=6))
    messages: list[Any] = []
    for _ in range(10):
        assert not messages
        if core.has_work:
            messages = core.step()[0]
        if messages:
            break
    assert not core.has_work
    assert len(messages) == 3


def test_logprobs_are_the_models_own(oracle: Oracle) -> None:
    prompt = prompts_of(1, seed=6)[0]
    asked = oracle.request(prompt, cot_branches=3, n=3, logprobs=2, cot_branch_position=1)
    for delta in choices(run(oracle.core, asked)):
        ids = [*prompt, *(token.id for token in delta.tokens)]
        with torch.inference_mode():
            rows = oracle.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for place, token in enumerate(delta.tokens, start=len(prompt)):
            assert token.logprob == pytest.approx(float(rows[place - 1, token.id]), abs=1e-4)
            best = rows[place - 1].topk(2)
            assert [one for one, _ in token.top] == best.indices.tolist()


def mixed(oracle: Oracle) -> list[Request]:
    """Branching requests and others."""
    kinds: list[dict[str, Any]] = [
        {"cot_branches": 4, "n": 2},
        {"cot_branches": None, "temperature": 1.0, "seed": 3},
        {"cot_branches": 3, "cot_branch_position": 3, "n": 3, "cot_aggregate": "max"},
        {"cot_branches": None, "use_beam_search": True, "beam_width": 3, "n": 2},
        {"cot_branches": 2, "repetition_penalty": 1.3, "logprobs": 2},
        {"cot_branches": None, "penalty_alpha": 0.6, "top_k": 3},
        {"cot_branches": 5, "cot_pattern": "[a-z]", "n": 4},
    ]
    prompts = prompts_of(len(kinds), seed=12)
    rng = random.Random(1)
    return [
        oracle.request(
            prompt, str(index), max_tokens=rng.randint(5, 12), **kinds[index % len(kinds)]
        )
        for index, prompt in enumerate(prompts)
    ]


def test_company_changes_nothing(oracle: Oracle) -> None:
    assert_the_same_in_company(oracle.core, oracle.core, *mixed(oracle))


def test_neither_does_preemption(oracle: Oracle) -> None:
    short: EngineCore = cramped(oracle.core, 18)
    assert_the_same_in_company(oracle.core, short, *mixed(oracle))
    assert short.scheduler.num_preemptions > 1


def test_aborted_midway_it_gives_everything_back(oracle: Oracle) -> None:
    asked = oracle.request([5, 6, 7], "it", cot_branches=4, cot_branch_position=2, ignore_eos=True)
    other = oracle.request([8, 9], "other", cot_branches=None)
    assert_an_abort_leaves_nothing(oracle.core, asked, other)
    assert_all_free(oracle.core)


def test_failing_midway_it_gives_everything_back(oracle: Oracle) -> None:
    asked = oracle.request([5, 6, 7], "it", cot_branches=4, cot_branch_position=2, ignore_eos=True)
    other = oracle.request([8, 9], "other", cot_branches=None)
    assert_an_error_leaves_nothing(oracle.core, asked, other)
