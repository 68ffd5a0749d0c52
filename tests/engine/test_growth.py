"""What ends a sequence, drafts that do not count yet, and what of a group may leave early."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core import EngineCore
from engine.growth import ends, grow
from engine.messages import NO_VALID_TOKEN, FinishReason, Request, Token
from engine.strategies.base import Branch
from engine.text import Settled, Stops
from engine.tokenizer import Tokenizer
from engine.types import Sequence
from tests.support import tiny
from tests.support.beams import ENDS, beams, prompts_of
from tests.support.engines import EOS, Results, collect, request, run, scripted_core, tiny_core
from tests.support.scripted import ScriptedModel

PROMPT = [40, 41, 42]
LETTERS = range(68, 72)  # a, b, c, d


@pytest.fixture(scope="module")
def core(tokenizer: Tokenizer) -> EngineCore:
    assert [tokenizer.text_of(i) for i in LETTERS] == ["a", "b", "c", "d"]
    return scripted_core(ScriptedModel(), tokenizer)


def sequence_of(core: EngineCore, made: Request) -> Sequence:
    sequence = core._sequence(made, 0, Stops(made.stop_strings))
    sequence.companion = replace(sequence, token_ids=[50, *PROMPT], prompt_len=4)
    return sequence


def tokens_of(ids: list[int]) -> tuple[Token, ...]:
    return tuple(Token(token_id, "", -0.5) for token_id in ids)


# -- how a sequence ends


@dataclass
class End:
    """What becomes of some output tokens, worked out from the text as a whole."""

    count: int
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text: str = ""


def worked_out(made: Request, ids: list[int]) -> End:
    letters = dict(zip(LETTERS, "abcd", strict=True))
    text = ""
    for count, token_id in enumerate(ids, start=1):
        if token_id in made.eos_token_ids and not made.params.ignore_eos:
            return End(count, FinishReason.STOP, None, text)
        if token_id in made.stop_tokens:
            return End(count, FinishReason.STOP, made.stop_tokens[token_id], text)
        text += letters.get(token_id, "")
        seen = text[made.params.min_tokens :]  # every token before has one letter
        found = [stop for stop in made.stop_strings if seen.endswith(stop)]
        if count > made.params.min_tokens and found:
            cut = 0 if made.params.include_stop_str_in_output else len(found[0])
            return End(count, FinishReason.STOP, found[0], text[: len(text) - cut])
        if count == made.max_tokens:
            return End(count, FinishReason.LENGTH, None, text)
    return End(len(ids), text=text)


CONDITIONS: list[dict[str, Any]] = [
    {},
    {"stop": ["ab", "ca"]},
    {"stop": ["abc"], "include_stop_str_in_output": True},
    {"stop": ["bb", "a"], "min_tokens": 3},
    {"stop_token_ids": [71]},
    {"ignore_eos": True, "stop": ["ad"], "stop_token_ids": [70]},
]


@pytest.mark.parametrize("condition", CONDITIONS, ids="-".join)
@pytest.mark.parametrize("seed", range(3))
def test_ends_where_its_text_and_tokens_say(
    core: EngineCore, condition: dict[str, Any], seed: int
) -> None:
    """Alone or several at once, as a draft or outright."""
    rng = random.Random(seed)
    made = request(core, PROMPT, max_tokens=7, **condition)
    first = made.params.min_tokens  # nothing before that may end it
    for _ in range(40):
        ids = [rng.choice([*LETTERS, *LETTERS, *([EOS] * (i >= first))]) for i in range(7)]
        want = worked_out(made, ids)
        sequence = sequence_of(core, made)
        waiting, num_heard = ids, 0
        while waiting and sequence.finish_reason is None:
            size = rng.randint(1, 3)
            part, waiting = waiting[:size], waiting[size:]
            before = len(ids) - len(waiting) - len(part)
            if before < want.count:  # no token that is pending ends it
                last = before + 1 == want.count and want.reason is not None
                assert ends(made, sequence, Token(part[0], "")) == last
            draft = rng.random() < 0.5
            settle = not draft or rng.random() < 0.3
            grow(made, sequence, Branch(sequence, tokens_of(part), draft=draft, settle=settle))
            heard = [token.id for token in sequence.tokens]
            if draft and not settle:
                assert heard == ids[:num_heard]
                assert sequence.output == ids[: len(ids) - len(waiting)]
            num_heard = len(heard)
        grow(made, sequence, Branch(sequence))
        assert sequence.pending == []
        assert (sequence.finish_reason, sequence.stop_reason) == (want.reason, want.stop_reason)
        assert sequence.output == ids[: want.count]
        assert [token.id for token in sequence.tokens] == ids[: want.count]
        assert sequence.cumulative_logprob == -0.5 * want.count
        if want.reason is not None:
            assert sequence.stream.take(final=True)[0] == want.text


def test_drafts_are_foretold_with_what_is_pending(core: EngineCore) -> None:
    made = request(core, PROMPT, max_tokens=9, stop=["abc"])
    sequence = sequence_of(core, made)
    grow(made, sequence, Branch(sequence, tokens_of([68, 69]), draft=True))
    assert ends(made, sequence, Token(70, ""))
    assert not ends(made, sequence, Token(68, ""))
    assert sequence.tokens == []
    assert sequence.stream.take() == ("", ())


def test_a_companion_gets_the_same_output(core: EngineCore) -> None:
    made = request(core, PROMPT, max_tokens=9)
    sequence = sequence_of(core, made)
    grow(made, sequence, Branch(sequence, tokens_of([68, 69]), score=-1.5, memory="x", seed=5))
    grow(made, sequence, Branch(sequence, tokens_of([70])))
    assert sequence.companion is not None
    assert sequence.companion.token_ids == [50, *PROMPT, 68, 69, 70]
    assert (sequence.score, sequence.scores) == (-1.5, [-1.5])
    assert (sequence.memory, sequence.seed) == ("x", 5)


def test_ends_where_every_token_is_banned(core: EngineCore) -> None:
    made = request(core, PROMPT, max_tokens=9)
    for draft in (False, True):
        sequence = sequence_of(core, made)
        grow(made, sequence, Branch(sequence, tokens_of([68]), draft=draft))
        assert ends(made, sequence, Token(NO_VALID_TOKEN, ""))
        grow(made, sequence, Branch(sequence, (Token(NO_VALID_TOKEN, ""),)))
        assert (sequence.finish_reason, sequence.stop_reason) == ("stop", "no_valid_token")
        assert sequence.output == [68]
        assert sequence.stream.take(final=True)[0] == "a"


# -- what has settled


def grown(core: EngineCore, made: Request, ids: list[int]) -> Sequence:
    sequence = core._sequence(made, 0, Stops(made.stop_strings))
    grow(made, sequence, Branch(sequence, tokens_of(ids)))
    return sequence


def settled_of(core: EngineCore, made: Request) -> Settled:
    return Settled(core._sequence(made, 0, Stops(made.stop_strings)).stream, made.params.min_tokens)


def test_what_all_have_in_common_leaves_once(core: EngineCore) -> None:
    made = request(core, PROMPT, max_tokens=9)
    settled = settled_of(core, made)
    a, b = grown(core, made, [68, 69]), grown(core, made, [68, 70])
    text, tokens = settled.take([a, b])
    assert (text, [token.id for token in tokens]) == ("a", [68])
    assert settled.take([a, b]) == ("", ())
    # One that has ended says where it did: the others need not.
    over = grown(core, made, [68, 69, EOS])
    longer = grown(core, made, [68, 69, 70, 71])
    text, tokens = settled.take([longer, over])
    assert (text, [token.id for token in tokens]) == ("b", [69])
    assert settled.take([longer, over]) == ("", ())
    text, tokens = settled.rest_of(*longer.stream.take())
    assert (text, [token.id for token in tokens]) == ("cd", [70, 71])


def test_what_may_begin_a_stop_string_waits(core: EngineCore) -> None:
    made = request(core, PROMPT, max_tokens=9, stop=["abd"])
    settled = settled_of(core, made)
    assert settled.take([grown(core, made, [70, 68, 69])])[0] == "c"
    both = [grown(core, made, [70, 68, 69, 71]), grown(core, made, [70, 68, 69, 70])]
    assert both[0].stop_reason == "abd"
    assert settled.take(both) == ("", ())
    assert settled.take([grown(core, made, [70, 68, 69, 70])])[0] == "abc"


def test_half_a_character_waits(core: EngineCore) -> None:
    made = request(core, PROMPT, max_tokens=9)
    first, second = (
        next(i for i in range(128) if core.tokenizer.bytes_of(i) == byte)
        for byte in (b"\xc3", b"\xa9")
    )
    settled = settled_of(core, made)
    assert settled.take([grown(core, made, [68, first])])[0] == "a"
    text, tokens = settled.take([grown(core, made, [68, first, second])])
    assert (text, [token.id for token in tokens]) == ("é", [first, second])


# -- streams of beams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.hf_model("llama", initializer_range=0.3)
    return tiny.save(model, tmp_path_factory.mktemp("growth"))


STREAMED: list[dict[str, Any]] = [
    {"n": 1},
    {"n": 3, "logprobs": 2},
    {"n": 2, "stop": ["e", "an", "3x"], "logprobs": 0},
    {"n": 2, "stop": ["e", "1", "("], "min_tokens": 4, "include_stop_str_in_output": True},
    {"n": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"n": 1, "prompt_logprobs": 1, "stop_token_ids": list(range(60, 64))},
]


@pytest.mark.parametrize("options", STREAMED, ids="-".join)
def test_streamed_beams_are_those_of_a_whole_answer(folder: Path, options: dict[str, Any]) -> None:
    core, _ = tiny_core(folder, prefix_cache=False)
    rng = random.Random(3)
    num_early = 0
    for last in [ENDS, (EOS,)] * 2:
        prompt = [rng.randrange(3, tiny.VOCAB) for _ in range(rng.randint(1, 6))]
        given = {"beam_width": 4, "max_tokens": 14} | options
        whole = run(core, beams(core, prompt, ends=last, **given))
        streamed = run(core, beams(core, prompt, ends=last, stream=True, **given))
        assert streamed.choices == whole.choices
        assert len(whole.choices) == options["n"]
        for index in range(options["n"]):
            parts = [delta for delta in streamed.deltas if delta.index == index]
            assert [delta.finish_reason is None for delta in parts] == [
                *[True] * (len(parts) - 1),
                False,
            ]
            assert all(delta.text or delta.tokens for delta in parts[:-1])
            num_early += len(parts) - 1
    assert num_early > 0  # something has settled early


@pytest.mark.parametrize(
    "options",
    [{"beam_prune": 0.3, "n": 3}, {"beam_prune": 0.3, "n": 1}, {"allowed_token_ids": [68]}],
)
def test_every_choice_that_has_begun_ends(folder: Path, options: dict[str, Any]) -> None:
    """Also where there are fewer hypotheses than choices."""
    core, _ = tiny_core(folder, prefix_cache=False)
    given = {"beam_width": 3, "n": 2, "max_tokens": 8} | options
    counts = set()
    for prompt in prompts_of(5, seed=6):
        whole = run(core, beams(core, prompt, ends=ENDS, **given))
        streamed = run(core, beams(core, prompt, ends=ENDS, stream=True, **given))
        assert streamed.choices == whole.choices
        assert all(delta.finish_reason for delta in streamed.choices.values())
        counts.add(len(whole.choices))
    assert min(counts) == 1


def test_settled_text_leaves_while_the_search_goes_on(tokenizer: Tokenizer) -> None:
    """The later another token is chosen, the less that costs: the beams differ in their ends."""

    def script(_token: int, position: int) -> torch.Tensor:
        row = torch.full((tiny.VOCAB,), -20.0)
        row[68 + position % 20] = 0.0
        row[69 + position % 20] = 0.2 * position - 5.0
        return row

    core = scripted_core(ScriptedModel(script, context_len=64), tokenizer)
    given = {"beam_width": 3, "n": 2, "max_tokens": 16, "early_stopping": "never"}
    core.submit(beams(core, PROMPT, stream=True, **given))
    results, left = Results(), []
    for _ in range(40):
        collect(results, core.step()[0])
        left.append(sum(len(delta.tokens) for delta in results.deltas if delta.index == 0))
        if not core.has_work:
            break
    assert 0 < left[7] < left[-2] < left[-1] == 16
    assert results.merge().choices == run(core, beams(core, PROMPT, **given)).choices
