"""What comes of requests: tokens, stops, scores, and failures that stay where they are."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.core
from engine.attention.torch_paged import TorchPagedAttention
from engine.core import EngineCore
from engine.errors import GenerationFailed
from engine.messages import FinishReason, Token
from engine.strategies.base import Branch, Plain, View
from engine.tokenizer import Tokenizer
from engine.types import Sequence
from tests.support.engines import (
    EOS,
    assert_all_free,
    drain,
    request,
    run,
    scripted_core,
)
from tests.support.invariants import check
from tests.support.scripted import Script, ScriptedModel, constant, pseudo_random, sequence
from tests.support.tiny import VOCAB

NAN, INF = float("nan"), float("inf")


def core_of(tokenizer: Tokenizer, script: Script | None = None, **config: Any) -> EngineCore:
    return scripted_core(ScriptedModel(script), tokenizer, **config)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """A token for each character; "$" stands for the end of sequence, "^" for another special."""
    special = {"$": EOS, "^": 1}
    return [
        special.get(character) or tokenizer.encode(character, add_special_tokens=False)[0]
        for character in text
    ]


# -- when a sequence stops


STOPS: dict[str, tuple[str, dict[str, Any], str, int, int | str | None]] = {
    # what the model says, parameters, text, number of tokens, stop_reason
    "end of sequence": ("ab$cd", {}, "ab", 3, None),
    "no end of sequence": ("ab$cdddd", {"ignore_eos": True, "max_tokens": 5}, "abcd", 5, "length"),
    "length": ("abcdefgh", {"max_tokens": 4}, "abcd", 4, "length"),
    "a stop token": ("abcd", {"stop_token_ids": ["c"]}, "ab", 3, "c"),
    "end of sequence as stop token": ("ab$c", {"stop_token_ids": ["$"]}, "ab", 3, None),
    "it when ignored": ("ab$c", {"stop_token_ids": ["$"], "ignore_eos": True}, "ab", 3, "$"),
    "a special token's text": ("ab^c", {"stop": "<s>"}, "ab", 3, "<s>"),
    "its text shown": ("ab^c", {"stop": "<s>", "skip_special_tokens": False}, "ab", 3, "<s>"),
    "its text kept": (
        "ab^c",
        {"stop": "<s>", "include_stop_str_in_output": True},
        "ab<s>",
        3,
        "<s>",
    ),
    "a stop string": ("abcdef", {"stop": "cd"}, "ab", 4, "cd"),
    "a stop string kept": (
        "abcdef",
        {"stop": "cd", "include_stop_str_in_output": True},
        "abcd",
        4,
        "cd",
    ),
    "the string that is complete first": ("abcdef", {"stop": ["abcde", "cd"]}, "ab", 4, "cd"),
    "the first listed of two": ("abcdef", {"stop": ["d", "cd"]}, "abc", 4, "d"),
    "a string with the last token": ("abcdef", {"stop": "cd", "max_tokens": 4}, "ab", 4, "cd"),
    "a token with the last token": (
        "abcd",
        {"stop_token_ids": ["c"], "max_tokens": 3},
        "ab",
        3,
        "c",
    ),
    "length inside a stop string": (
        "abcdef",
        {"stop": "cde", "max_tokens": 4},
        "abcd",
        4,
        "length",
    ),
    "the end inside a stop string": ("abc$", {"stop": "cde"}, "abc", 4, None),
    "a stop string within the minimum": ("abcabc", {"stop": "b", "min_tokens": 2}, "abca", 5, "b"),
    "a stop string across the minimum": (
        "abcabc",
        {"stop": "bc", "min_tokens": 2},
        "abca",
        6,
        "bc",
    ),
    "a stop string behind the minimum": ("abcabc", {"stop": "bc", "min_tokens": 1}, "a", 3, "bc"),
}


@pytest.mark.parametrize("case", STOPS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_sequence_stops_at_the_right_place(tokenizer: Tokenizer, case: str, stream: bool) -> None:
    says, params, text, count, reason = STOPS[case]
    says_ids = ids_of(tokenizer, says)
    options = {"max_tokens": 20} | params
    options["stop_token_ids"] = [
        ids_of(tokenizer, character)[0] for character in params.get("stop_token_ids", [])
    ]
    core = core_of(tokenizer, sequence(says_ids, 3))
    results = run(core, request(core, [5, 6, 7], stream=stream, **options))
    choice = results.choices["r", 0]

    assert (choice.text, results.ids()) == (text, says_ids[:count])
    if reason == "length":
        assert (choice.finish_reason, choice.stop_reason) == (FinishReason.LENGTH, None)
    else:
        if isinstance(reason, str) and len(reason) == 1 and options["stop_token_ids"]:
            reason = ids_of(tokenizer, reason)[0]
        assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, reason)
    finished = results.finished["r"]
    assert (finished.prompt_tokens, finished.completion_tokens) == (3, count)
    assert finished.finish_reasons == (choice.finish_reason,)
    assert_all_free(core)


def test_the_minimum_bans_every_token_that_would_end_the_sequence(tokenizer: Tokenizer) -> None:
    row = [0.0] * VOCAB
    row[EOS], row[9], row[5] = 9.0, 8.0, 7.0
    core = core_of(tokenizer, constant(row))
    results = run(core, request(core, [5], min_tokens=3, stop_token_ids=[9]))
    assert results.ids() == [5, 5, 5, EOS]


def test_where_every_token_is_banned_the_text_so_far_is_all(tokenizer: Tokenizer) -> None:
    says = sequence(ids_of(tokenizer, "abc"), 2)

    def script(token: int, position: int) -> Tensor:
        return says(token, position) if position < 4 else torch.full((VOCAB,), -INF)

    core = core_of(tokenizer, script)
    # "bc" is held back when there is suddenly nothing to say.
    results = run(core, request(core, [5, 6], stop="bcd", logprobs=0))
    choice = results.choices["r", 0]
    assert (choice.text, len(choice.tokens)) == ("abc", 3)
    assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, "no_valid_token")
    assert results.finished["r"].completion_tokens == 3
    assert_all_free(core)


def test_ids_that_no_token_has_are_never_chosen(tokenizer: Tokenizer) -> None:
    row = torch.zeros(VOCAB + 40)
    row[VOCAB + 3] = 50.0
    row[17] = 1.0
    model = ScriptedModel(lambda _token, _position: row.clone(), vocab_size=VOCAB + 40)
    core = scripted_core(model, tokenizer)
    results = run(core, request(core, [5, 6], logprobs=2, prompt_logprobs=2, max_tokens=3))
    assert results.ids() == [17] * 3
    top = [
        token.top[0][0]
        for token in (*results.choices["r", 0].tokens, *results.choices["r", 0].prompt[1:])
    ]
    assert top == [17] * 4


# -- several choices


def test_greedy_choices_are_the_same_and_sampled_ones_differ(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer)
    greedy = run(core, request(core, [5, 6, 7], n=3))
    assert greedy.ids(index=0) == greedy.ids(index=1) == greedy.ids(index=2)
    sampled = run(core, request(core, [5, 6, 7], n=3, temperature=1.5, seed=11, ignore_eos=True))
    assert len({tuple(sampled.ids(index=index)) for index in range(3)}) == 3
    assert greedy.finished["r"].completion_tokens == sum(
        len(greedy.ids(index=index)) for index in range(3)
    )


def test_best_of_returns_the_likeliest_by_mean_logprob(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer)
    options: dict[str, Any] = {"temperature": 1.5, "seed": 4, "max_tokens": 6}
    every = run(core, request(core, [5, 6, 7], n=6, logprobs=0, **options))
    means = {}
    for index in range(6):
        logprobs = [token.logprob for token in every.choices["r", index].tokens]
        means[index] = sum(logprobs) / len(logprobs)  # type: ignore[arg-type]
    best = sorted(means, key=lambda index: -means[index])

    results = run(core, request(core, [5, 6, 7], n=2, best_of=6, **options))
    assert sorted(results.choices) == [("r", 0), ("r", 1)]
    assert [results.ids(index=index) for index in (0, 1)] == [every.ids(index=i) for i in best[:2]]
    finished = results.finished["r"]
    assert finished.completion_tokens == every.finished["r"].completion_tokens
    assert finished.longest_tokens == max(len(every.ids(index=index)) for index in range(6))
    assert all(token.top == () for token in results.choices["r", 0].tokens)


# -- scores of the prompt


PROMPT = [3 + 11 * index % 97 for index in range(40)]


def check_prompt(prompt: tuple[Token, ...], count: int = 3, logits: bool = False) -> None:
    """Compare with log-softmax in float64 of the script's rows."""
    assert [token.id for token in prompt] == PROMPT
    assert prompt[0] == Token(PROMPT[0], "")
    for position, token in enumerate(prompt[1:]):
        row = pseudo_random(PROMPT[position], position).double()
        want = row if logits else row.log_softmax(0)
        order = want.argsort(descending=True).tolist()
        assert token.logprob == pytest.approx(want[token.id].item(), abs=1e-5)
        assert token.rank == order.index(token.id) + 1
        assert [token_id for token_id, _ in token.top] == order[:count]
        assert [value for _, value in token.top] == pytest.approx(
            want[order[:count]].tolist(), abs=1e-5
        )


@pytest.mark.parametrize("budget", [16, 17, 31, 64])
def test_scores_of_a_prompt_do_not_depend_on_how_it_is_split(
    tokenizer: Tokenizer, budget: int
) -> None:
    core = core_of(tokenizer, max_batch_tokens=budget)
    results = run(core, request(core, PROMPT, prompt_logprobs=3, max_tokens=2))
    check_prompt(results.choices["r", 0].prompt)
    assert core.model.num_rows == 39 + 2  # type: ignore[attr-defined]


def test_scores_of_a_prompt_survive_a_preemption(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, max_batch_tokens=16, prefix_cache=False)
    core.submit(
        request(
            core,
            PROMPT,
            prompt_logprobs=3,
            n=2,
            max_tokens=4,
            temperature=1.0,
            seed=1,
            ignore_eos=True,
        )
    )
    for steps in (2, 5):  # inside the prompt, and behind it
        for _ in range(steps):
            core.step()
            check(core)
        core.scheduler._preempt(core.scheduler.running[0])
    results = drain(core)
    for index in range(2):
        check_prompt(results.choices["r", index].prompt)
        assert len(results.ids(index=index)) == 4


@pytest.mark.parametrize("n", [1, 3])
def test_a_prompt_can_be_scored_without_generating(tokenizer: Tokenizer, n: int) -> None:
    core = core_of(tokenizer)
    results = run(core, request(core, PROMPT, prompt_logprobs=3, max_tokens=0, n=n))
    assert sorted(results.choices) == [("r", index) for index in range(n)]
    for choice in results.choices.values():
        check_prompt(choice.prompt)
        assert (choice.text, choice.tokens, choice.finish_reason) == ("", (), FinishReason.LENGTH)
    assert (results.finished["r"].prompt_tokens, results.finished["r"].completion_tokens) == (40, 0)
    assert core.model.num_rows == 39  # type: ignore[attr-defined]
    assert_all_free(core)


def test_scores_can_be_logits(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, logprobs_mode="raw_logits")
    results = run(core, request(core, PROMPT, prompt_logprobs=3, max_tokens=0))
    check_prompt(results.choices["r", 0].prompt, logits=True)


def test_a_long_prompt_is_projected_some_rows_at_a_time(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ScriptedModel(constant([0.0] * VOCAB), context_len=1024)
    core = scripted_core(model, tokenizer, num_blocks=256, max_batch_tokens=1024)
    run(core, request(core, [5] * 1000, prompt_logprobs=0, max_tokens=1))
    assert (model.num_rows, model.most_rows) == (1000, 256)

    monkeypatch.setattr(engine.core, "_MOST_BYTES", 7 * VOCAB * 4)
    core = scripted_core(model, tokenizer, num_blocks=256, max_batch_tokens=1024)
    model.most_rows = 0
    results = run(core, request(core, [5] * 1000, prompt_logprobs=0, max_tokens=1))
    assert model.most_rows == 7
    assert len(results.choices["r", 0].prompt) == 1000


def test_an_infinite_logit_is_certain(tokenizer: Tokenizer) -> None:
    row = [0.0] * VOCAB
    row[6] = INF
    core = core_of(tokenizer, constant(row))
    results = run(
        core, request(core, [5, 6], prompt_logprobs=1, logprobs=1, max_tokens=2, temperature=1.0)
    )
    choice = results.choices["r", 0]
    assert results.ids() == [6, 6]
    assert [token.logprob for token in (*choice.tokens, *choice.prompt[1:])] == [0.0] * 3


# -- failures


def beside(core: EngineCore, good: list[int], *bad: Any) -> None:
    """Bad requests fail, and the one beside them gets what it gets alone; then all is free."""
    alone = run(core, request(core, good, "good", temperature=1.0, seed=1))
    results = run(core, request(core, good, "good", temperature=1.0, seed=1), *bad)
    assert set(results.failed) == {one.request_id for one in bad}
    assert results.choices["good", 0] == alone.choices["good", 0]
    for failed in results.failed.values():
        assert isinstance(failed.error, GenerationFailed)
    assert not any(delta.request_id in results.failed for delta in results.deltas)
    assert_all_free(core)


def not_numbers_after(token_id: int) -> Script:
    """Pseudo-random rows, but one of NaN after this token."""

    def script(token: int, position: int) -> Tensor:
        row = pseudo_random(token, position).clone()
        row[token_id] = -INF
        return torch.full_like(row, NAN) if token == token_id else row

    return script


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([5, 6, 7, 8, 9, 99], {}),
        ([5, 6, 7, 8, 9, 99], {"temperature": 1.0, "top_p": 0.5, "n": 2}),
        ([5, 6, 99, 8, 9, 10], {"prompt_logprobs": 1}),
        ([5, 6, 99, 8, 9, 10], {"prompt_logprobs": 1, "max_tokens": 0, "n": 2}),
        ([5, 99, 7, 8, 9, 99], {"prompt_logprobs": 1}),
    ],
)
def test_logits_that_are_not_numbers_fail_their_request_only(
    tokenizer: Tokenizer, prompt: list[int], options: dict[str, Any]
) -> None:
    core = core_of(tokenizer, not_numbers_after(99), max_batch_tokens=16)
    beside(core, [5, 6, 7, 8, 9], request(core, prompt, "bad", **options))


def test_what_a_failed_request_computed_is_not_found_in_the_cache(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, not_numbers_after(99))
    failed = run(core, request(core, [*range(20, 29), 99]))
    assert set(failed.failed) == {"r"}
    again = run(core, request(core, list(range(20, 30))))
    assert again.finished["r"].cached_tokens == 0


class NotNumbersInTheCache(ScriptedModel):
    """Keys and values of token 99 are not numbers."""

    def forward(self, inputs: Any, cache: Any, attention: Any) -> Tensor:
        ids = inputs.token_ids.float().masked_fill(inputs.token_ids == 99, NAN)
        kept = ids[:, None, None].expand(-1, 1, 16).contiguous()
        seen = attention.attend(
            torch.zeros_like(kept), kept, kept, cache[0], inputs.attention, scale=1.0
        )
        return torch.stack((ids, inputs.positions.float(), seen[:, 0, 0]), dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        rows = [
            pseudo_random(0 if math.isnan(seen) else int(token), int(position)).clone()
            + (NAN if math.isnan(seen) else 0.0)
            for token, position, seen in hidden.tolist()
        ]
        return torch.stack(rows)


@pytest.mark.parametrize("plain", [False, True])
def test_keys_that_are_not_numbers_spoil_no_other_sequence(
    tokenizer: Tokenizer, plain: bool
) -> None:
    core = scripted_core(NotNumbersInTheCache(), tokenizer, num_blocks=12)
    if plain:
        core.runners[0].attention = TorchPagedAttention(4, "cpu")
    banned = {"logit_bias": {"99": -100}}
    run(core, request(core, [4] * 6, "first", max_tokens=1))  # had the first blocks
    for index in range(3):
        core.submit(request(core, [5 + index] * (1 + 4 * index), f"good{index}", **banned))
    core.step()
    free = core.scheduler.pool.num_free
    core.submit(request(core, [99] * 4 * free, "bad"))  # while the others go on
    results = drain(core)
    assert set(results.failed) == {"bad"}
    after = run(core, *(request(core, [9] * 5, f"after{index}", **banned) for index in range(3)))
    assert not after.failed


@pytest.mark.parametrize(
    "error",
    [RuntimeError, AttributeError, ValueError, IndexError, AssertionError, ZeroDivisionError],
)
def test_a_strategy_that_raises_fails_its_request_only(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    class Broken(Plain):
        width = 2
        copies = 2
        streams = True

        def advance(self, live: list[Sequence], view: View) -> list[Branch]:
            if live[0].num_generated == 2:
                raise error("secret")
            return [Branch(one, (token,)) for one, token in zip(live, view.tokens, strict=True)]

        def rank(self, finished: list[Sequence]) -> list[Sequence]:
            return finished

    core = core_of(tokenizer)
    choose = engine.core.choose
    monkeypatch.setattr(
        engine.core,
        "choose",
        lambda request: Broken() if request.params.n == 2 else choose(request),
    )
    beside(core, [5, 6, 7], request(core, [8, 9], "bad", n=2, ignore_eos=True))
    failed = run(core, request(core, [8, 9], "bad", n=2, ignore_eos=True)).failed["bad"]
    assert str(failed.error) == "generation failed unexpectedly"


# -- what is told


def test_streamed_deltas_add_up_to_the_whole_answer(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer)
    options: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 3, "logprobs": 2, "stop": "the"}
    whole = run(core, request(core, [5, 6], max_tokens=12, **options))
    streamed = run(core, request(core, [5, 6], max_tokens=12, stream=True, **options))
    assert streamed.choices == whole.choices
    assert len(whole.deltas) == 2
    assert len(streamed.deltas) > 10
    for index in range(2):
        own = [delta for delta in streamed.deltas if delta.index == index]
        assert [delta.finish_reason is None for delta in own] == [True] * (len(own) - 1) + [False]
        assert all(delta.text or delta.tokens for delta in own[:-1])


def test_times_and_counts_of_a_finished_request(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, max_num_seqs=1)
    results = run(core, *(request(core, [5, 6], name, ignore_eos=True) for name in "ab"))
    a, b = results.finished["a"], results.finished["b"]
    for one in (a, b):
        assert one.arrival_s <= one.scheduled_s <= one.first_token_s <= one.finished_s
    assert a.finished_s <= b.scheduled_s
    assert a.longest_tokens == a.completion_tokens == 8


def test_stats_say_how_full_the_engine_is(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer, max_num_seqs=2, num_blocks=10)
    for name in "abc":
        core.submit(request(core, [5, 6, 7, 8, 9], name, n=1, ignore_eos=True))
    assert (core.stats().num_waiting, core.stats().kv_usage) == (3, 0.0)
    _, first = core.step()
    _, second = core.step()
    assert (first.num_running, first.num_waiting, first.num_tokens) == (2, 1, 10)
    assert first.kv_usage == pytest.approx(0.4)
    assert (first.token_gaps_s, len(second.token_gaps_s)) == ((), 2)
    assert all(gap >= 0 for gap in second.token_gaps_s)
    drain(core)
    assert (core.stats().num_running, core.stats().num_waiting, core.stats().kv_usage) == (0, 0, 0)


def test_messages_of_an_aborted_request_stop_at_once(tokenizer: Tokenizer) -> None:
    core = core_of(tokenizer)
    core.submit(request(core, [5, 6], "gone", stream=True, ignore_eos=True))
    core.submit(request(core, [5, 7], "stays", stream=True, ignore_eos=True))
    core.step()
    core.abort("gone")
    results = drain(core)
    assert {delta.request_id for delta in results.deltas} == {"stays"}
    assert set(results.finished) == {"stays"}
    assert_all_free(core)
