"""Beam search against transformers' `generate`, worked numbers and naive searches."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.strategies.beam import Score
from engine.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.beams import ENDS, START, A, B, E, beams, hypotheses, prompts_of, toy_core
from tests.support.engines import Results, assert_all_free, run, scripted_core, tiny_core
from tests.support.scripted import ScriptedModel, constant


@pytest.mark.parametrize(
    ("stopping", "alpha", "want"),
    [
        (False, 1.0, [([B, E], -0.510826), ([A, E], -0.804719)]),
        (True, 1.0, [([B, E], -0.510826), ([A, E], -0.804719)]),
        ("never", 1.0, [([B, E], -0.510826), ([A, B, E], -0.667494)]),
        ("never", 2.0, [([A, B, E], -0.222498), ([B, E], -0.255413)]),
        ("never", 0.0, [([B, E], -1.021651), ([A, E], -1.609438)]),
    ],
)
def test_worked_examples_of_stopping(
    tokenizer: Tokenizer, stopping: Any, alpha: float, want: list[tuple[list[int], float]]
) -> None:
    core = toy_core(tokenizer)
    options = {"max_tokens": 3, "n": 2, "early_stopping": stopping, "length_penalty": alpha}
    got = hypotheses(run(core, beams(core, [START], **options)))
    assert [ids for ids, _ in got] == [ids for ids, _ in want]
    assert [score for _, score in got] == pytest.approx([score for _, score in want], abs=1e-5)
    assert_all_free(core)


def test_worked_example_of_the_gnmt_length_penalty(tokenizer: Tokenizer) -> None:
    core = toy_core(tokenizer)
    options = {"max_tokens": 3, "n": 2, "length_penalty": 0.6, "length_penalty_type": "gnmt"}
    got = hypotheses(run(core, beams(core, [START], **options)))
    assert got[0] == ([B, E], pytest.approx(-0.931396, abs=1e-5))
    assert got[1] == ([A, E], pytest.approx(-1.467257, abs=1e-5))


# -- transformers

RULES: list[dict[str, Any]] = [
    {"early_stopping": stopping, "length_penalty": penalty}
    for stopping in (True, False, "never")
    for penalty in (1.0, 0.0, 2.0, -0.5)
]


class Oracle:
    """A model in both programs. Of a tiny one more tokens end a text, so that searches do end."""

    def __init__(self, folder: Path, ends: tuple[int, ...] = ENDS, memory: int = 1 << 25) -> None:
        self.core, _ = tiny_core(folder, prefix_cache=True, kv_cache_memory=memory)
        self.model = tiny.load(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        self.ends = ends

    def search(self, prompts: list[list[int]], **options: Any) -> Results:
        """All prompts together."""
        requests = [
            beams(self.core, prompt, str(index), self.ends, **options)
            for index, prompt in enumerate(prompts)
        ]
        results = run(self.core, *requests)
        assert not results.failed
        assert_all_free(self.core)
        return results

    def ours(self, prompts: list[list[int]], **options: Any) -> list[list[tuple[list[int], float]]]:
        """The hypotheses of each prompt."""
        results = self.search(prompts, **options)
        return [hypotheses(results, str(index)) for index in range(len(prompts))]

    def theirs(
        self, prompt: list[int], width: int, n: int, max_tokens: int, **options: Any
    ) -> list[tuple[list[int], float]]:
        ends = options.pop("eos_token_id", list(self.ends))
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([prompt]),
                num_beams=width,
                num_return_sequences=n,
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
                tokenizer=self.tokenizer if "stop_strings" in options else None,
                **options,
            )
        found = []
        for ids, score in zip(output.sequences, output.sequences_scores.tolist(), strict=True):
            tokens = ids[len(prompt) :].tolist()
            found.append((tokens[: self.cut(tokens, ends, options.get("stop_strings", []))], score))
        return found

    def cut(self, tokens: list[int], ends: list[int], stops: list[str]) -> int:
        """How many tokens of a padded output count."""
        text = ""
        for count, token in enumerate(tokens, start=1):
            text += self.core.tokenizer.text_of(token)
            if token in ends or any(stop in text for stop in stops):
                return count
        return len(tokens)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    # Less peaked than the other tiny models: hypotheses shall compete.
    model = tiny.hf_model("llama", initializer_range=0.15)
    return Oracle(tiny.save(model, tmp_path_factory.mktemp("beams")))


def assert_same(
    got: list[tuple[list[int], float]], want: list[tuple[list[int], float]], *about: Any
) -> None:
    assert [ids for ids, _ in got] == [ids for ids, _ in want], about
    assert [s for _, s in got] == pytest.approx([s for _, s in want], rel=1e-5, abs=2e-5), about


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_hypotheses_are_those_of_transformers(oracle: Oracle, rules: dict[str, Any]) -> None:
    for width in (1, 2, 3, 5, 8, 16) if rules["length_penalty"] == 1.0 else (2, 4):
        n = max(width // 2, 1)
        prompts = prompts_of(3, seed=width)
        got = oracle.ours(prompts, beam_width=width, n=n, max_tokens=9, **rules)
        for prompt, ours in zip(prompts, got, strict=True):
            # Without beams its greedy search has no scores.
            if width > 1:
                assert_same(ours, oracle.theirs(prompt, width, n, 9, **rules), width, prompt)


def test_the_hypotheses_that_are_compared_differ(oracle: Oracle) -> None:
    """So that the tests around this one show something."""
    found = oracle.ours(prompts_of(20, seed=4), beam_width=4, n=4, max_tokens=9)
    assert {len(ids) for one in found for ids, _ in one} >= {4, 6, 8, 9}
    greedy = oracle.ours(prompts_of(20, seed=4), beam_width=1, max_tokens=9)
    assert sum(one[0][0] != wide[0][0] for one, wide in zip(greedy, found, strict=True)) > 8


_SOME = list(range(3, 90, 2))

PROCESSED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"logit_bias": {"7": 4.0, "30": -100.0, "64": 1.5}},
        {"sequence_bias": [[[7], 4.0], [[30], -100.0], [[64], 1.5]]},
    ),
    ({"bad_words": ["8", "V", "on", "th", "0a"]}, {"bad_words_ids": "of the words"}),
    ({"allowed_token_ids": _SOME}, {"prefix_allowed_tokens_fn": lambda *_: _SOME}),
    ({"stop_token_ids": [0, 33, 57]}, {"eos_token_id": [*ENDS, 0, 33, 57]}),
    ({"stop": ["8", "V", "4n"]}, {"stop_strings": ["8", "V", "4n"]}),
    (
        {"stop": ["8", "V", "4n"], "logit_bias": {"7": 4.0}, "no_repeat_ngram_size": 3},
        {
            "stop_strings": ["8", "V", "4n"],
            "sequence_bias": [[[7], 4.0]],
            "no_repeat_ngram_size": 3,
        },
    ),
    ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    ({"min_tokens": 5}, {"min_new_tokens": 5}),
    (
        {"repetition_penalty": 0.8, "no_repeat_ngram_size": 1, "min_tokens": 3},
        {"repetition_penalty": 0.8, "no_repeat_ngram_size": 1, "min_new_tokens": 3},
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), PROCESSED, ids=lambda options: "-".join(options))
def test_penalties_and_bans_apply_to_every_beam(
    oracle: Oracle, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    if "bad_words" in ours:
        encode = oracle.core.tokenizer.encode
        theirs = {"bad_words_ids": [encode(word, False) for word in ours["bad_words"]]}
    prompts = prompts_of(4, seed=1)
    rules = {"beam_width": 4, "n": 3, "max_tokens": 9, "sampler_order": "hf"}
    rules["length_penalty"] = 0.0  # favours hypotheses that end
    plain = oracle.ours(prompts, **rules)
    got = oracle.ours(prompts, **rules, **ours)
    for prompt, one in zip(prompts, got, strict=True):
        want = oracle.theirs(prompt, 4, 3, 9, length_penalty=0.0, **theirs)
        assert_same(one, want, prompt)
    # It makes a difference.
    pairs = zip(got, plain, strict=True)
    assert sum([a for a, _ in one] != [b for b, _ in other] for one, other in pairs) > 1


# -- a naive search, for what transformers does not have


@dataclass
class Open:
    """A hypothesis: its output, the sum of its logprobs, and that less what it has cost."""

    ids: tuple[int, ...] = ()
    plain: float = 0.0
    total: float = 0.0
    coverage: torch.Tensor | None = None


@dataclass
class Naive:
    """Beam search as the formulas have it, in float64 and without a cache."""

    model: Any
    prompt: list[int]
    width: int
    max_tokens: int
    divisor: Callable[[int, bool], float]  # of a length, and whether it ends by a token for that
    num_groups: int = 1
    diversity: float = 0.0
    coverage_penalty: float = 0.0
    prune: float = math.inf
    adjust: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor] = lambda logits, _ids: logits
    stops: Callable[[tuple[int, ...]], bool] = lambda _ids: False
    finished: dict[int, list[tuple[float, Open]]] = field(default_factory=dict)  # by group

    def look(self, ids: tuple[int, ...]) -> tuple[list[float], torch.Tensor | None]:
        """The next tokens' logprobs, and how the last one attends to the prompt."""
        wanted = self.coverage_penalty > 0.0
        with torch.inference_mode():
            output = self.model(torch.tensor([[*self.prompt, *ids]]), output_attentions=wanted)
        logits = self.adjust(output.logits[0, -1].double(), ids)
        if not wanted:
            return logits.log_softmax(-1).tolist(), None
        upper = output.attentions[len(output.attentions) // 2 :]
        rows = torch.stack([layer[0, :, -1, : len(self.prompt)].double() for layer in upper])
        seen = rows.mean((0, 1))
        return logits.log_softmax(-1).tolist(), seen / seen.sum()

    def score(self, one: Open, total: float) -> float:
        own = total / self.divisor(len(one.ids), one.ids[-1] in ENDS)
        if one.coverage is not None:
            own += self.coverage_penalty * float(one.coverage.clamp(1e-10, 1.0).log().sum())
        return own

    def ends(self, ids: tuple[int, ...]) -> bool:
        return ids[-1] in ENDS or len(ids) == self.max_tokens or self.stops(ids)

    def search(self, n: int) -> list[tuple[list[int], float]]:
        live = {group: [Open()] for group in range(self.num_groups)}
        self.finished = {group: [] for group in live}
        for _ in range(self.max_tokens):
            chosen: Counter[int] = Counter()
            for group in live:
                if live[group]:
                    live[group] = self.advance(group, live[group], chosen)
                    chosen.update(one.ids[-1] for one in live[group])
        best = [(self.score(o, o.plain), o) for own in self.finished.values() for _, o in own]
        best.sort(key=lambda pair: -pair[0])
        return [(list(o.ids), s) for s, o in best[:n] if s >= best[0][0] - self.prune]

    def advance(self, group: int, live: list[Open], chosen: Counter[int]) -> list[Open]:
        """The group's next beams; none when it is done."""
        size = self.width // self.num_groups
        candidates: list[tuple[float, Open]] = []  # with their own logprobs
        for one in live:
            logprobs, seen = self.look(one.ids)
            coverage = seen if one.coverage is None else one.coverage + seen
            for token, logprob in enumerate(logprobs):
                cost = self.diversity * chosen[token]
                total = one.total + logprob - cost
                longer = Open((*one.ids, token), one.plain + logprob, total, coverage)
                candidates.append((logprob, longer))
        least = max(logprob for logprob, _ in candidates) - self.prune
        ranked = [one for logprob, one in candidates if logprob >= least]
        ranked.sort(key=lambda one: -one.total)
        going = [one for one in ranked if not self.ends(one.ids)][:size]
        done = self.finished[group]
        done += [(self.score(o, o.total), o) for o in ranked[:size] if self.ends(o.ids)]
        done.sort(key=lambda pair: -pair[0])
        del done[size:]
        done[:] = [pair for pair in done if pair[0] >= done[0][0] - self.prune]
        if len(done) == size and going:
            best = going[0].total / self.divisor(len(going[0].ids), False)
            if best <= done[-1][0]:
                return []
        return going


def hf(penalty: float) -> Callable[[int, bool], float]:
    return lambda length, _ended: length**penalty


def gnmt(penalty: float) -> Callable[[int, bool], float]:
    return lambda length, _ended: ((5 + length) / 6) ** penalty


def vllm(penalty: float, prompt_len: int) -> Callable[[int, bool], float]:
    return lambda length, ended: (prompt_len + length - ended) ** penalty


def assert_as_naive(
    oracle: Oracle,
    naive: Callable[[list[int]], Naive],
    prompts: list[list[int]],
    n: int,
    **options: Any,
) -> None:
    """The hypotheses and scores are those of the naive search."""
    some = naive(prompts[0])
    options |= {"n": n, "beam_width": some.width, "max_tokens": some.max_tokens}
    got = oracle.ours(prompts, **options)
    for prompt, ours in zip(prompts, got, strict=True):
        want = naive(prompt).search(n)
        assert [ids for ids, _ in ours] == [ids for ids, _ in want], prompt
        assert [s for _, s in ours] == pytest.approx([s for _, s in want], abs=1e-4), prompt


def naive_of(oracle: Oracle, prompt: list[int], width: int, **options: Any) -> Naive:
    options = {"divisor": hf(1.0), "max_tokens": 6} | options
    return Naive(oracle.model, prompt, width, **options)


@pytest.mark.parametrize("penalty", [0.6, -0.5, 2.0])
@pytest.mark.parametrize("kind", ["hf", "gnmt", "vllm"])
def test_length_penalties(oracle: Oracle, kind: str, penalty: float) -> None:
    def naive(prompt: list[int]) -> Naive:
        divisors = {"hf": hf(penalty), "gnmt": gnmt(penalty), "vllm": vllm(penalty, len(prompt))}
        return naive_of(oracle, prompt, 4, divisor=divisors[kind])

    options = {"length_penalty": penalty, "length_penalty_type": kind}
    assert_as_naive(oracle, naive, prompts_of(3, seed=11), 4, **options)


@pytest.mark.parametrize("prune", [0.4, 1.5, 3.0])
def test_what_is_too_far_behind_is_pruned(oracle: Oracle, prune: float) -> None:
    assert_as_naive(
        oracle,
        lambda prompt: naive_of(oracle, prompt, 4, prune=prune),
        prompts_of(4, seed=12),
        4,
        beam_prune=prune,
    )


@pytest.mark.parametrize(("width", "num_groups"), [(2, 2), (4, 2), (6, 3), (4, 4)])
@pytest.mark.parametrize("diversity", [0.3, 5.0])
def test_groups_are_kept_off_what_those_before_chose(
    oracle: Oracle, width: int, num_groups: int, diversity: float
) -> None:
    def naive(prompt: list[int]) -> Naive:
        groups = {"num_groups": num_groups, "diversity": diversity}
        return naive_of(oracle, prompt, width, **groups)

    options = {"num_beam_groups": num_groups, "diversity_penalty": diversity}
    assert_as_naive(oracle, naive, prompts_of(2, seed=width), width, **options)


@pytest.mark.parametrize(("diversity", "second"), [(0.5, A), (0.6, B)])
def test_worked_example_of_diversity(tokenizer: Tokenizer, diversity: float, second: int) -> None:
    """Of .5, .3 and .2, the likeliest is worth less than the next to the second group with 0.6."""
    row = torch.full((tiny.VOCAB,), -1e9)
    row[[A, B, START]] = torch.tensor([0.5, 0.3, 0.2]).log()
    core = scripted_core(ScriptedModel(constant(row.tolist())), tokenizer)
    options = {"num_beam_groups": 2, "diversity_penalty": diversity, "max_tokens": 2}
    results = run(core, beams(core, [START], beam_width=2, n=2, **options))
    got = hypotheses(results)
    assert [ids[0] for ids, _ in got] == [A, second]
    # It is ranked without what that has cost.
    want = [math.log(0.5 * {A: 0.5, B: 0.3}[first]) / 2 for first in (A, second)]
    assert [score for _, score in got] == pytest.approx(want, abs=1e-5)


@pytest.fixture(scope="module")
def attentive(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Four layers, of which the upper two count, and a model that shows its attention."""
    model = tiny.hf_model("llama", initializer_range=0.2, num_hidden_layers=4)
    oracle = Oracle(tiny.save(model, tmp_path_factory.mktemp("attentive")))
    oracle.model.set_attn_implementation("eager")
    return oracle


@pytest.mark.parametrize("coverage", [0.2, 2.0])
@pytest.mark.parametrize("kind", ["gnmt", "hf"])
def test_coverage_is_the_attention_that_the_prompt_received(
    attentive: Oracle, kind: str, coverage: float
) -> None:
    def naive(prompt: list[int]) -> Naive:
        divisor = gnmt(0.4) if kind == "gnmt" else hf(0.4)
        return naive_of(attentive, prompt, 3, divisor=divisor, coverage_penalty=coverage)

    options = {"length_penalty": 0.4, "length_penalty_type": kind, "coverage_penalty": coverage}
    prompts = [[*prompt, 40, 41] for prompt in prompts_of(3, seed=13)]
    assert_as_naive(attentive, naive, prompts, 3, **options)
    plain = attentive.ours(prompts, beam_width=3, n=3, max_tokens=6, length_penalty=0.4)
    covered = attentive.ours(prompts, beam_width=3, n=3, max_tokens=6, **options)
    assert [one[0][1] for one in plain] != [one[0][1] for one in covered]


def test_worked_example_of_coverage(tokenizer: Tokenizer) -> None:
    """Received 1.3, .5 and .2: .2 · (0 + ln .5 + ln .2)."""
    made = beams(toy_core(tokenizer), [START], coverage_penalty=0.2)
    assert Score(made).coverage(torch.tensor([1.3, 0.5, 0.2])) == pytest.approx(-0.460517, abs=1e-6)


COUNTED: list[dict[str, Any]] = [
    {"presence_penalty": 1.0},
    {"frequency_penalty": 0.8, "logit_bias": {"7": 2.0}},
]


@pytest.mark.parametrize("options", COUNTED, ids="-".join)
def test_counting_penalties_know_each_beams_own_output(
    oracle: Oracle, options: dict[str, Any]
) -> None:
    def adjust(logits: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
        for token, bias in options.get("logit_bias", {}).items():
            logits[int(token)] += bias
        for token, count in Counter(ids).items():
            logits[token] -= options.get("presence_penalty", 0.0)
            logits[token] -= options.get("frequency_penalty", 0.0) * count
        return logits

    def naive(prompt: list[int]) -> Naive:
        return naive_of(oracle, prompt, 4, adjust=adjust)

    assert_as_naive(oracle, naive, prompts_of(3, seed=14), 3, **options)


# -- logprobs


def test_logprobs_are_those_of_each_beams_own_tokens(oracle: Oracle) -> None:
    """And of the prompt, for those who want it echoed; all as the model has them."""
    options = {"beam_width": 4, "n": 3, "max_tokens": 7, "presence_penalty": 0.7}
    prompts = prompts_of(4, seed=15)
    results = oracle.search(prompts, logprobs=2, prompt_logprobs=2, **options)
    num_unlikely = 0
    for (name, _), delta in results.choices.items():
        prompt, output = prompts[int(name)], [token.id for token in delta.tokens]
        with torch.inference_mode():
            logits = oracle.model(torch.tensor([[*prompt, *output]])).logits[0, :-1]
        rows = logits.double().log_softmax(-1)
        assert delta.prompt[0].logprob is None
        for row, token in zip(rows, [*delta.prompt[1:], *delta.tokens], strict=True):
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
            values, ids = row.topk(2)
            assert [token_id for token_id, _ in token.top] == ids.tolist()
            assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        num_unlikely += any(token.id != token.top[0][0] for token in delta.tokens)
    assert num_unlikely > 4


def test_without_penalties_the_logprobs_add_up_to_the_score(oracle: Oracle) -> None:
    prompts = prompts_of(4, seed=16)
    results = oracle.search(prompts, beam_width=5, n=5, max_tokens=7, logprobs=0)
    assert len(results.choices) == 20
    for delta in results.choices.values():
        total = sum(token.logprob or 0.0 for token in delta.tokens)
        assert delta.report["cumulative_logprob"] == pytest.approx(total, abs=1e-4)
        score = total / len(delta.tokens)
        assert delta.report["sequence_score"] == pytest.approx(score, abs=1e-4)


# -- at length


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_hundreds_of_searches_are_those_of_transformers(
    oracle: Oracle, rules: dict[str, Any]
) -> None:
    for width, n in ((2, 1), (3, 3), (4, 2), (7, 5), (16, 16)):
        prompts = prompts_of(12, seed=100 + width)
        for max_tokens in (3, 12):
            got = oracle.ours(prompts, beam_width=width, n=n, max_tokens=max_tokens, **rules)
            for prompt, ours in zip(prompts, got, strict=True):
                want = oracle.theirs(prompt, width, n, max_tokens, **rules)
                assert_same(ours, want, width, max_tokens, prompt)


TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, there was a small village where",
    "The three laws of thermodynamics say that",
)

REAL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"length_penalty": 0.0, "early_stopping": "never"},) * 2,
    ({"stop": [".", "\n"]}, {"stop_strings": [".", "\n"]}),
    (
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "logit_bias": {"260": 2.0}},
        {
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 2,
            "sequence_bias": [[[260], 2.0]],
        },
    ),
]


@pytest.fixture(scope="module")
def real(real_folder: Path) -> Oracle:
    ends = transformers.GenerationConfig.from_pretrained(str(real_folder)).eos_token_id
    return Oracle(real_folder, (ends,) if isinstance(ends, int) else tuple(ends), 1 << 28)


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), REAL, ids=lambda options: "-".join(options))
def test_hypotheses_of_a_real_model_are_those_of_transformers(
    real: Oracle, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    for width, max_tokens, texts in ((2, 16, TEXTS[:2]), (4, 12, TEXTS[2:])):
        prompts = [real.tokenizer.encode(text) for text in texts]
        rules = {"beam_width": width, "n": width, "max_tokens": max_tokens, "sampler_order": "hf"}
        got = real.ours(prompts, **rules, **ours)
        for text, prompt, one in zip(texts, prompts, got, strict=True):
            want = real.theirs(prompt, width, width, max_tokens, **theirs)
            assert [ids for ids, _ in one] == [ids for ids, _ in want], text
            assert [s for _, s in one] == pytest.approx([s for _, s in want], abs=1e-3), text


@pytest.mark.slow
def test_logprobs_and_coverage_of_a_real_model(real: Oracle) -> None:
    prompts = [real.tokenizer.encode(text) for text in TEXTS]
    options = {"beam_width": 4, "n": 4, "max_tokens": 16, "logprobs": 1, "prompt_logprobs": 1}
    coverage = {"coverage_penalty": 0.2, "length_penalty_type": "gnmt", "length_penalty": 0.2}
    results = real.search(prompts, **options, **coverage)
    real.model.set_attn_implementation("eager")
    for (name, _), delta in results.choices.items():
        prompt, output = prompts[int(name)], tuple(token.id for token in delta.tokens)
        with torch.inference_mode():
            seen = real.model(torch.tensor([[*prompt, *output[:-1]]]), output_attentions=True)
        rows = seen.logits[0].double().log_softmax(-1)
        told = [token.logprob for token in (*delta.prompt[1:], *delta.tokens)]
        wanted = [float(rows[at, token]) for at, token in enumerate([*prompt, *output][1:])]
        assert told == pytest.approx(wanted, abs=1e-3)
        total = sum(wanted[len(prompt) - 1 :])
        assert delta.report["cumulative_logprob"] == pytest.approx(total, abs=1e-3)
        upper = torch.stack(seen.attentions[len(seen.attentions) // 2 :])[:, 0].double()
        received = upper[:, :, len(prompt) - 1 :, : len(prompt)].mean((0, 1))
        received = (received / received.sum(-1, keepdim=True)).sum(0).clamp(max=1.0)
        score = total / gnmt(0.2)(len(output), False) + 0.2 * float(received.log().sum())
        assert delta.report["sequence_score"] == pytest.approx(score, abs=1e-3)
