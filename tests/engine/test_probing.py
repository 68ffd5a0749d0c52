"""What is read out of a model: its layers' states, and what its queries attended to."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from engine.attention.torch_paged import LayerCache, Span
from engine.attention.weights import attention_scores
from engine.core import EngineCore
from engine.kernels import native
from engine.messages import TokenTrace, TraceWish
from engine.models.base import ForwardInput, Probe
from engine.probing import Probed, attention_signals
from engine.runner import Runner
from engine.text import Detokenizer, TextStream
from engine.types import Sequence
from tests.support import tiny
from tests.support.engines import request, run, tiny_core

# Beyond the sliding windows (7), of lengths that end anywhere in a block (4).
PROMPTS = [
    [(index * step + 5) % (tiny.VOCAB - 3) + 3 for index in range(length)]
    for length, step in ((1, 1), (13, 11), (22, 3))
]
# The fast path, and models run by their own code: with soft caps, windows, scales, biases, norms
# of many kinds, queries wider than values.
FAMILIES = ("llama", "qwen3", "mistral-sliding", "gemma2", "gpt2", "granite", "opt", "deepseek-v3")


@dataclass
class Pair:
    """The same weights in Hugging Face's hands and in ours."""

    hf: Any
    core: EngineCore
    info: Any


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    hf = tiny.hf_model(request.param)
    generator = torch.Generator().manual_seed(1)
    for parameter in hf.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    folder = tiny.save(hf, tmp_path_factory.mktemp(request.param))
    # 8 tokens a step: prompts are cut into chunks, beside sequences that already decode.
    core, info = tiny_core(folder, max_batch_tokens=8, max_num_seqs=8)
    return Pair(hf, core, info)


# -- Hugging Face's own


@dataclass
class Seen:
    """What a pass of Hugging Face's model over one sequence shows."""

    states: list[Tensor]  # before each layer and behind the last, [T, H]
    lens: list[Tensor]  # each of them through norm and head, [T, V]
    scores: list[Tensor]  # before softmax, of each layer, [Hq, T, T]


def final_norm(hf: Any) -> Any:
    inner = hf.base_model
    inner = getattr(inner, "decoder", inner)
    for name in ("norm", "ln_f", "final_layer_norm"):
        if hasattr(inner, name):
            return getattr(inner, name)
    raise AssertionError("where is the final norm?")


@contextmanager
def recorded_scores(hf: Any) -> Iterator[list[Tensor]]:
    """Let a model attend by plain code that keeps its scores, for one sequence at a time."""
    scores: list[Tensor] = []

    def attend(
        _module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
        own = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
        if softcap is not None:
            own = softcap * torch.tanh(own / softcap)
        length = query.shape[2]
        behind = torch.arange(length)[:, None] - torch.arange(length)[None]
        own = own.masked_fill((behind < 0) | (behind >= (sliding_window or length)), -math.inf)
        scores.append(own[0])
        return (own.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("recorded", attend)
    hf.set_attn_implementation("recorded")
    yield scores
    hf.set_attn_implementation("eager")


@torch.inference_mode()
def seen(hf: Any, ids: list[int]) -> Seen:
    norm, behind = final_norm(hf), list[Tensor]()
    hook = norm.register_forward_pre_hook(lambda _, args: behind.append(args[0]))
    with recorded_scores(hf) as scores:
        out = hf(torch.tensor([ids]), output_hidden_states=True)
    hook.remove()
    states = [state[0] for state in (*out.hidden_states[:-1], behind[-1])]
    return Seen(states, [head(hf, norm(state)) for state in states], scores)


def head(hf: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = hf.get_output_embeddings()(hidden)
    logits = logits / getattr(hf.config, "logits_scaling", 1.0)
    if cap := getattr(hf.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def assert_near(got: Tensor, want: Tensor) -> None:
    alive = want > -math.inf
    assert torch.equal(got > -math.inf, alive)
    want = want.masked_fill(~alive, 0.0)
    atol = 1e-5 * float(want.abs().max())
    torch.testing.assert_close(got.masked_fill(~alive, 0.0), want, rtol=0, atol=atol)


# -- a probe


@torch.inference_mode()
def probed(core: EngineCore, wanted: list[tuple[int, int]]) -> tuple[Probed, list[Sequence]]:
    """A probe of some tokens (prompt, position), all prompts in one packed pass."""
    count = sum(-(-len(ids) // 4) for ids in PROMPTS)
    runner = Runner(core.model, count, 4, "cpu")
    blocks = list(range(count))[::-1]
    sequences, spans, places, rows, first = [], [], {}, [], 0
    for index, ids in enumerate(PROMPTS):
        table = [blocks.pop() for _ in range(-(-len(ids) // 4))][::-1]
        stream = TextStream(Detokenizer(core.tokenizer, skip_special_tokens=True))
        sequence = Sequence(index, 0, ids, len(ids), stream, block_table=table)
        spans.append(Span(0, len(ids), table))
        for prompt, position in wanted:
            if prompt == index:
                places[id(sequence), position] = len(rows)
                rows.append(first + position)
        sequences.append(sequence)
        first += len(ids)
    probe = Probe(torch.tensor(rows))
    inputs = ForwardInput(
        torch.tensor([token for ids in PROMPTS for token in ids]),
        torch.tensor([position for ids in PROMPTS for position in range(len(ids))]),
        runner.attention.plan(spans),
        probe,
    )
    core.model.forward(inputs, runner.cache, runner.attention)
    return Probed(probe, runner.cache, places), sequences


WANTED = [(0, 0), (1, 12), (1, 0), (1, 5), (2, 21), (2, 9)]


@torch.inference_mode()
def test_states_of_every_layer_are_hugging_face_s_and_so_is_what_they_say(pair: Pair) -> None:
    one, sequences = probed(pair.core, WANTED)
    want = [seen(pair.hf, ids) for ids in PROMPTS]
    model = pair.core.model
    assert model.has_lens
    for prompt, position in WANTED:
        states = one.states(sequences[prompt], position)
        assert states.dtype == torch.float32
        assert_near(states, torch.stack([state[position] for state in want[prompt].states]))
        lens = torch.stack([logits[position] for logits in want[prompt].lens])
        assert_near(model.logits(model.final_norm(states)), lens)
        assert not torch.allclose(lens[0], lens[2], rtol=0.1)  # a layer makes a difference


@torch.inference_mode()
def test_scores_of_every_layer_are_hugging_face_s(pair: Pair) -> None:
    one, sequences = probed(pair.core, WANTED)
    want = [seen(pair.hf, ids) for ids in PROMPTS]
    for prompt, position in WANTED:
        for layer, scores in enumerate(want[prompt].scores):
            got = one.scores(sequences[prompt], position, layer)
            assert got.dtype == torch.float32
            assert_near(got, scores[:, position, : position + 1])
    # The windows that there are have been met.
    slides = any(bool((scores[0, 21, :22] == -math.inf).any()) for scores in want[2].scores)
    assert slides == (pair.hf.config.model_type in ("mistral", "gemma2"))


def test_a_pass_without_a_probe_and_one_with_it_give_the_same_bits(pair: Pair) -> None:
    results = []
    for options in ({}, {"trace": TraceWish(layers=(0, 1, 2))}):
        one = request(pair.core, PROMPTS[2], logprobs=3, cache_salt=str(options), **options)
        results.append(run(pair.core, one).choices["r", 0].tokens)
    assert [token.logprob for token in results[0]] == [token.logprob for token in results[1]]


# -- through the engine


def signals(scores: Tensor) -> list[float]:
    """Entropix's four numbers of one query's scores [Hq, T], in float64, head by head."""
    heads = [[s for s in head if s > -math.inf] for head in scores.double().tolist()]
    weights = []
    for one in heads:
        exps = [math.exp(score - max(one)) for score in one]
        weights.append([each / math.fsum(exps) for each in exps])
    bits = [-math.fsum(w * math.log2(w) for w in one if w > 0) for one in weights]
    mean = math.fsum(bits) / len(bits)
    variance = math.fsum((each - mean) ** 2 for each in bits) / len(bits)
    shared = [math.fsum(column) / len(weights) for column in zip(*weights, strict=True)]
    apart = [abs(w - s) for one in weights for w, s in zip(one, shared, strict=True)]
    sizes = [abs(score) for one in heads for score in one]
    return [mean, variance, math.fsum(apart) / len(apart), math.fsum(sizes) / len(sizes)]


def test_each_traced_token_says_what_every_layer_would_have_said(pair: Pair) -> None:
    """In a crowd whose prompts come in parts, with several choices of each."""
    layers = (2, 0, 1)
    wish = TraceWish(top=5, layers=layers)
    requests = [
        request(
            pair.core,
            ids,
            str(number),
            trace=wish if number != 1 else TraceWish(top=5),
            temperature=1.0,
            max_tokens=6,
            ignore_eos=True,
            seed=number,
            n=2,
        )
        for number, ids in enumerate(PROMPTS)
    ]
    results = run(pair.core, *requests)
    for number, ids in enumerate(PROMPTS):
        for index in range(2):
            tokens = results.choices[str(number), index].tokens
            want = seen(pair.hf, [*ids, *(token.id for token in tokens)])
            for place, token in enumerate(tokens, len(ids) - 1):
                trace = token.trace
                assert trace is not None
                if number == 1:
                    assert trace.layers == ()
                    continue
                assert [one.layer for one in trace.layers] == list(layers)
                for one in trace.layers:
                    assert_listed(one.top, want.lens[one.layer][place])
                assert_listed(trace.before, want.lens[2][place])


def assert_listed(top: tuple[Any, ...], logits: Tensor) -> None:
    """The five likeliest; of tokens a hair apart, either may be the first."""
    probs = logits.double().softmax(0)
    expected = probs.sort(descending=True, stable=True).values[:5].tolist()
    assert len(top) == sum(prob > 1e-45 for prob in expected)
    # Probabilities are as exact as logits, which reach into the hundreds, absolutely are.
    loose = pytest.approx(expected[: len(top)], rel=2e-5 * float(logits.abs().max()), abs=1e-9)
    assert [one.prob for one in top] == loose
    assert [float(probs[one.token_id]) for one in top] == loose


def test_entropix_s_temperature_comes_from_the_last_layer_s_attention(pair: Pair) -> None:
    """By the formula of its last regime, which wide thresholds make the only one."""
    never = {"low_ent": 0.0, "med_ent": 1e3, "high_ent": 1e3, "low_vent": 0.0, "high_vent": 1e6}
    requests = [
        request(
            pair.core,
            ids,
            str(number),
            trace=TraceWish(),
            temperature=1.0,
            max_tokens=6,
            ignore_eos=True,
            seed=number,
            n=2,
            entropix=never | {"temperature": 0.5},
        )
        for number, ids in enumerate(PROMPTS)
    ]
    requests.insert(1, request(pair.core, PROMPTS[1], "other", max_tokens=6))
    results = run(pair.core, *requests)
    different = set()
    for number, ids in enumerate(PROMPTS):
        for index in range(2):
            tokens = results.choices[str(number), index].tokens
            want = seen(pair.hf, [*ids, *(token.id for token in tokens)])
            for place, token in enumerate(tokens, len(ids) - 1):
                assert token.trace is not None
                heat = warmth(want.scores[-1][:, place, : place + 1], want.lens[2][place])
                assert token.trace.temperature == pytest.approx(0.5 * heat, rel=2e-3)
                different.add(round(heat, 2))
    assert len(different) > 10


def warmth(scores: Tensor, logits: Tensor) -> float:
    spread, variance, agreement, _ = signals(scores)
    probs = [p for p in logits.double().softmax(0).tolist() if p > 0]
    entropy = -math.fsum(p * math.log2(p) for p in probs)
    varentropy = math.fsum(p * (math.log2(p) + entropy) ** 2 for p in probs)
    return 1 + 0.3 * (entropy + varentropy) + 0.2 * (spread + variance) - 0.2 * agreement


# -- the numbers of a query


def test_worked_signals() -> None:
    """Two heads: one looks at one key of four, the other at all alike."""
    scores = torch.tensor([[100.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    got = attention_signals(scores).tolist()
    # Weights (1, 0, 0, 0) and (¼, ¼, ¼, ¼) are 3/8, 1/8, 1/8, 1/8 from their mean.
    assert got == pytest.approx([1.0, 1.0, 6 / 32, 104 / 8], abs=1e-6)
    # Keys that are out of sight do not count.
    hidden = torch.full((2, 12), -math.inf)
    assert attention_signals(torch.cat((hidden, scores), 1)).tolist() == pytest.approx(got)


def test_signals_match_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for heads, length in ((1, 1), (1, 9), (4, 1), (4, 30), (9, 200)):
        scores = 4 * torch.randn(heads, length, generator=generator)
        scores[:, : length // 3] = -math.inf
        assert attention_signals(scores).tolist() == pytest.approx(signals(scores), abs=1e-5)


def test_scores_are_read_through_the_block_table() -> None:
    """Grouped heads, a scale, a soft cap and a window, against a loop."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(6, 2, 4, 8, generator=generator)
    q, blocks, length = torch.randn(4, 8, generator=generator), [5, 0, 3], 10
    got = attention_scores(
        q, LayerCache(keys, keys), blocks, length, scale=0.3, window=7, softcap=2.0
    )
    assert got.shape == (4, length)
    for head in range(4):
        for position in range(length):
            key = keys[blocks[position // 4], head // 2, position % 4]
            score = 0.3 * math.fsum(
                (a * b for a, b in zip(q[head].tolist(), key.tolist(), strict=True))
            )
            want = 2 * math.tanh(score / 2) if position >= length - 7 else -math.inf
            assert float(got[head, position]) == pytest.approx(want, abs=1e-5)


# -- the kernels' decoder, which gives what the one in torch gives


def traced(folder: Path, **config: Any) -> list[TokenTrace]:
    core, _ = tiny_core(folder, max_batch_tokens=8, max_num_seqs=8, **config)
    requests = [
        request(
            core,
            ids,
            str(number),
            trace=TraceWish(top=tiny.VOCAB, layers=(0, 1, 2)),
            max_tokens=1,
            temperature=1.0,
            entropix={"low_vent": 0.0, "high_vent": 1e6},
        )
        for number, ids in enumerate(PROMPTS)
    ]
    results = run(core, *requests)
    found = [results.choices[str(number), 0].tokens[0].trace for number in range(len(PROMPTS))]
    return [trace for trace in found if trace is not None]


def test_the_kernels_show_what_the_decoder_in_torch_shows(tmp_path: Path) -> None:
    hf = tiny.hf_model("mistral-sliding", hidden_size=128, initializer_range=0.1)
    folder = tiny.save(hf, tmp_path)
    plain, quantized = traced(folder), traced(folder, quantization="int8")
    for one, other in zip(plain, quantized, strict=True):
        if native.LIBRARY is not None:  # else it runs as it would without
            assert one != other
        assert other.temperature == pytest.approx(one.temperature, rel=0.03)
        for ours, kernels in zip(one.layers, other.layers, strict=True):
            want = {each.token_id: each.prob for each in ours.top}
            got = {each.token_id: each.prob for each in kernels.top}
            assert sum(abs(want[token] - got[token]) for token in want) < 0.1
        # The last layer is the whole model.
        assert [p.token_id for p in other.layers[2].top] == [p.token_id for p in other.before]
