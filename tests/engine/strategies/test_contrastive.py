"""Contrastive search against the paper's formula in a loop, and worked numbers."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from engine.core import EngineCore
from engine.growth import grow
from engine.messages import Candidate, FinishReason, Request, Token
from engine.strategies.base import View
from engine.strategies.contrastive import Contrastive
from engine.text import Detokenizer, TextStream
from engine.tokenizer import Tokenizer
from engine.types import Sequence
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

Process = Callable[[list[int], Tensor], Tensor]  # the tokens so far and their logits [V]


class Oracle:
    """A tiny model in both programs. Some of its tokens end a text."""

    def __init__(self, folder: Path) -> None:
        self.core, _ = tiny_core(folder, kv_cache_memory=1 << 23)
        self.model = tiny.load(folder).double()

    def request(self, prompt: list[int], request_id: str = "r", **options: Any) -> Request:
        made = request(self.core, prompt, request_id, **options)
        return replace(made, eos_token_ids=frozenset(ENDS))

    def search(
        self,
        prompt: list[int],
        alpha: float,
        k: int,
        max_tokens: int,
        process: Process = lambda _, logits: logits,
    ) -> tuple[list[int], float]:
        """What the paper's loop chooses, and by how much the closest decision was made."""
        ids, closest = list(prompt), math.inf
        logits, states = self._forward([ids])
        while len(ids) < len(prompt) + max_tokens:
            probs = process(ids, logits[0, -1]).softmax(-1)
            own, tokens = probs.sort(descending=True, stable=True)
            candidates = [int(token) for token in tokens[:k] if probs[token] > 0.0]
            # As the paper has it, each candidate's state and those before it.
            logits, states = self._forward([[*ids, token] for token in candidates])
            scores = []
            for prob, state in zip(own.tolist(), states, strict=False):
                cosines = torch.nn.functional.cosine_similarity(state[-1:], state[:-1], dim=-1)
                scores.append((1 - alpha) * prob - alpha * float(cosines.max()))
            best = max(range(len(scores)), key=lambda index: scores[index])
            others = [score for index, score in enumerate(scores) if index != best]
            closest = min(closest, scores[best] - max(others, default=-math.inf))
            ids.append(candidates[best])
            logits = logits[best, None]
            if ids[-1] in ENDS:
                break
        return ids[len(prompt) :], closest

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Logits [S, T, V] and final hidden states [S, T, H], after the norm."""
        output = self.model(torch.tensor(ids), output_hidden_states=True)
        return output.logits.double(), output.hidden_states[-1].double()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    model = tiny.hf_model("llama", initializer_range=0.15)
    return Oracle(tiny.save(model, tmp_path_factory.mktemp("contrastive")))


def compare(
    oracle: Oracle,
    prompts: list[list[int]],
    alpha: float,
    k: int,
    process: Process = lambda _, logits: logits,
    **options: Any,
) -> list[list[int]]:
    """Run all prompts together, hold each against the loop, and return what was generated."""
    requests = [
        oracle.request(
            prompt, str(index), penalty_alpha=alpha, top_k=k, **({"max_tokens": 10} | options)
        )
        for index, prompt in enumerate(prompts)
    ]
    results = run_checked(oracle.core, *requests)
    for index, prompt in enumerate(prompts):
        want, closest = oracle.search(prompt, alpha, k, requests[index].max_tokens, process)
        assert closest > 1e-6, "these prompts decide nothing: rounding does"
        assert results.ids(str(index)) == want, (alpha, k, prompt)
        stopped = want[-1] in ENDS
        assert results.choices[str(index), 0].finish_reason == ("stop" if stopped else "length")
        assert results.finished[str(index)].completion_tokens == len(want)
    return [results.ids(str(index)) for index in range(len(prompts))]


# -- worked numbers


def sequence_of(core: EngineCore, prompt: list[int]) -> Sequence:
    return Sequence(0, 0, prompt, len(prompt), TextStream(Detokenizer(core.tokenizer, True)))


@pytest.mark.parametrize(
    ("alpha", "want"),
    [(0.6, 1), (0.4, 0), (0.0, 0), (1.0, 1)],  # 0.6: [-0.40, -0.36]; 0.4: [-0.10, -0.14]
)
def test_worked_example_of_the_score(tokenizer: Tokenizer, alpha: float, want: int) -> None:
    core = scripted_core(ScriptedModel(), tokenizer)
    made = request(core, [5, 6], penalty_alpha=alpha, top_k=2)
    strategy = Contrastive(made)
    # The prompt's states, of any length; the candidates have cosines of 1 and 0.8 to the nearest.
    strategy.remember(0, torch.tensor([[0.0, -3.0]]))
    strategy.remember(1, torch.tensor([[7.0, 0.0]]))
    start = sequence_of(core, [5, 6])
    top = [Candidate(Token(8, ""), math.log(0.5)), Candidate(Token(9, ""), math.log(0.3))]
    drafts = strategy.advance([start], View([top[0].token], [top]))
    assert [branch.tokens[0].id for branch in drafts] == [8, 9]
    assert all(branch.draft for branch in drafts)
    live = [sequence_of(core, [5, 6]) for _ in drafts]
    for sequence, branch in zip(live, drafts, strict=True):
        grow(made, sequence, branch)
    following = [[Candidate(Token(10 + index, ""), -0.1)] for index in range(2)]
    hidden = torch.tensor([[2.0, 0.0], [4.0, 3.0]])
    (branch,) = strategy.advance(live, View([top[0].token] * 2, following, hidden=hidden))
    assert branch.parent is live[want]
    assert branch.tokens[0].id == 10 + want
    # The winner's state is one of those before from now on, the loser's is not.
    assert strategy.before is not None
    assert strategy.num_before == 3
    kept = hidden[want] / hidden[want].norm()
    assert strategy.before[2].tolist() == pytest.approx(kept.tolist())


def test_of_equal_candidates_the_likelier_wins_and_then_the_lower_id(tokenizer: Tokenizer) -> None:
    row = torch.zeros(tiny.VOCAB)
    row[[40, 50, 60]] = 5.0
    # All hidden states are parallel, so likelihood alone decides.
    model = ScriptedModel(lambda _token, _position: row.clone())
    model.forward = lambda inputs, *_: torch.ones(len(inputs.token_ids), 3)
    core = scripted_core(model, tokenizer)
    options: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": 3, "max_tokens": 3}
    assert run(core, request(core, [5], **options)).ids() == [40, 40, 40]
    options["logit_bias"] = {"60": 0.5}
    assert run(core, request(core, [5], **options)).ids() == [60, 60, 60]


# -- the loop


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0])
def test_tokens_are_those_of_the_papers_loop(oracle: Oracle, alpha: float, k: int) -> None:
    compare(oracle, prompts_of(5, seed=k), alpha, k)


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 4, 16])
@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0])
def test_hundreds_of_texts_are_those_of_the_papers_loop(
    oracle: Oracle, alpha: float, k: int
) -> None:
    compare(oracle, prompts_of(24, seed=100 + k), alpha, k, max_tokens=12)


def test_another_family_has_final_states_of_its_own(tmp_path: Path) -> None:
    """Here a bias moves what the norm leaves."""
    oracle = Oracle(tiny.save(tiny.hf_model("gpt-neox", initializer_range=0.15), tmp_path))
    compare(oracle, prompts_of(4, seed=9), 0.6, 4)


def test_without_alpha_it_is_greedy(oracle: Oracle) -> None:
    prompts = prompts_of(5, seed=1)
    requests = [oracle.request(prompt, str(i)) for i, prompt in enumerate(prompts)]
    greedy = run(oracle.core, *requests)
    for k in (2, 7):
        got = compare(oracle, prompts, 0.0, k, max_tokens=8)
        assert got == [greedy.ids(str(i)) for i in range(len(prompts))]
    other = compare(oracle, prompts, 0.6, 4, max_tokens=8)
    assert sum(one != two for one, two in zip(got, other, strict=True)) > 3


def test_the_texts_that_are_compared_differ(oracle: Oracle) -> None:
    """So that the tests around this one show something."""
    prompts = prompts_of(5, seed=2)
    found = {
        (alpha, k): compare(oracle, prompts, alpha, k)
        for alpha, k in ((0.3, 4), (0.6, 4), (1.0, 4), (0.6, 2), (0.6, 8))
    }
    for one in found:
        for other in found:
            same = sum(a == b for a, b in zip(found[one], found[other], strict=True))
            assert one == other or same < 4
    lengths = [len(ids) for texts in found.values() for ids in texts]
    assert min(lengths) < 5
    assert max(lengths) == 10


def processor(kind: str, value: Any, prompt_len: int) -> Process:
    processors: dict[str, Callable[[], Any]] = {
        "repetition_penalty": lambda: transformers.RepetitionPenaltyLogitsProcessor(value),
        "no_repeat_ngram_size": lambda: transformers.NoRepeatNGramLogitsProcessor(value),
        "min_tokens": lambda: transformers.MinNewTokensLengthLogitsProcessor(
            prompt_len, value, list(ENDS)
        ),
        "logit_bias": lambda: transformers.SequenceBiasLogitsProcessor(
            {(int(token),): bias for token, bias in value.items()}
        ),
        "allowed_token_ids": lambda: transformers.PrefixConstrainedLogitsProcessor(
            lambda _batch, _ids: value, 1
        ),
    }
    made = processors[kind]()
    return lambda ids, logits: made(torch.tensor([ids]), logits[None])[0]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7},
        {"no_repeat_ngram_size": 1},
        {"min_tokens": 7},
        {"logit_bias": {str(token): 3.0 for token in ENDS[:3]} | {"40": -5.0}},
        {"allowed_token_ids": [*range(30, 50), *ENDS]},
        {"allowed_token_ids": [30, 31, 32]},  # fewer than candidates are asked for
    ],
    ids=str,
)
def test_penalties_and_bans_act_on_every_candidate(oracle: Oracle, options: dict[str, Any]) -> None:
    ((kind, value),) = options.items()
    acted = 0
    for prompt_len in (1, 6):
        prompts = [(prompt * 6)[:prompt_len] for prompt in prompts_of(3, seed=prompt_len)]
        process = processor(kind, value, prompt_len)
        found = compare(oracle, prompts, 0.6, 5, process, **options)
        plain = [
            oracle.request(p, str(i), penalty_alpha=0.6, top_k=5) for i, p in enumerate(prompts)
        ]
        results = run(oracle.core, *plain)
        acted += sum(ids[:8] != results.ids(str(i)) for i, ids in enumerate(found))
        if kind == "min_tokens":
            assert all(len(ids) >= 8 for ids in found)
        if kind == "no_repeat_ngram_size":
            for prompt, ids in zip(prompts, found, strict=True):
                assert len({*prompt, *ids}) == len({*prompt}) + len(ids)
    assert acted


def test_where_nothing_is_allowed_it_ends(tokenizer: Tokenizer) -> None:
    def script(token: int, _position: int) -> Tensor:
        row = torch.full((tiny.VOCAB,), -math.inf)
        if token != 41:
            row[[40, 41]] = torch.tensor([1.0, 0.5])
        return row

    core = scripted_core(ScriptedModel(script), tokenizer)
    options: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": 3, "max_tokens": 5}
    for prompt, want in (([5], [40]), ([41], [])):
        results = run_checked(core, request(core, prompt, bad_words=["zzz"], **options))
        assert results.ids()[:1] == want
    choice = results.choices["r", 0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "no_valid_token")


# -- ends, and what leaves


def test_a_stop_string_ends_it_where_it_is_first_complete(oracle: Oracle) -> None:
    options: dict[str, Any] = {
        "penalty_alpha": 0.6,
        "top_k": 4,
        "max_tokens": 14,
        "ignore_eos": True,
    }
    stopped = 0
    for prompt in prompts_of(2, seed=3):
        whole = run(oracle.core, oracle.request(prompt, **options))
        text, tokens = whole.text(), whole.choices["r", 0].tokens
        special = oracle.core.tokenizer.special
        ends = list(accumulate(len(one.text) * (one.id not in special) for one in tokens))
        for start in range(0, len(text) - 3, 3):
            stop = text[start : start + 2]
            if not stop.isascii():
                continue
            stopped += 1
            cut = text.index(stop)
            needed = next(count for count, end in enumerate(ends, 1) if end >= cut + len(stop))
            for kept, end in ((False, cut), (True, cut + len(stop))):
                asked = oracle.request(
                    prompt, stop=[stop], include_stop_str_in_output=kept, stream=kept, **options
                )
                results = run_checked(oracle.core, asked)
                assert results.text() == text[:end]
                assert results.ids() == whole.ids()[:needed]
                assert results.choices["r", 0].finish_reason is FinishReason.STOP
                assert results.choices["r", 0].stop_reason == stop
    assert stopped > 4


def test_a_stream_has_each_token_once_and_as_soon_as_it_is_sure(oracle: Oracle) -> None:
    options: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": 5, "max_tokens": 9, "logprobs": 3}
    # Characters of one byte, so that none waits for another.
    options["allowed_token_ids"] = [*range(3, 90)]
    for prompt in prompts_of(3, seed=4):
        asked = oracle.request(prompt, ignore_eos=True, **options)
        whole = run(oracle.core, asked)
        oracle.core.submit(replace(asked, stream=True))
        results, sizes = Results(), []
        for _ in range(10):
            before = len(results.deltas)
            collect(results, oracle.core.step()[0])
            sizes.append([len(delta.tokens) for delta in results.deltas[before:]])
        # The first step finds candidates, each later one the winner among them.
        assert sizes == [[], *[[1]] * 9]
        assert results.merge().choices == whole.choices


def test_logprobs_are_the_models_own(oracle: Oracle) -> None:
    prompt = prompts_of(1, seed=6)[0]
    options: dict[str, Any] = {
        "penalty_alpha": 0.6,
        "top_k": 4,
        "logprobs": 2,
        "repetition_penalty": 1.3,
    }
    tokens = run(oracle.core, oracle.request(prompt, **options)).choices["r", 0].tokens
    ids = [*prompt, *(token.id for token in tokens)]
    rows = oracle._forward([ids])[0][0].log_softmax(-1)
    for place, token in enumerate(tokens, start=len(prompt)):
        assert token.logprob == pytest.approx(float(rows[place - 1, token.id]), abs=1e-4)
        best = rows[place - 1].topk(2)
        assert [one for one, _ in token.top] == best.indices.tolist()
        assert [own for _, own in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


# -- cost, company, and what is given back


def test_a_token_costs_one_step_of_k_rows_and_copies_only_part_of_a_block(oracle: Oracle) -> None:
    plans = record_plans(core := cramped(oracle.core, 64))
    run_checked(core, oracle.request([5, 6, 7], penalty_alpha=0.6, top_k=4, ignore_eos=True))
    assert [plan.num_tokens for plan in plans] == [3] + [4] * 8
    for plan in plans:
        # Of those who share a block the last one writes to it, the others to copies.
        assert len(plan.copies) in (0, 3)
        assert all(0 < copy.num_tokens < 4 for copy in plan.copies)


def test_a_prompt_in_parts_gives_the_same(oracle: Oracle) -> None:
    prompts = [(prompt * 30)[:30] for prompt in prompts_of(4, seed=11)]
    requests = [
        oracle.request(prompt, str(index), penalty_alpha=0.6, top_k=4)
        for index, prompt in enumerate(prompts)
    ]
    parts = cramped(oracle.core, 128, max_batch_tokens=17)
    plans = record_plans(parts)
    assert_the_same_in_company(oracle.core, parts, *requests)
    assert any(chunk.end < 30 for plan in plans for chunk in plan.chunks)


def mixed(oracle: Oracle, count: int) -> list[Request]:
    """Contrastive requests and others."""
    kinds: list[dict[str, Any]] = [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"temperature": 1.0, "seed": 3},
        {"penalty_alpha": 0.3, "top_k": 2, "repetition_penalty": 1.3},
        {"use_beam_search": True, "beam_width": 3, "n": 2},
        {"penalty_alpha": 1.0, "top_k": 5, "logprobs": 2},
        {"n": 2, "temperature": 0.7, "seed": 4},
        {"penalty_alpha": 0.6, "top_k": 3, "min_tokens": 6},
    ]
    prompts = prompts_of(count, seed=12)
    return [
        oracle.request(prompt, str(index), max_tokens=10, **kinds[index % len(kinds)])
        for index, prompt in enumerate(prompts)
    ]


def test_company_changes_nothing(oracle: Oracle) -> None:
    assert_the_same_in_company(oracle.core, oracle.core, *mixed(oracle, 7))


def test_neither_does_preemption(oracle: Oracle) -> None:
    short = cramped(oracle.core, 18)
    assert_the_same_in_company(oracle.core, short, *mixed(oracle, 12))
    assert short.scheduler.num_preemptions > 1


def test_aborted_midway_it_gives_everything_back(oracle: Oracle) -> None:
    asked = oracle.request([5, 6, 7], "it", penalty_alpha=0.6, top_k=4, ignore_eos=True)
    assert_an_abort_leaves_nothing(oracle.core, asked, oracle.request([8, 9], "other"))


def test_failing_midway_it_gives_everything_back(oracle: Oracle) -> None:
    asked = oracle.request([5, 6, 7], "it", penalty_alpha=0.6, top_k=4, ignore_eos=True)
    assert_an_error_leaves_nothing(oracle.core, asked, oracle.request([8, 9], "other"))


def test_nobody_is_told_of_a_candidate_that_has_not_won_yet(oracle: Oracle) -> None:
    core = oracle.core
    core.submit(oracle.request([5, 6], penalty_alpha=0.6, top_k=3, stream=True, ignore_eos=True))
    for number in range(1, 4):
        messages, _ = core.step()
        assert len(messages) == (number > 1)
        (group,) = core.scheduler.running
        assert len(group.live) == 3
        for sequence in group.live:
            assert sequence.num_generated == number
            assert len(sequence.pending) == 1
            assert sequence.tokens == []
    core.abort("r")
    assert_all_free(core)
