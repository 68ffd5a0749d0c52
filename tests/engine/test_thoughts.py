"""Pause tokens and latent thoughts against transformers' own forward passes.

A pause token is one more token of the prompt; a thought is the last hidden state given back as the
next `inputs_embeds`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from engine.attention.torch_paged import Span
from engine.core import EngineCore
from engine.errors import InvalidRequest
from engine.kernels import native
from engine.kernels.quantized import GROUP, Groups
from engine.messages import Request
from engine.models.base import ForwardInput
from engine.models.cpu_decoder import CpuDecoder
from engine.models.decoder import Decoder
from engine.models.transformers import TransformersModel
from engine.numerics import NEG_INF
from engine.params import SamplingParams
from engine.prepare import ModelInfo, Output, prepare
from engine.rng import derive
from engine.runner import Runner
from engine.types import Group
from tests.support import tiny
from tests.support.company import (
    assert_an_abort_leaves_nothing,
    assert_an_error_leaves_nothing,
    cramped,
    run_checked,
)
from tests.support.engines import Results, record_plans, run, tiny_core

PROMPT = [17, 64, 33, 90, 12, 55, 71, 9, 102]
BLOCK = 4
PAUSE = 60
START, END = tiny.VOCAB, tiny.VOCAB + 1  # special tokens of models that think

# Llama-shaped ones run in our own decoder; the others in transformers' code: with learned
# positions, with scaled embeddings, and with hidden states wider than embeddings.
FAMILIES = ["llama", "qwen3", "gpt2", "gemma3", "opt-projected"]


@dataclass
class Thinker:
    """A tiny model here and in transformers."""

    core: EngineCore
    info: ModelInfo
    hf: Any
    marks: tuple[list[int], list[int]]  # before and after thoughts

    def ask(
        self,
        prompt: list[int] = PROMPT,
        request_id: str = "r",
        *,
        output: dict[str, Any] | None = None,
        **options: Any,
    ) -> Request:
        """A request that is told the whole row of every token."""
        given = {"max_tokens": 6, "seed": 5, "temperature": 0.8, "ignore_eos": True} | options
        return prepare(
            prompt,
            SamplingParams.model_validate(given),
            Output(**{"logprobs": self.info.vocab_size} | (output or {})),
            self.info,
            self.core.tokenizer,
            request_id=request_id,
        )

    def small_engine(self, num_blocks: int, **config: Any) -> EngineCore:
        return cramped(
            self.core,
            num_blocks,
            block_size=BLOCK,
            logprobs_mode=self.core.mode,
            **config,
        )

    @torch.inference_mode()
    def inputs(self, request: Request) -> Tensor:
        """The prompt with what is thought behind it, as embeddings [1, C, H]."""
        embed = self.hf.get_input_embeddings()
        before, after = self.marks if request.num_thoughts else ([], [])
        params = request.params
        pauses = [int(params.pause_token or 0)] * params.num_pause_tokens
        ids = [*request.prompt_ids, *pauses]
        ids += before if ids[-1:] != before else []
        x = embed(torch.tensor([ids]))
        for _ in range(request.num_thoughts):
            states = self.hf(inputs_embeds=x, output_hidden_states=True).hidden_states
            x = torch.cat((x, states[-1][:, -1:]), dim=1)
        return torch.cat((x, embed(torch.tensor([after]))), dim=1) if after else x

    @torch.inference_mode()
    def rows(self, request: Request, output: list[int]) -> Tensor:
        """The logits [t, V] that the tokens of an output are chosen from."""
        embed = self.hf.get_input_embeddings()
        x = torch.cat((self.inputs(request), embed(torch.tensor([output]))), dim=1)
        rows: Tensor = self.hf(inputs_embeds=x).logits[0, -len(output) - 1 : -1]
        return rows[:, : self.info.vocab_size]


def load(
    family: str, folder: Path, *, marked: bool = False, hidden_size: int = 64, **config: Any
) -> Thinker:
    """A tiny model; with `marked`, its tokenizer knows the tokens around thoughts."""
    # Less peaked than the other tiny models, so that more than one token is likely.
    changes: dict[str, Any] = {"initializer_range": 0.15}
    if hidden_size != 64:
        changes |= {"hidden_size": hidden_size, "initializer_range": 0.1}
    if marked:
        changes["vocab_size"] = tiny.VOCAB + 2
    hf = tiny.hf_model(family, **changes)
    tiny.save(hf, folder)
    if marked:
        tokenizer = tiny.tokenizer()
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|start-latent|>", "<|end-latent|>"]}
        )
        tokenizer.save_pretrained(folder)
    settings = {"block_size": BLOCK, "prefix_cache": False, "logprobs_mode": "raw_logits"}
    core, info = tiny_core(folder, **settings | config)
    return Thinker(core, info, hf, ([START], [END]) if marked else ([], []))


@pytest.fixture(scope="module")
def thinkers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Thinker]:
    known: dict[str, Thinker] = {}

    def of(name: str) -> Thinker:
        if name not in known:
            family = name.removesuffix(" with marks")
            folder = tmp_path_factory.mktemp("thinker")
            known[name] = load(family, folder, marked=name != family)
        return known[name]

    return of


@pytest.fixture
def thinker(thinkers: Callable[[str], Thinker]) -> Thinker:
    return thinkers("llama")


def rows_of(results: Results, request: Request, index: int = 0) -> Tensor:
    """What the model said before each token of a choice, [t, V]."""
    tokens = results.choices[request.request_id, index].tokens
    rows = torch.full((len(tokens), request.logprobs or 0), NEG_INF)
    for row, token in zip(rows, tokens, strict=True):
        for token_id, value in token.top:
            row[token_id] = value
    return rows


def assert_as_transformers(results: Results, thinker: Thinker, *requests: Request) -> None:
    assert not results.failed
    for request in requests:
        for index in range(request.params.n):
            output = results.ids(request.request_id, index)
            assert len(output) == request.max_tokens
            got = rows_of(results, request, index)
            torch.testing.assert_close(got, thinker.rows(request, output), rtol=1e-4, atol=1e-4)


def some(thinker: Thinker) -> list[Request]:
    """Requests with as many thoughts or pauses as may matter, at every place in a block."""
    requests = []
    for number in range(10):
        prompt = PROMPT[: number + 1] if number < 9 else PROMPT * 3
        options: dict[str, Any] = {"temperature": 0.0 if number % 3 else 0.8, "seed": number}
        for name, more in (
            ("plain", {}),
            ("thoughts", {"num_latent_thoughts": 1 + number * 3 % 7}),
            ("pauses", {"num_pause_tokens": 1 + number * 3 % 7, "pause_token": PAUSE}),
        ):
            requests.append(thinker.ask(prompt, f"{name} {number}", **options, **more))
    return requests


# -- what the model sees


@pytest.mark.parametrize("family", [*FAMILIES, "llama with marks", "gpt2 with marks"])
def test_logits_are_those_of_transformers_across_blocks_and_beside_others(
    family: str, thinkers: Callable[[str], Thinker]
) -> None:
    thinker = thinkers(family)
    kind = Decoder if family.split()[0] in tiny.LLAMA_SHAPED else TransformersModel
    assert isinstance(thinker.core.model, kind)
    requests = some(thinker)
    core = thinker.small_engine(300, max_num_seqs=len(requests))
    assert_as_transformers(run_checked(core, *requests), thinker, *requests)


@pytest.mark.parametrize("family", ["llama with marks", "gpt2"])
@pytest.mark.parametrize(
    "config", [{"max_num_seqs": 8, "max_batch_tokens": 9}, {"max_num_seqs": 5}], ids=str
)
def test_so_they_are_in_short_steps_and_little_memory(
    family: str, config: dict[str, int], thinkers: Callable[[str], Thinker]
) -> None:
    thinker = thinkers(family)
    requests = some(thinker)
    for prefix_cache in (False, True):
        core = thinker.small_engine(12, prefix_cache=prefix_cache, **config)
        results = run_checked(core, *requests)
        assert_as_transformers(results, thinker, *requests)
        preempted = [name for name, one in results.finished.items() if one.num_preemptions]
        assert any("thoughts" in name for name in preempted)
        assert any("pauses" in name for name in preempted)


@dataclass
class Interrupted:
    """Preempts groups that are in the midst of thinking."""

    core: EngineCore
    counts: list[int] = field(default_factory=list)  # of thoughts that were there

    def step(self, group: Group) -> None:
        """A step, after which the group has to make room if it still thinks."""
        known = len(group.live[0].thoughts)
        self.core.step()
        if group in self.core.scheduler.running and group.thinks:
            self.counts.append(known)
            self.core.scheduler._preempt(group)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_preemption_between_any_two_thoughts_changes_nothing(
    thinker: Thinker, n: int, prefix_cache: bool
) -> None:
    request = thinker.ask(num_latent_thoughts=6, n=n)
    want = run(thinker.core, request)
    core = thinker.small_engine(40, prefix_cache=prefix_cache)
    core.submit(request)
    (group,) = core.scheduler.waiting
    interrupted = Interrupted(core)
    for _ in range(6):
        interrupted.step(group)
    assert interrupted.counts == [0, 1, 2, 3, 4]
    assert len(group.live[0].thoughts) == 6
    results = run_checked(core)
    assert results.finished["r"].num_preemptions == 5
    assert_as_transformers(results, thinker, request)
    for index in range(n):
        assert results.ids(index=index) == want.ids(index=index)


@pytest.mark.parametrize("more", [{"num_latent_thoughts": 5}, {"num_pause_tokens": 5}], ids=str)
def test_choices_share_what_was_thought_and_are_those_of_their_seeds(
    thinker: Thinker, more: dict[str, Any]
) -> None:
    more = more | ({"pause_token": PAUSE} if "num_pause_tokens" in more else {})
    request = thinker.ask(n=3, temperature=1.3, **more)
    core = thinker.small_engine(64)
    plans = record_plans(core)
    results = run_checked(core, request)
    assert_as_transformers(results, thinker, request)
    alone = [
        run(thinker.core, replace(thinker.ask(temperature=1.3, **more), seed=derive(5, index)))
        for index in range(3)
    ]
    assert [results.ids(index=index) for index in range(3)] == [one.ids() for one in alone]
    assert len({tuple(one.ids()) for one in alone}) == 3
    # The prompt and what is behind it was computed once.
    computed = sum(plan.num_tokens for plan in plans)
    assert computed == request.num_prompt + 3 * (request.max_tokens - 1)


@pytest.mark.parametrize("width", [1, 3])
def test_beams_go_on_from_the_same_thoughts(thinker: Thinker, width: int) -> None:
    options = {"num_latent_thoughts": 4, "temperature": 1.0, "ignore_eos": False}
    request = thinker.ask(use_beam_search=True, beam_width=width, n=width, **options)
    for core in (thinker.core, thinker.small_engine(width * 6)):
        results = run_checked(core, request)
        with torch.inference_mode():
            want = thinker.hf.generate(
                inputs_embeds=thinker.inputs(request),
                num_beams=width,
                num_return_sequences=width,
                max_new_tokens=request.max_tokens,
                do_sample=False,
            )
        for index, ids in enumerate(want.tolist()):
            output = results.ids(index=index)
            assert output == ids[: len(output)]
            assert len(output) == 6 or output[-1] == 2


def test_nothing_thought_is_a_plain_request(thinker: Thinker) -> None:
    plain = run(thinker.core, thinker.ask())
    for options in (
        {"num_latent_thoughts": 0},
        {"num_pause_tokens": 0, "pause_token": PAUSE},
    ):
        results = run(thinker.core, thinker.ask(**options))
        assert results.ids() == plain.ids()
        assert results.choices["r", 0].tokens == plain.choices["r", 0].tokens


def test_more_thoughts_and_pauses_say_something_else(thinker: Thinker) -> None:
    """So that the tests around this one show something."""
    first = [
        rows_of(run(thinker.core, request), request)[0]
        for count in (0, 1, 2, 3)
        for request in [
            thinker.ask(num_latent_thoughts=count),
            thinker.ask(num_pause_tokens=count, pause_token=PAUSE),
        ]
    ]
    first.pop(0)  # none of one and none of the other are the same
    for index, row in enumerate(first):
        assert all((row - other).abs().amax() > 0.1 for other in first[:index])


# -- the tokens around thoughts


def test_thoughts_stand_between_their_marks(thinkers: Callable[[str], Thinker]) -> None:
    thinker = thinkers("llama with marks")
    request = thinker.ask(num_latent_thoughts=3)
    assert (request.hidden_ids, request.end_ids) == ((START,), (END,))
    # A prompt that ends in the first one needs no other.
    marked = thinker.ask([*PROMPT, START], num_latent_thoughts=3)
    assert (marked.hidden_ids, marked.end_ids) == ((), (END,))
    results = run_checked(thinker.core, request, replace(marked, request_id="marked"))
    assert_as_transformers(results, thinker, request, replace(marked, request_id="marked"))
    torch.testing.assert_close(
        rows_of(results, request)[0], rows_of(results, replace(marked, request_id="marked"))[0]
    )


def test_a_model_without_marks_thinks_right_behind_the_prompt(thinker: Thinker) -> None:
    request = thinker.ask(num_latent_thoughts=3)
    assert (request.hidden_ids, request.end_ids) == ((), ())


@pytest.mark.parametrize(("token", "token_id"), [(PAUSE, PAUSE), ("th", 109), ("</s>", 2)])
def test_a_pause_token_is_named_by_id_or_text(
    thinker: Thinker, token: int | str, token_id: int
) -> None:
    request = thinker.ask(num_pause_tokens=2, pause_token=token)
    assert request.hidden_ids == (token_id, token_id)


@pytest.mark.parametrize("token", ["xy", 128, -1])
def test_what_is_not_one_token_is_no_pause(thinker: Thinker, token: int | str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        thinker.ask(num_pause_tokens=2, pause_token=token)
    assert raised.value.param == "pause_token"


# -- what nobody else sees


@pytest.mark.parametrize(
    "more",
    [{"num_latent_thoughts": 5}, {"num_pause_tokens": 5, "pause_token": 71}],
    ids=lambda more: next(iter(more)),
)
def test_penalties_do_not_know_of_hidden_tokens(more: dict[str, Any], tmp_path: Path) -> None:
    thinker = load("llama", tmp_path, logprobs_mode="processed_logits")
    # Neither the placeholder of thoughts, 0, nor the pause token is in the prompt.
    prompt = PROMPT[:6]
    request = thinker.ask(
        prompt, temperature=0.0, repetition_penalty=1.7, no_repeat_ngram_size=2, **more
    )
    results = run_checked(thinker.core, request)
    output, oracle = results.ids(), RepetitionPenaltyLogitsProcessor(1.7)
    want = thinker.rows(request, output)
    for index, (got, row) in enumerate(zip(rows_of(results, request), want, strict=True)):
        seen = [*prompt, *output[:index]]
        (penalised,) = oracle(torch.tensor([seen]), row[None].clone())
        banned = {second for first, second in pairwise(seen) if first == seen[-1]}
        for token in banned:
            penalised[token] = NEG_INF
        torch.testing.assert_close(got, penalised, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama with marks"])
def test_hidden_tokens_are_counted_but_not_told(
    family: str, thinkers: Callable[[str], Thinker]
) -> None:
    thinker = thinkers(family)
    marks = len(thinker.marks[0]) * 2
    for more, hidden in (
        ({"num_latent_thoughts": 5}, 5 + marks),
        ({"num_pause_tokens": 3, "pause_token": PAUSE}, 3),
    ):
        request = thinker.ask(output={"prompt_logprobs": 1}, **more)
        results = run_checked(thinker.core, request)
        delta, finished = results.choices["r", 0], results.finished["r"]
        assert finished.prompt_tokens == len(PROMPT) + hidden
        assert finished.completion_tokens == len(delta.tokens) == 6
        assert [token.id for token in delta.prompt] == PROMPT
        plain = run(thinker.core, thinker.ask(output={"prompt_logprobs": 1}))
        for mine, theirs in zip(delta.prompt, plain.choices["r", 0].prompt, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_a_prompt_alone_may_be_thought_about(thinker: Thinker) -> None:
    for more in ({"num_latent_thoughts": 3}, {"num_pause_tokens": 3, "pause_token": PAUSE}):
        results = run_checked(thinker.core, thinker.ask(max_tokens=0, **more))
        assert results.finished["r"].prompt_tokens == len(PROMPT) + 3
        assert results.ids() == []


# -- the prefix cache


def test_a_thought_is_not_found_under_the_token_that_stands_for_it(thinker: Thinker) -> None:
    """Nor under those of another number of thoughts, another prompt or a pause."""
    core = thinker.small_engine(200, prefix_cache=True)
    zeros = [0] * 8
    requests = [
        thinker.ask(PROMPT[:8], "a", num_latent_thoughts=8),
        thinker.ask([*PROMPT[:8], *zeros], "b"),
        thinker.ask(PROMPT[:8], "c", num_latent_thoughts=4),
        thinker.ask(PROMPT[:8], "d", num_pause_tokens=8, pause_token=0),
        thinker.ask([*PROMPT[:8], 0], "e", num_latent_thoughts=7),
        thinker.ask([*PROMPT[1:8], 3], "f", num_latent_thoughts=8),
        thinker.ask(PROMPT[:8], "g", num_latent_thoughts=8),
        thinker.ask([*PROMPT[:8], *zeros], "h"),
    ]
    cached = {}
    for request in requests:
        results = run_checked(core, request)
        assert_as_transformers(results, thinker, request)
        cached[request.request_id] = results.finished[request.request_id].cached_tokens
    # Of the prompt all but the block with its last token, which begins to think.
    assert cached == {"a": 0, "b": 8, "c": 4, "d": 12, "e": 8, "f": 0, "g": 4, "h": 12}


# -- memory


@pytest.mark.parametrize("more", [{"num_latent_thoughts": 7}, {"num_pause_tokens": 7}], ids=str)
def test_what_is_thought_takes_blocks_that_are_reserved_or_refused(
    thinker: Thinker, more: dict[str, Any]
) -> None:
    more = more | ({"pause_token": PAUSE} if "num_pause_tokens" in more else {})

    def ask(num_blocks: int) -> Request:
        small = replace(thinker, info=replace(thinker.info, num_blocks=num_blocks))
        return small.ask(n=2, **more)

    # 9 tokens of prompt and 7 behind it fill four blocks, which both share; 6 of output take two.
    with pytest.raises(InvalidRequest, match="need 8 blocks of the cache") as raised:
        ask(7)
    assert raised.value.param == "n"
    core = thinker.small_engine(8)
    results = run_checked(core, ask(8))
    assert_as_transformers(results, thinker, ask(8))
    assert core.scheduler.num_preemptions == 0


def test_what_is_thought_is_part_of_the_context(thinker: Thinker) -> None:
    longest = thinker.info.context_len - 9 - 64
    assert thinker.ask(num_latent_thoughts=64, max_tokens=longest).max_tokens == longest
    with pytest.raises(InvalidRequest, match="maximum context length"):
        thinker.ask(num_latent_thoughts=64, max_tokens=longest + 1)


@pytest.mark.parametrize("more", [{"num_latent_thoughts": 4}, {"num_pause_tokens": 4}], ids=str)
def test_an_abort_or_an_error_leaves_nothing_and_nobody_else_notices(
    thinker: Thinker, more: dict[str, Any]
) -> None:
    more = more | ({"pause_token": PAUSE} if "num_pause_tokens" in more else {})
    request = thinker.ask(request_id="gone", n=2, max_tokens=3, **more)
    other = thinker.ask(PROMPT[::-1], "other", num_latent_thoughts=3)
    core = thinker.small_engine(64)
    assert_an_abort_leaves_nothing(core, request, other)
    assert_an_error_leaves_nothing(core, request, other)


# -- what does not go together

REFUSED: list[dict[str, Any]] = [
    {"guidance_scale": 1.5},
    {"kl_bandwidth": 1.0, "kl_reference_prompt": "a"},
    {"cd_amateur": "small"},
    {"num_pause_tokens": 1, "pause_token": PAUSE},
]


@pytest.mark.parametrize("other", REFUSED, ids=lambda other: next(iter(other)))
def test_thoughts_are_refused_beside_what_they_do_not_go_with(other: dict[str, Any]) -> None:
    name = next(iter(other))
    with pytest.raises(ValidationError) as raised:
        SamplingParams.model_validate({"num_latent_thoughts": 2} | other)
    (error,) = raised.value.errors()
    assert error["type"] == "incompatible_parameters"
    assert error["msg"] == f"num_latent_thoughts and {name} cannot be combined"
    SamplingParams.model_validate({"num_latent_thoughts": 0} | other)


def test_pauses_need_a_token() -> None:
    with pytest.raises(ValidationError) as raised:
        SamplingParams.model_validate({"num_pause_tokens": 2})
    (error,) = raised.value.errors()
    assert error["msg"] == "num_pause_tokens needs pause_token"


# -- other ways to run a model


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", Decoder),
        ("qwen3", Decoder),
        ("gpt2", TransformersModel),
        ("gemma3", TransformersModel),
        *((name, CpuDecoder) for name in ("llama", "llama-tied") if native.LIBRARY is not None),
    ],
)
@torch.inference_mode()
def test_an_embedding_given_as_an_input_is_its_token_to_the_bit(
    family: str, kind: type, tmp_path: Path
) -> None:
    hf = tiny.hf_model(family, **({} if family == "gpt2" else {"hidden_size": 128}))
    quantization = "int8" if kind is CpuDecoder else "none"
    core, _ = tiny_core(tiny.save(hf, tmp_path), quantization=quantization)
    assert isinstance(core.model, kind)
    ids, replaced = torch.tensor([*PROMPT, *PROMPT]), torch.tensor([1, 2, 8, 17])
    table = hf.get_input_embeddings()(ids)
    if kind is CpuDecoder:
        tied = hf.config.tie_word_embeddings
        table = _eight_bits(table) if tied else table.bfloat16().float()

    def forward(token_ids: Tensor, *given: Tensor) -> Tensor:
        runner = Runner(core.model, 5, BLOCK, "cpu")
        plan = runner.attention.plan([Span(0, len(ids), [3, 0, 4, 1, 2])])
        inputs = ForwardInput(token_ids, torch.arange(len(ids)), plan, None, *given)
        return core.model.forward(inputs, runner.cache, runner.attention).clone()

    others = ids.clone()
    others[replaced] = 0
    want = forward(ids)
    assert torch.equal(forward(others, replaced, table[replaced]), want)
    assert not torch.equal(forward(others), want)


def _eight_bits(weight: Tensor) -> Tensor:
    """A weight [N, K] as the kernels round it."""
    groups = Groups.of(weight)
    whole = groups.codes.unflatten(1, (-1, GROUP)).float() - 128.0
    return (whole * groups.d.unsqueeze(-1)).flatten(1)


def test_weights_of_eight_bits_think_nearly_the_same(tmp_path: Path) -> None:
    thinker = load("llama", tmp_path, quantization="int8", hidden_size=128)
    assert isinstance(thinker.core.model, CpuDecoder) == (native.LIBRARY is not None)
    requests = some(thinker)
    core = thinker.small_engine(300, max_num_seqs=len(requests))
    results = run_checked(core, *requests)
    for request in requests:
        want = thinker.rows(request, results.ids(request.request_id))
        difference = rows_of(results, request) - want
        assert difference.square().mean().sqrt() < 0.08 * want.square().mean().sqrt()
