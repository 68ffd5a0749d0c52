"""Stochastic beams draw sequences without replacement, each as likely as it should be."""

import math
import random
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal, localcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core import EngineCore
from engine.growth import ends, grow
from engine.messages import Candidate, Token
from engine.strategies.base import View
from engine.strategies.stochastic import StochasticBeams, _conditioned
from engine.text import Detokenizer, TextStream
from engine.tokenizer import Tokenizer
from engine.types import Sequence
from tests.support import tiny
from tests.support.beams import ENDS, START, TOY, E, beams, hypotheses, prompts_of, toy_core
from tests.support.engines import Results, assert_all_free, run, tiny_core

Ids = tuple[int, ...]


def leaves(max_tokens: int, ids: Ids = (), prob: float = 1.0) -> Iterator[tuple[Ids, float]]:
    """All that the chain can say, and how likely that is."""
    if ids[-1:] == (E,) or len(ids) == max_tokens:
        yield ids, prob
    else:
        for token, own in TOY[(START, *ids)[-1]].items():
            yield from leaves(max_tokens, (*ids, token), prob * own)


# -- the noise of extensions


def exactly(own: float, largest: float, above: float) -> float:
    """-ln(e^-above - e^-largest + e^-own) with sixty digits."""
    with localcontext() as context:
        context.prec = 60
        parts = [(-Decimal(x)).exp() for x in (above, largest, own)]
        return float(-(parts[0] - parts[1] + parts[2]).ln())


@pytest.mark.parametrize(
    ("own", "largest", "above", "want"),
    [
        (1.0, 1.0, -0.5, -0.5),  # the largest takes the place of what it extends
        (0.0, 1.0, 0.0, -0.489881),  # -ln(1 - e^-1 + 1)
        (-2.0, 1.0, 0.0, -2.082085),  # -ln(1 - e^-1 + e^2)
        (0.5, 1.0, -3.0, -3.011812),
        (-40.0, 2.0, -1.0, -40.0),
    ],
)
def test_worked_examples_of_conditioned_noise(
    own: float, largest: float, above: float, want: float
) -> None:
    assert _conditioned(own, largest, above) == pytest.approx(want, abs=1e-6)
    assert exactly(own, largest, above) == pytest.approx(want, abs=1e-6)


def test_conditioned_noise_keeps_its_digits() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        largest = rng.uniform(-60, 25)
        own = largest - 10 ** rng.uniform(-9, 1.8)
        above = rng.uniform(-60, 25)
        got = _conditioned(own, largest, above)
        assert got == pytest.approx(exactly(own, largest, above), rel=1e-9, abs=1e-6)
        assert got <= above


# -- the recursion


_TOKENS = range(3, 7)
_ENDING = (3, 4)


class Forest:
    """A random tree of sequences, with noise of each token's own."""

    def __init__(self, seed: int, depth: int) -> None:
        self.rng = random.Random(seed)
        self.depth = depth
        self.children: dict[Ids, list[Candidate]] = {}

    def below(self, ids: Ids) -> list[Candidate]:
        """The largest with noise first."""
        if ids not in self.children:
            probs = [self.rng.random() for _ in range(4)]
            logprobs = [math.log(prob / sum(probs)) for prob in probs]
            noise = [-math.log(-math.log(self.rng.random())) for _ in range(4)]
            made = zip(_TOKENS, logprobs, noise, strict=True)
            candidates = [Candidate(Token(i, ""), own, own + more) for i, own, more in made]
            self.children[ids] = sorted(candidates, key=lambda one: -one.perturbed)
        return self.children[ids]

    def leaves(self, ids: Ids = (), total: float = 0.0, above: float = 0.0) -> dict[Ids, float]:
        """The perturbed logprob of every leaf, top down by the formula itself."""
        if ids and (ids[-1] in _ENDING or len(ids) == self.depth):
            return {ids: above}
        found: dict[Ids, float] = {}
        largest = max(total + one.perturbed for one in self.below(ids))
        for one in self.below(ids):
            own = exactly(total + one.perturbed, largest, above)
            found |= self.leaves((*ids, one.token.id), total + one.logprob, own)
        return found


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("seed", range(6))
def test_keeps_the_largest_of_all_perturbed_leaves(
    tokenizer: Tokenizer, seed: int, width: int
) -> None:
    """No beam that is given up has any of them below it, so it is as if all were perturbed."""
    core = toy_core(tokenizer)
    options = {"beam_width": width, "n": width, "max_tokens": 5, "stochastic_beams": True}
    request = beams(core, [START], ends=_ENDING, **options)
    forest = Forest(seed, depth=5)
    strategy = StochasticBeams(request)
    live = [Sequence(0, 0, [START], 1, TextStream(Detokenizer(core.tokenizer, True)))]
    finished: list[Sequence] = []
    for _ in range(5):
        # No more are shown than there are beams.
        top = [forest.below(tuple(one.output))[:width] for one in live]
        branches = strategy.advance(live, View([], top, ends=partial(ends, request)))
        live = []
        for branch in branches:
            child = core.scheduler._fork(branch.parent)
            grow(request, child, branch)
            (live if child.finish_reason is None else finished).append(child)
        if not live:
            break
    assert not live
    every = forest.leaves()
    largest = sorted(every, key=lambda ids: -every[ids])[:width]
    ranked = strategy.rank(finished)
    assert [tuple(one.output) for one in ranked] == largest
    assert [one.memory for one in ranked] == pytest.approx([every[ids] for ids in largest])


# -- the distribution


def p_value(counts: Counter[Any], probs: dict[Any, float]) -> float:
    """Of Pearson's chi-square; cells of which few are to be expected are counted together."""
    assert set(counts) <= set(probs)
    assert sum(probs.values()) == pytest.approx(1.0)
    total = counts.total()
    rare = {cell for cell, prob in probs.items() if prob * total < 8}
    cells = [(counts[cell], prob * total) for cell, prob in probs.items() if cell not in rare]
    if rare:
        seen = sum(counts[cell] for cell in rare)
        cells.append((seen, total * sum(probs[cell] for cell in rare)))
    statistic = sum((seen - want) ** 2 / want for seen, want in cells)
    halves = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def drawn(core: EngineCore, seeds: range, **options: Any) -> list[list[Ids]]:
    """The sequences of each seed, in the order in which they were drawn."""
    made = [
        beams(core, [START], str(seed), seed=seed, stochastic_beams=True, **options)
        for seed in seeds
    ]
    results = run(core, *made)
    return [[tuple(ids) for ids, _ in hypotheses(results, str(seed))] for seed in seeds]


@pytest.mark.parametrize(("max_tokens", "width"), [(2, 2), (3, 3)])
def test_every_order_is_as_likely_as_without_replacement(
    tokenizer: Tokenizer, max_tokens: int, width: int
) -> None:
    core = toy_core(tokenizer, max_num_seqs=60, prefix_cache=False)
    samples = drawn(core, range(1000), beam_width=width, n=width, max_tokens=max_tokens)
    assert all(len(set(sample)) == width for sample in samples)
    probs = dict(leaves(max_tokens))
    pairs = {
        (first, second): probs[first] * probs[second] / (1 - probs[first])
        for first in probs
        for second in probs
        if first != second
    }
    assert p_value(Counter(sample[0] for sample in samples), probs) > 0.01
    assert p_value(Counter((sample[0], sample[1]) for sample in samples), pairs) > 0.01
    # How likely a sequence is to be among them, at whatever place.
    included = Counter(ids for sample in samples for ids in sample)
    for ids, want in inclusion(probs, width).items():
        spread = math.sqrt(want * (1 - want) / len(samples))
        assert abs(included[ids] / len(samples) - want) < 3.5 * spread + 1e-9


def inclusion(probs: dict[Ids, float], count: int) -> dict[Ids, float]:
    """How likely each is to be one of the first `count` drawn without replacement."""
    found = dict.fromkeys(probs, 0.0)

    def draw(left: dict[Ids, float], prob: float, count: int) -> None:
        rest = sum(left.values())
        for ids, own in left.items():
            chance = prob * own / rest
            found[ids] += chance
            if count > 1:
                draw({other: p for other, p in left.items() if other != ids}, chance, count - 1)

    draw(probs, 1.0, count)
    return found


def test_inclusion_is_worked_out_right() -> None:
    """For the test above: of .5, .3, .2, two are drawn."""
    found = inclusion({(0,): 0.5, (1,): 0.3, (2,): 0.2}, 2)
    want = {(0,): 0.5 + 0.3 * 0.5 / 0.7 + 0.2 * 0.5 / 0.8}
    assert found[0,] == pytest.approx(want[0,])
    assert sum(found.values()) == pytest.approx(2.0)


def test_draws_all_there_are_if_there_are_no_more(tokenizer: Tokenizer) -> None:
    core = toy_core(tokenizer)
    for sample in drawn(core, range(5), beam_width=9, n=9, max_tokens=2):
        probs = dict(leaves(2))
        # What the chain forbids is very unlikely, but it is not banned.
        assert set(sample[: len(probs)]) == set(probs)


# -- seeds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.hf_model("llama", initializer_range=0.15)
    return tiny.save(model, tmp_path_factory.mktemp("stochastic"))


def test_samples_are_distinct_and_know_their_logprobs(folder: Path) -> None:
    core, _ = tiny_core(folder, prefix_cache=True)
    model = tiny.load(folder)
    lengths: set[int] = set()
    for seed, prompt in enumerate(prompts_of(4, seed=2)):
        options = {"beam_width": 12, "n": 12, "seed": seed, "max_tokens": 6, "logprobs": 1}
        results = run(core, beams(core, prompt, ends=ENDS, stochastic_beams=True, **options))
        found = [tuple(ids) for ids, _ in hypotheses(results)]
        assert len(set(found)) == 12
        lengths |= {len(ids) for ids in found}
        for index, ids in enumerate(found):
            delta = results.choices["r", index]
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).flatten()
            assert [token.logprob for token in delta.tokens] == pytest.approx(
                logprobs.tolist(), abs=1e-4
            )
            total = float(logprobs.sum())
            assert delta.report["cumulative_logprob"] == pytest.approx(total, abs=1e-3)
            score = total / len(ids)
            assert delta.report["sequence_score"] == pytest.approx(score, abs=1e-3)
    assert len(lengths) > 2
    assert_all_free(core)


def test_a_seed_gives_the_same_sequences_alone_and_among_others(folder: Path) -> None:
    core, _ = tiny_core(folder, prefix_cache=True)

    def made(seed: int, n: int, request_id: str = "r") -> Any:
        options = {"beam_width": 4, "n": n, "seed": seed, "max_tokens": 8}
        return beams(core, [20, 21], request_id, ENDS, stochastic_beams=True, **options)

    def found(results: Results, request_id: str = "r") -> list[tuple[list[int], float]]:
        return hypotheses(results, request_id)

    alone = [found(run(core, made(seed, 4))) for seed in range(4)]
    crowd = run(core, *(made(seed, 4, str(seed)) for seed in range(4)))
    for seed in range(4):
        together = found(crowd, str(seed))
        assert [ids for ids, _ in together] == [ids for ids, _ in alone[seed]]
        assert found(run(core, made(seed, 4))) == alone[seed]
        # The first drawn are those that a smaller answer holds.
        assert found(run(core, made(seed, 2))) == alone[seed][:2]
    different = {tuple(tuple(ids) for ids, _ in one) for one in alone}
    assert len(different) == 4
