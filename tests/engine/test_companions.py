"""Rows beside others, through the engine: guidance, amateurs, reference prompts, earlier layers.

The numbers that each token was chosen by are compared with formulas over transformers' logits.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

from engine.core import EngineCore
from engine.errors import GenerationFailed, InvalidRequest
from engine.messages import Request
from engine.numerics import NEG_INF
from engine.params import SamplingParams
from engine.prepare import ModelInfo, Output, prepare
from engine.rng import derive
from tests.support import tiny
from tests.support.company import (
    assert_an_abort_leaves_nothing,
    assert_an_error_leaves_nothing,
    cramped,
    run_checked,
)
from tests.support.engines import Results, record_plans, run, tiny_core

PROMPT = [17, 64, 33, 90, 12, 55, 71]
OTHER = [44, 8, 101, 33, 20, 9, 77, 13, 60]
BLOCK = 4

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance_scale": 1.5, "negative_prompt": OTHER},
    "guided towards a text": {"guidance_scale": 0.3, "negative_prompt": "the hen"},
    "guided by the last token": {"guidance_scale": -0.5},
    "amateur": {"cd_amateur": "small"},
    "cold amateur": {"cd_amateur": "small", "cd_alpha": 0.02, "cd_temperature": 0.7},
    "later amateur": {"cd_amateur": "small", "cd_beta": 0.5},
    "reference": {"kl_bandwidth": 0.5, "kl_reference_prompt": OTHER},
    "reference text": {"kl_bandwidth": 3.0, "kl_reference_prompt": "a"},
    "low layers": {"dola_layers": "low"},
    "high layers": {"dola_layers": "high", "dola_mode": "hf"},
    "normed layers": {"dola_layers": [0, 1, 3], "dola_norm": True, "dola_relative_top": 0.01},
    "one layer": {"dola_layers": [2], "dola_norm": True, "dola_mode": "hf"},
}
WITH_COMPANION = [
    name
    for name, options in KINDS.items()
    if options.keys() & {"guidance_scale", "cd_amateur", "kl_bandwidth"}
]


class Models:
    """A tiny model and a smaller one, here and in transformers."""

    core: EngineCore
    info: ModelInfo

    def __init__(self, folder: Path) -> None:
        # Less peaked than the other tiny models: several tokens shall be plausible.
        self.big = tiny.hf_model("llama", initializer_range=0.15, num_hidden_layers=4)
        self.small = tiny.hf_model("llama", seed=3, initializer_range=0.15, num_hidden_layers=1)
        self.core, self.info = tiny_core(
            tiny.save(self.big, folder / "big"),
            ("small", tiny.save(self.small, folder / "small")),
            block_size=BLOCK,
            prefix_cache=False,
            logprobs_mode="processed_logits",
        )

    def ask(
        self, options: dict[str, Any], prompt: list[int] = PROMPT, request_id: str = "r"
    ) -> Request:
        """A request that is told the whole row of every token."""
        given = {"max_tokens": 9, "seed": 5, "temperature": 0.8, "ignore_eos": True} | options
        given = {name: value for name, value in given.items() if value is not None}
        return prepare(
            prompt,
            SamplingParams.model_validate(given),
            Output(logprobs=tiny.VOCAB),
            self.info,
            self.core.tokenizer,
            request_id=request_id,
        )

    def small_engine(self, num_blocks: int, **config: Any) -> EngineCore:
        return cramped(
            self.core,
            num_blocks,
            block_size=BLOCK,
            logprobs_mode="processed_logits",
            **config,
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("companions"))


# -- the formulas, in float64 over transformers' logits


@torch.inference_mode()
def logits_of(model: Any, prompt: Iterable[int], output: list[int]) -> Tensor:
    """The rows [t, V] that the tokens of an output are chosen from."""
    ids = [*prompt, *output]
    rows: Tensor = model(torch.tensor([ids])).logits[0, -len(output) - 1 : -1]
    return rows.double()


@torch.inference_mode()
def layers_of(hf: Any, request: Request, output: list[int], layers: list[int]) -> Tensor:
    """What earlier layers say [t, M, V]."""
    ids = torch.tensor([[*request.prompt_ids, *output]])
    states = hf(ids, output_hidden_states=True).hidden_states
    early = torch.stack([states[layer][0, -len(output) - 1 : -1] for layer in layers], 1)
    norm = getattr(hf.base_model, "ln_f", None) or hf.base_model.norm
    rows: Tensor = hf.lm_head(norm(early) if request.params.dola_norm else early)
    return rows.double()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def guided(models: Models, request: Request, output: list[int]) -> Tensor:
    own = logits_of(models.big, request.prompt_ids, output).log_softmax(-1)
    prompt = request.params.negative_prompt
    if isinstance(prompt, str):
        prompt = models.core.tokenizer.encode(prompt, True)
    other = logits_of(models.big, prompt or request.prompt_ids[-1:], output).log_softmax(-1)
    return other + request.params.guidance_scale * (own - other)


def contrasted(models: Models, request: Request, output: list[int]) -> Tensor:
    params = request.params
    own = logits_of(models.big, request.prompt_ids, output)
    other = logits_of(models.small, request.prompt_ids, output)
    scores = own.log_softmax(-1) - (other / params.cd_temperature).log_softmax(-1)
    if params.cd_beta is not None:
        scores = (1 + params.cd_beta) * own - params.cd_beta * other
    p = own.softmax(-1)
    return scores.masked_fill(p < params.cd_alpha * p.amax(-1, keepdim=True), NEG_INF)


def referred(models: Models, request: Request, output: list[int]) -> Tensor:
    own = logits_of(models.big, request.prompt_ids, output)
    prompt = request.params.kl_reference_prompt
    if isinstance(prompt, str):
        prompt = models.core.tokenizer.encode(prompt, True)
    assert prompt
    other = logits_of(models.big, prompt, output)
    p, q = own.softmax(-1).clamp(1e-7, 1), other.softmax(-1).clamp(1e-7, 1)
    return own / torch.exp2(-kl(p, q).clamp(min=0) / request.params.kl_bandwidth)[:, None]


def layered(models: Models, request: Request, output: list[int]) -> Tensor:
    layers = request.params.dola_layers
    if not isinstance(layers, list):
        layers = [0] if layers == "low" else [2]  # of four
    early = layers_of(models.big, request, output, layers)
    own = logits_of(models.big, request.prompt_ids, output)
    return differences(own, early, request.params)


def differences(own: Tensor, early: Tensor, params: SamplingParams) -> Tensor:
    """Of rows [t, V] from those of earlier layers [t, M, V]."""
    rows = []
    pairs = zip(own.log_softmax(-1), early.log_softmax(-1), strict=True)
    for final, others in pairs:
        p, q = final.exp(), others.exp()
        m = (p + q) / 2
        paper, theirs = kl(p, m) + kl(q, m), kl(m, p) + kl(m, q)
        layer = (paper if params.dola_mode == "paper" else theirs).argmax()
        implausible = p < params.dola_relative_top * p.amax()
        rows.append((final - others[layer]).masked_fill(implausible, NEG_INF))
    return torch.stack(rows)


def naive(models: Models, request: Request, output: list[int]) -> Tensor:
    """The rows [t, V] that the tokens of an output are drawn from."""
    formula: Callable[..., Tensor]
    params = request.params
    if params.guidance_scale != 1.0:
        formula = guided
    elif params.cd_amateur is not None:
        formula = contrasted
    elif params.dola_layers is not None:
        formula = layered
    elif params.kl_bandwidth and not params.greedy:
        formula = referred
    else:
        return logits_of(models.big, request.prompt_ids, output) / (params.temperature or 1.0)
    return formula(models, request, output) / (params.temperature or 1.0)


def rows_of(results: Results, request_id: str = "r", index: int = 0) -> Tensor:
    """What the tokens of a choice were drawn from, [t, V]."""
    tokens = results.choices[request_id, index].tokens
    rows = torch.full((len(tokens), tiny.VOCAB), NEG_INF, dtype=torch.float64)
    for row, token in zip(rows, tokens, strict=True):
        assert len(token.top) == tiny.VOCAB
        for token_id, value in token.top:
            row[token_id] = value
    return rows


def assert_by_the_formula(models: Models, results: Results, request: Request) -> None:
    for index in range(request.params.n):
        output = results.ids(request.request_id, index)
        assert len(output) == request.max_tokens
        got = rows_of(results, request.request_id, index)
        torch.testing.assert_close(got, naive(models, request, output), rtol=1e-4, atol=5e-4)


# -- alone


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_chosen_by_the_formula(
    models: Models, kind: str, temperature: float
) -> None:
    request = models.ask(KINDS[kind] | {"temperature": temperature})
    results = run_checked(models.core, request)
    assert_by_the_formula(models, results, request)
    if temperature == 0.0:
        rows = rows_of(results)
        assert results.ids() == rows.argmax(-1).tolist()
    if kind not in ("plain", "reference", "reference text") or temperature:
        rows = naive(models, models.ask({"temperature": temperature}), results.ids())
        assert (rows_of(results) - rows).abs().amax() > 0.5 or kind == "plain"


@pytest.mark.parametrize("scale", [1.5, 0.3, 0.0, -1.0, 4.0])
@pytest.mark.parametrize("negative", [OTHER, OTHER[:1], None], ids=str)
def test_guidance_is_that_of_transformers_token_by_token(
    models: Models, scale: float, negative: list[int] | None
) -> None:
    request = models.ask(
        {
            "guidance_scale": scale,
            "negative_prompt": negative,
            "temperature": 0.0,
            "max_tokens": 12,
            "ignore_eos": None,
        }
    )
    results = run_checked(models.core, request)
    # With a cache its companion would only see the last token.
    process = UnbatchedClassifierFreeGuidanceLogitsProcessor(
        scale,
        models.big,
        None if negative is None else torch.tensor([negative]),
        use_cache=False,
    )
    with torch.inference_mode():
        want = models.big.generate(
            torch.tensor([PROMPT]),
            logits_processor=[process],
            max_new_tokens=12,
            do_sample=False,
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    assert results.ids() == want.sequences[0, len(PROMPT) :].tolist()
    scores = torch.cat(want.scores).double()
    torch.testing.assert_close(rows_of(results), scores, rtol=1e-4, atol=5e-4)


def test_a_scale_of_one_needs_no_companion(models: Models) -> None:
    request = models.ask({"guidance_scale": 1.0, "negative_prompt": OTHER})
    assert request.companion_ids == ()
    assert run(models.core, request).ids() == run(models.core, models.ask({})).ids()


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma3"])
def test_layers_are_read_in_other_models_too(family: str, tmp_path: Path) -> None:
    """Of those that embed and read with one matrix, and those that run in transformers' code."""
    hf = tiny.hf_model(family, initializer_range=0.15)
    core, info = tiny_core(tiny.save(hf, tmp_path), logprobs_mode="processed_logits")
    assert info.tied
    for layers, norm in (("low", False), ("high", True), ([0, 1], False), ([0, 1], True)):
        request = prepare(
            PROMPT,
            SamplingParams(dola_layers=layers, dola_norm=norm, max_tokens=5, ignore_eos=True),
            Output(logprobs=tiny.VOCAB),
            info,
            core.tokenizer,
            request_id="r",
        )
        results = run_checked(core, request)
        # Of two layers the embedding says nothing.
        chosen = layers if isinstance(layers, list) else [1]
        early = layers_of(hf, request, results.ids(), chosen)
        own = logits_of(hf, PROMPT, results.ids())
        want = differences(own, early, request.params)
        torch.testing.assert_close(rows_of(results), want, rtol=1e-4, atol=5e-4)


# -- in company


@dataclass(frozen=True)
class Place:
    """An engine, and what must have happened in it."""

    num_blocks: int
    config: dict[str, Any]
    preempts: bool = False
    chunks: bool = False
    caches: bool = False


PLACES = {
    "roomy": Place(400, {"max_num_seqs": 40}),
    "short steps": Place(400, {"max_num_seqs": 8, "max_batch_tokens": 10}, chunks=True),
    "little memory": Place(21, {"max_num_seqs": 16}, preempts=True, chunks=True),
    "little of everything": Place(
        16, {"max_num_seqs": 12, "max_batch_tokens": 13, "prefix_cache": True}, True, True, True
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_all_kinds_in_one_batch_are_each_by_its_own_formula(models: Models, place: str) -> None:
    where = PLACES[place]
    rng = random.Random(0)
    requests = []
    for number, (kind, options) in enumerate(KINDS.items()):
        start = PROMPT if number % 2 else OTHER
        prompt = start[: rng.randint(3, len(start))] + rng.choices(range(3, tiny.VOCAB), k=3)
        options = options | {"seed": number, "temperature": rng.choice([0.0, 0.7, 1.2])}
        requests.append(models.ask(options, prompt, kind))
    core = models.small_engine(where.num_blocks, **{"prefix_cache": False} | where.config)
    plans = record_plans(core)

    results = run_checked(core, *requests)

    assert not results.failed
    for request in requests:
        assert_by_the_formula(models, results, request)
        alone = run(models.core, request)
        assert results.ids(request.request_id) == alone.ids(request.request_id)
    preempted = Counter(name for name, one in results.finished.items() if one.num_preemptions)
    assert (len(preempted.keys() & set(WITH_COMPANION)) > 2) == where.preempts
    parts = [c for plan in plans for c in plan.chunks if c.end < c.sequence.prompt_len]
    assert bool(parts) == where.chunks
    assert (core.scheduler.cache_hits > 0) == where.caches
    if place == "roomy":
        assert max(len(plan.chunks) for plan in plans) == len(KINDS) + len(WITH_COMPANION)


@pytest.mark.parametrize("kind", WITH_COMPANION)
def test_choices_are_those_of_their_seeds_each_with_a_companion_of_its_own(
    models: Models, kind: str
) -> None:
    request = models.ask(KINDS[kind] | {"n": 3, "max_tokens": 6, "temperature": 1.5})
    for core in (models.core, models.small_engine(21)):
        results = run_checked(core, request)
        assert_by_the_formula(models, results, request)
        for index in range(3):
            alone = replace(
                models.ask(KINDS[kind] | {"max_tokens": 6, "temperature": 1.5}),
                seed=derive(request.seed, index),
            )
            assert results.ids(index=index) == run(models.core, alone).ids()
    assert len({tuple(results.ids(index=index)) for index in range(3)}) > 1


def test_a_choice_that_ends_lets_the_others_go_on_with_their_companions(models: Models) -> None:
    for kind in WITH_COMPANION:
        ends = [*range(3, 40)]
        options = KINDS[kind] | {"n": 4, "max_tokens": 8, "stop_token_ids": ends, "seed": 3}
        request = models.ask(options | {"temperature": 1.5})
        results = run_checked(models.core, request)
        lengths = [len(results.ids(index=index)) for index in range(4)]
        assert len(set(lengths)) > 1
        for index in range(4):
            output = results.ids(index=index)
            want = naive(models, request, output)
            torch.testing.assert_close(rows_of(results, index=index), want, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("kind", ["guided", "later amateur", "normed layers"])
def test_beams_are_searched_among_the_contrasted_scores(models: Models, kind: str) -> None:
    width, length = 3, 4
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    request = models.ask(KINDS[kind] | {"temperature": None})
    for _ in range(length):
        found = []
        for total, output in beams:
            row = naive(models, request, [*output, 0])[-1].log_softmax(-1)
            found += [(total + float(row[i]), [*output, i]) for i in range(tiny.VOCAB)]
        beams = sorted(found, key=lambda one: -one[0])[:width]

    options = {"use_beam_search": True, "beam_width": width, "n": width, "length_penalty": 0.0}
    asked = models.ask(KINDS[kind] | options | {"temperature": None, "max_tokens": length})
    for core in (models.core, models.small_engine(24, max_batch_tokens=16)):
        results = run_checked(core, asked)
        assert [results.ids(index=index) for index in range(width)] == [ids for _, ids in beams]
        scores = [results.choices["r", index].report["sequence_score"] for index in range(width)]
        assert scores == pytest.approx([total for total, _ in beams], abs=1e-3)


# -- memory


def blocks_in_use(core: EngineCore) -> list[int]:
    return [pool.num_blocks - pool.num_free for pool in core.scheduler.pools]


@pytest.mark.parametrize(
    ("options", "companion", "model"),
    [
        ({"guidance_scale": 1.5, "negative_prompt": OTHER}, len(OTHER), 0),
        ({"guidance_scale": 1.5}, 1, 0),
        ({"kl_bandwidth": 1.0, "kl_reference_prompt": OTHER}, len(OTHER), 0),
        ({"cd_amateur": "small"}, len(PROMPT), 1),
    ],
    ids=lambda value: str(value),
)
def test_a_companion_holds_the_blocks_of_its_own_tokens_in_its_own_pool(
    models: Models, options: dict[str, Any], companion: int, model: int
) -> None:
    core = models.core
    core.submit(models.ask(options))
    for generated in range(8):
        core.step()
        want = [-(-(len(PROMPT) + generated) // BLOCK), 0]
        want[model] += -(-(companion + generated) // BLOCK)
        assert blocks_in_use(core) == want
    core.step()
    assert blocks_in_use(core) == [0, 0]


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        # 7 tokens of prompt and 9 of output; a companion's prompt has 9, or 1.
        ({}, 4),
        ({"guidance_scale": 1.5, "negative_prompt": OTHER}, 4 + 5),
        # Copies share the one block that their prompt fills, and the two of the longer companion's.
        ({"guidance_scale": 1.5, "n": 2}, 1 + 2 * 3 + 2 * 3),
        ({"kl_bandwidth": 1.0, "kl_reference_prompt": OTHER, "n": 2}, 1 + 2 * 3 + 2 + 2 * 3),
        # An amateur has a pool of the same size to itself.
        ({"cd_amateur": "small", "n": 2}, 1 + 2 * 3),
    ],
    ids=str,
)
def test_what_both_can_come_to_need_is_reserved_or_refused(
    models: Models, options: dict[str, Any], needed: int
) -> None:
    def ask(num_blocks: int) -> Request:
        return prepare(
            PROMPT,
            SamplingParams.model_validate(options | {"max_tokens": 9, "ignore_eos": True}),
            Output(),
            replace(models.info, num_blocks=num_blocks),
            models.core.tokenizer,
            request_id="r",
        )

    with pytest.raises(InvalidRequest, match=f"need {needed} blocks of the cache") as one:
        ask(needed - 1)
    assert one.value.param == ("n" if "n" in options else "max_tokens")
    core = models.small_engine(needed)
    results = run_checked(core, ask(needed))
    assert results.finished["r"].completion_tokens == 9 * options.get("n", 1)
    assert core.scheduler.num_preemptions == 0


@pytest.mark.parametrize("kind", ["guided", "amateur", "reference"])
def test_all_that_move_together_fit_into_a_step_or_are_refused(models: Models, kind: str) -> None:
    def ask(n: int) -> Request:
        return prepare(
            PROMPT,
            SamplingParams.model_validate(KINDS[kind] | {"n": n, "max_tokens": 4}),
            Output(),
            replace(models.info, batch_tokens=6),
            models.core.tokenizer,
            request_id="r",
        )

    with pytest.raises(InvalidRequest, match="n must be at most 3") as raised:
        ask(4)
    assert raised.value.param == "n"
    core = models.small_engine(64, max_num_seqs=6, max_batch_tokens=6)
    record_plans(core)
    assert not run_checked(core, ask(3)).failed


def test_the_longer_of_the_two_says_how_much_context_is_left(models: Models) -> None:
    context = models.info.context_len
    longer = [5] * (context - 20)
    asked: dict[str, Any] = {"guidance_scale": 1.5, "negative_prompt": longer, "max_tokens": 20}
    assert models.ask(asked).max_tokens == 20
    with pytest.raises(InvalidRequest, match="maximum context length"):
        models.ask(asked | {"max_tokens": 21})
    info = replace(models.info, amateur_context_len=len(PROMPT) + 3)
    with pytest.raises(InvalidRequest, match="maximum context length"):
        prepare(
            PROMPT,
            SamplingParams(cd_amateur="small", max_tokens=4),
            Output(),
            info,
            models.core.tokenizer,
            request_id="r",
        )


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"guidance_scale": 2.0, "negative_prompt": ""}, "negative_prompt"),
        ({"guidance_scale": 2.0, "negative_prompt": [5, 128]}, "negative_prompt"),
        ({"kl_bandwidth": 1.0, "kl_reference_prompt": ""}, "kl_reference_prompt"),
        ({"kl_bandwidth": 1.0, "kl_reference_prompt": [-1]}, "kl_reference_prompt"),
        ({"cd_amateur": "large"}, "cd_amateur"),
        ({"dola_layers": [4]}, "dola_layers"),
        ({"dola_layers": [-1]}, "dola_layers"),
    ],
    ids=str,
)
def test_what_names_no_companion_or_layer_is_refused(
    models: Models, options: dict[str, Any], param: str
) -> None:
    with pytest.raises((InvalidRequest, ValidationError)) as raised:
        models.ask(options)
    if isinstance(raised.value, ValidationError):
        assert [error["loc"] for error in raised.value.errors()] == [(param,)]
    else:
        assert raised.value.param == param


def test_layers_that_cannot_be_read_are_refused(models: Models) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read one by one") as raised:
        prepare(
            PROMPT,
            SamplingParams(dola_layers="high"),
            Output(),
            replace(models.info, has_lens=False),
            models.core.tokenizer,
            request_id="r",
        )
    assert (raised.value.param, raised.value.code) == ("dola_layers", "unsupported_parameter")


@pytest.mark.parametrize("kind", ["guided", "amateur", "reference"])
def test_the_prefix_cache_serves_companions_too(models: Models, kind: str) -> None:
    core = models.small_engine(64, prefix_cache=True)
    request = models.ask(KINDS[kind], prompt=[*PROMPT, *PROMPT])
    first, plans = run_checked(core, request), record_plans(core)
    again = run_checked(core, replace(request, request_id="again"))
    assert again.ids("again") == first.ids()
    assert_by_the_formula(models, again, replace(request, request_id="again"))
    computed = {c.sequence.model: [] for plan in plans for c in plan.chunks}
    lengths = [len(PROMPT) * 2, len(request.companion_ids)]
    # Whole blocks are found, but never the last token.
    want = [length - (length - 1) // BLOCK * BLOCK for length in lengths]
    for chunk in plans[0].chunks:
        computed[chunk.sequence.model].append(chunk.length)
    assert sorted(length for both in computed.values() for length in both) == sorted(want)


def test_the_two_pools_do_not_know_of_each_others_blocks(models: Models) -> None:
    """The model and its amateur keep other numbers for the same tokens."""
    core = models.small_engine(64, prefix_cache=True)
    prompt = [*PROMPT, *PROMPT]
    run_checked(core, models.ask({}, prompt))
    request = models.ask(KINDS["amateur"], prompt)
    results = run_checked(core, request)
    assert results.finished["r"].cached_tokens == 12
    assert_by_the_formula(models, results, request)


# -- what goes wrong


@pytest.mark.parametrize("kind", ["guided", "amateur", "reference", "normed layers"])
def test_an_abort_or_an_error_leaves_nothing_and_nobody_else_notices(
    models: Models, kind: str
) -> None:
    request = models.ask(KINDS[kind] | {"n": 2, "max_tokens": 4}, request_id="gone")
    other = models.ask(KINDS["guided" if kind == "amateur" else "amateur"], OTHER, "other")
    core = models.small_engine(64)
    assert_an_abort_leaves_nothing(core, request, other)
    assert_an_error_leaves_nothing(core, request, other)


def breaking(model: Any, tokens: int, value: float) -> Callable[..., Tensor]:
    """A model's logits, of which some, of all rows, are no numbers."""
    logits = model.logits

    def broken(hidden: Tensor) -> Tensor:
        rows: Tensor = logits(hidden)
        rows[:, :tokens] = value
        return rows

    return broken


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tokens", [1, tiny.VOCAB])
@pytest.mark.parametrize("kind", ["amateur", "later amateur"])
def test_a_companion_that_is_not_a_number_ends_its_request_alone(
    models: Models, monkeypatch: pytest.MonkeyPatch, kind: str, tokens: int, temperature: float
) -> None:
    core = models.small_engine(64)
    amateur = core.models[1]
    monkeypatch.setattr(amateur, "logits", breaking(amateur, tokens, float("nan")))
    request = models.ask(KINDS[kind] | {"temperature": temperature}, request_id="broken")
    other = models.ask(KINDS["guided"], OTHER, "other")
    results = run_checked(core, request, other)
    assert isinstance(results.failed["broken"].error, GenerationFailed)
    assert_by_the_formula(models, results, other)


@pytest.mark.parametrize("kind", ["amateur", "later amateur"])
def test_a_companion_may_be_as_sure_as_can_be(
    models: Models, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    core = models.small_engine(64)
    amateur = core.models[1]
    monkeypatch.setattr(amateur, "logits", breaking(amateur, 1, float("inf")))
    request = models.ask(KINDS[kind] | {"temperature": 0.0, "max_tokens": 3})
    results = run_checked(core, request)
    assert len(results.ids()) == 3
    assert 0 not in results.ids()


def test_an_early_layer_that_is_not_a_number_ends_its_request_alone(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = models.small_engine(64)
    final_norm = core.model.final_norm

    def broken(states: Tensor) -> Tensor:
        return final_norm(states) * float("nan")

    monkeypatch.setattr(core.model, "final_norm", broken)
    request = models.ask(KINDS["normed layers"], request_id="broken")
    other = models.ask(KINDS["low layers"], OTHER, "other")
    results = run_checked(core, request, other)
    assert isinstance(results.failed["broken"].error, GenerationFailed)
    assert_by_the_formula(models, results, other)


# -- the real model


@pytest.mark.slow
def test_guidance_of_the_real_model_is_that_of_transformers(real_folder: Path) -> None:
    core, info = tiny_core(real_folder, kv_cache_memory=1 << 28, block_size=16)
    hf = tiny.load(real_folder)
    encode = core.tokenizer.encode
    prompt, negative = encode("The best way to cook an egg is", True), encode("It rains.", True)
    for scale in (1.5, 3.0, 0.5):
        params = SamplingParams(
            guidance_scale=scale, negative_prompt=negative, temperature=0.0, max_tokens=16
        )
        request = prepare(prompt, params, Output(), info, core.tokenizer, request_id="r")
        results = run(core, request)
        with torch.inference_mode():
            want = hf.generate(
                torch.tensor([prompt]),
                guidance_scale=scale,
                negative_prompt_ids=torch.tensor([negative]),
                max_new_tokens=16,
                do_sample=False,
                use_cache=False,  # or its companion would only see the last token
            )
        assert results.ids() == want[0, len(prompt) :].tolist()
