"""Every default is resolved, and everything that cannot be run is refused by name."""

import json
from dataclasses import replace
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.messages import Request, TraceWish
from engine.params import MAX_WAITING_TOKENS, SamplingParams
from engine.prepare import MAX_BAD_WORD_TOKENS, ModelInfo, Output, prepare
from engine.rng import derive
from engine.tokenizer import Tokenizer

INFO = ModelInfo(
    vocab_size=100,
    context_len=64,
    num_lanes=4,
    num_blocks=24,
    block_size=4,
    eos_token_ids=frozenset({2}),
    dtype="float32",
    device="cpu",
    model_type="none",
    identity="",
)


def prepared(
    tokenizer: Tokenizer,
    prompt_len: int = 10,
    info: ModelInfo = INFO,
    options: dict[str, Any] | None = None,
    **params: Any,
) -> Request:
    return prepare(
        [5] * prompt_len,
        SamplingParams.model_validate(params),
        Output(),
        info,
        tokenizer,
        request_id="r",
        **(options or {}),
    )


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"stop_token_ids": [3, 100]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"allowed_token_ids": [100]}, "allowed_token_ids"),
        ({"logit_bias": {"100": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
    ],
)
def test_ids_that_no_token_has_are_refused_where_they_are(
    tokenizer: Tokenizer, params: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        prepared(tokenizer, **params)
    assert (raised.value.param, raised.value.code) == (param, "invalid_token_id")
    assert "from 0 to 99" in str(raised.value)
    prepared(tokenizer, stop_token_ids=[0, 99], allowed_token_ids=[99], logit_bias={"99": 1.0})


@pytest.mark.parametrize("token_id", [-1, 100, 1 << 70])
def test_a_prompt_of_ids_that_no_token_has_is_refused(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(InvalidRequest) as raised:
        prepare(
            [5, token_id],
            SamplingParams(),
            Output(),
            INFO,
            tokenizer,
            request_id="r",
            prompt_param="prompt[3]",
        )
    assert (raised.value.param, raised.value.code) == ("prompt[3]", "invalid_token_id")


# -- length


@pytest.mark.parametrize(
    ("prompt_len", "params", "asked"),
    [
        (60, {"max_tokens": 5}, 5),
        (64, {"max_tokens": 1}, 1),
        (64, {}, 1),
        (65, {"max_tokens": 0}, 0),
        (65, {}, 1),
    ],
)
def test_what_is_longer_than_the_context_is_refused_in_openais_words(
    tokenizer: Tokenizer, prompt_len: int, params: dict[str, Any], asked: int
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        prepared(tokenizer, prompt_len, options={"prompt_param": "messages"}, **params)
    assert (raised.value.param, raised.value.code) == ("messages", "context_length_exceeded")
    assert str(raised.value) == (
        "This model's maximum context length is 64 tokens. However, you requested "
        f"{prompt_len + asked} tokens ({prompt_len} in the prompt, {asked} in the completion). "
        "Please reduce the length of the prompt or the completion."
    )


@pytest.mark.parametrize(
    ("prompt_len", "params", "options", "max_tokens"),
    [
        (60, {"max_tokens": 4}, {}, 4),
        (64, {"max_tokens": 0}, {}, 0),
        (63, {"max_tokens": 1}, {}, 1),
        (10, {}, {}, 54),
        (10, {}, {"default_max_tokens": 16}, 16),
        (60, {}, {"default_max_tokens": 16}, 4),
        (10, {"max_tokens": 3}, {"default_max_tokens": 16}, 3),
        (60, {"max_tokens": 1000}, {"clamp_max_tokens": True}, 4),
        (10, {"max_tokens": 1000}, {"clamp_max_tokens": True}, 54),
    ],
)
def test_the_number_of_tokens_is_what_was_asked_for_or_what_fits(
    tokenizer: Tokenizer,
    prompt_len: int,
    params: dict[str, Any],
    options: dict[str, Any],
    max_tokens: int,
) -> None:
    assert prepared(tokenizer, prompt_len, options=options, **params).max_tokens == max_tokens


def test_clamping_does_not_make_a_full_context_longer(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="maximum context length"):
        prepared(tokenizer, 64, options={"clamp_max_tokens": True}, max_tokens=5)


@pytest.mark.parametrize(
    ("params", "options", "most"),
    [({"min_tokens": 17}, {"default_max_tokens": 16}, 16), ({"min_tokens": 55}, {}, 54)],
)
def test_a_minimum_beyond_the_default_maximum_is_refused(
    tokenizer: Tokenizer, params: dict[str, Any], options: dict[str, Any], most: int
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        prepared(tokenizer, options=options, **params)
    assert raised.value.param == "min_tokens"
    assert str(most) in str(raised.value)
    assert prepared(tokenizer, options=options, min_tokens=most).max_tokens == most


# -- capacity


@pytest.mark.parametrize(
    ("params", "field"), [({"n": 5}, "n"), ({"n": 2, "best_of": 5}, "best_of")]
)
def test_more_sequences_than_lanes_are_refused(
    tokenizer: Tokenizer, params: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        prepared(tokenizer, **params)
    assert (raised.value.param, raised.value.code) == (field, "invalid_value")
    assert "at most 4" in str(raised.value)
    assert "got 5" in str(raised.value)


CAPACITY: list[tuple[int, dict[str, Any], int, str]] = [
    # 24 blocks of 4 tokens; a prompt of 10 fills 2, so 4 sequences can have 5 more each: 28 tokens.
    (10, {"n": 4}, 18, "n"),
    (10, {"n": 1, "best_of": 4}, 18, "best_of"),
    (10, {"use_beam_search": True, "beam_width": 4}, 18, "beam_width"),
    # A prompt of 40 fills 10: of the other 14, each of 4 gets 3.
    (40, {"n": 4}, 12, "n"),
    # A companion has a prompt of its own, 3 tokens long.
    (10, {"n": 2, "guidance_scale": 2.0, "negative_prompt": [5, 6, 7]}, 18, "n"),
]


@pytest.mark.parametrize(("prompt_len", "params", "most", "param"), CAPACITY)
def test_a_group_must_fit_into_the_cache_sharing_its_prompt_alone(
    tokenizer: Tokenizer, prompt_len: int, params: dict[str, Any], most: int, param: str
) -> None:
    assert prepared(tokenizer, prompt_len, **params, max_tokens=most).max_tokens == most
    assert prepared(tokenizer, prompt_len, **params).max_tokens == most
    with pytest.raises(InvalidRequest) as raised:
        prepared(tokenizer, prompt_len, **params, max_tokens=most + 1)
    assert (raised.value.param, raised.value.code) == (param, "invalid_value")
    assert f"x {most + 1} tokens behind a prompt of {prompt_len}" in str(raised.value)
    assert "has 24" in str(raised.value)


def test_what_does_not_fit_alone_is_not_the_fault_of_the_others(tokenizer: Tokenizer) -> None:
    small = replace(INFO, num_blocks=8)
    for prompt_len, param in ((10, "max_tokens"), (33, "prompt")):
        for n in (1, 3):
            with pytest.raises(InvalidRequest) as raised:
                prepared(tokenizer, prompt_len, info=small, n=n, max_tokens=30)
            assert raised.value.param == param


@pytest.mark.parametrize(
    ("params", "rows"),
    [
        ({}, 1),
        ({"guidance_scale": 2.0}, 2),
        ({"dola_layers": [0, 1, 2]}, 4),
    ],
)
def test_a_step_has_only_so_many_rows_of_logits(
    tokenizer: Tokenizer, params: dict[str, Any], rows: int
) -> None:
    info = replace(INFO, num_lanes=64, batch_tokens=32, num_layers=4, num_blocks=1000)
    most = 32 // rows
    prepared(tokenizer, info=info, n=most, max_tokens=1, **params)
    with pytest.raises(InvalidRequest) as raised:
        prepared(tokenizer, info=info, n=most + 1, max_tokens=1, **params)
    assert raised.value.param == "n"
    assert f"at most {most}" in str(raised.value)


def test_a_trace_counts_as_rows_too(tokenizer: Tokenizer) -> None:
    info = replace(INFO, num_lanes=64, batch_tokens=32, num_layers=4, num_blocks=1000)
    for layers, most in (((), 6), ((0, 1, 4), 4)):
        output = Output(trace=TraceWish(5, layers))

        def ask(n: int, output: Output = output) -> Request:
            params = SamplingParams(n=n, max_tokens=1)
            return prepare([5], params, output, info, tokenizer, request_id="r")

        ask(most)
        with pytest.raises(InvalidRequest, match=f"n must be at most {most}"):
            ask(most + 1)


# -- what is resolved


def test_no_more_hypotheses_wait_than_there_is_memory_for(tokenizer: Tokenizer) -> None:
    search = {"use_beam_search": True, "beam_width": 4, "beam_strategy": "best_first"}
    most = MAX_WAITING_TOKENS // 8
    prepared(tokenizer, max_tokens=8, beam_memory=most, **search)
    with pytest.raises(InvalidRequest, match=f"at most {most}, .* 8 tokens .*{most + 1}") as caught:
        prepared(tokenizer, max_tokens=8, beam_memory=most + 1, **search)
    assert caught.value.param == "beam_memory"


def test_special_tokens_named_as_stop_strings_become_stop_tokens(tokenizer: Tokenizer) -> None:
    one = prepared(tokenizer, stop=["<s>", "x", "</s>"], stop_token_ids=[7])
    assert one.stop_tokens == {7: 7, 1: "<s>", 2: "</s>"}
    assert one.stop_strings == ("<s>", "x", "</s>")
    assert one.eos_token_ids == {2}


def test_seeds_are_kept_or_made_up(tokenizer: Tokenizer) -> None:
    assert prepared(tokenizer, seed=7).seed == 7
    assert prepared(tokenizer, seed=0).seed == 0
    assert prepared(tokenizer, seed=-(1 << 63)).seed == -(1 << 63)
    random = {prepared(tokenizer, **params).seed for params in ({}, {"seed": -1}, {"seed": None})}
    assert len(random) == 3
    assert all(0 <= seed < 1 << 63 for seed in random)
    assert derive(7, 0) == 7


def test_output_options_and_the_place_in_the_queue_pass_through(tokenizer: Tokenizer) -> None:
    output = Output(logprobs=3, prompt_logprobs=0, skip_special_tokens=False, stream=True)
    one = prepare(
        [5, 6],
        SamplingParams(),
        output,
        INFO,
        tokenizer,
        request_id="name",
        priority=-3,
        cache_salt="salt",
    )
    assert (one.logprobs, one.prompt_logprobs, one.skip_special_tokens) == (3, 0, False)
    assert (one.stream, one.priority, one.cache_salt, one.request_id) == (True, -3, "salt", "name")
    assert one.prompt_ids == (5, 6)
    assert one.arrival_s <= prepared(tokenizer).arrival_s


# -- bad words


def ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def test_bad_words_become_tokens(tokenizer: Tokenizer) -> None:
    # "the" is two tokens and never one with a space, so its spaced form is of other length.
    one = prepared(tokenizer, info=replace(INFO, vocab_size=128), bad_words=["x", "the"])
    assert one.bad_word_ids == (ids(tokenizer, "x"), ids(tokenizer, "the"))


class Spaced:
    """Words are one token each, and another one behind a space."""

    special: dict[int, str] = {}  # noqa: RUF012

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        words = {
            "in": 10,
            " in": 20,
            "the": 11,
            " the": 21,
            "end": 12,
            " end": 22,
            "</s>": 2,
            " </s>": 23,
        }
        parts = text.split(" ")
        pieces = parts[:1] + [" " + part for part in parts[1:]]
        return [words[piece] for piece in pieces if piece]

    def encode_all(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def least_tokens(self, _text: str) -> int:
        return 0


@pytest.mark.parametrize(
    ("word", "tokens"),
    [
        ("in", ((10,), (20,))),
        (" in", ((20,),)),
        ("in the end", ((10, 21, 22), (20, 21, 22))),
    ],
)
def test_bad_words_are_banned_with_and_without_a_space(
    word: str, tokens: tuple[tuple[int, ...], ...]
) -> None:
    one = prepared(Spaced(), bad_words=[word])  # type: ignore[arg-type]
    assert one.bad_word_ids == tokens


@pytest.mark.parametrize(
    "params",
    [
        {"bad_words": ["in", "</s>"]},
        {"bad_words": ["the", "in"], "stop_token_ids": [10]},
    ],
)
def test_a_bad_word_that_ends_the_text_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        prepared(Spaced(), **params)  # type: ignore[arg-type]
    assert raised.value.param == "bad_words[1]"
    assert "ignore_eos" in str(raised.value)


def test_words_that_no_output_can_hold_are_left_out(tokenizer: Tokenizer) -> None:
    """Longer than the output, or of tokens that the model has no row for."""
    words = ["ab", "abc", "x" * 1000, "the"]  # "th" is token 102
    one = prepared(tokenizer, bad_words=words, max_tokens=2)
    assert one.bad_word_ids == (ids(tokenizer, "ab"),)


def test_bad_words_are_so_many_tokens_together_at_most(tokenizer: Tokenizer) -> None:
    info = replace(INFO, context_len=5000, num_blocks=5000)
    length = MAX_BAD_WORD_TOKENS // 10
    assert len(ids(tokenizer, "x" * length)) == length
    prepared(tokenizer, info=info, bad_words=["x" * length] * 10)
    with pytest.raises(InvalidRequest) as raised:
        prepared(tokenizer, info=info, bad_words=["x" * length] * 11)
    assert raised.value.param == "bad_words"
    assert f"at most {MAX_BAD_WORD_TOKENS} tokens together, got {11 * length}" in str(raised.value)


# -- texts whose tokens the model has no rows for


NO_ROW = "the"  # of tokens 102 and 39, where the model has 100


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"pause_token": "th", "num_pause_tokens": 2}, "pause_token"),
        ({"entropix": {"clarify_token": "th"}}, "entropix.clarify_token"),
        ({"sed": {"eval_prompt": NO_ROW}}, "sed.eval_prompt"),
        ({"sed": {"eval_prompt": "x", "verdict_tokens": ["th", "n"]}}, "sed.verdict_tokens"),
        ({"guidance_scale": 2.0, "negative_prompt": NO_ROW}, "negative_prompt"),
        ({"kl_bandwidth": 1.0, "kl_reference_prompt": NO_ROW}, "kl_reference_prompt"),
    ],
)
def test_a_text_of_tokens_without_rows_is_refused_where_it_is(
    tokenizer: Tokenizer, params: dict[str, Any], param: str
) -> None:
    info = replace(INFO, context_len=4096, num_blocks=4096)
    with pytest.raises(InvalidRequest) as raised:
        prepared(tokenizer, info=info, **params)
    assert (raised.value.param, raised.value.code) == (param, "invalid_token_id")


def test_what_the_model_can_never_say_is_left_out(tokenizer: Tokenizer) -> None:
    tiny = replace(INFO, vocab_size=2)  # "</s>" is token 2
    one = prepare(
        [1], SamplingParams(stop=["<s>", "</s>"], dry_multiplier=1.0), Output(), tiny, tokenizer,
        request_id="r",
    )  # fmt: skip
    assert one.stop_tokens == {1: "<s>"}
    assert one.stop_strings == ("<s>", "</s>")  # as text it may come all the same
    assert one.dry_breaker_ids == ()


# -- texts that cannot fit


class Bytes(Spaced):
    """A token for each character; nothing may be encoded that is longer than the context."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:  # noqa: ARG002
        assert len(text) <= INFO.context_len
        return [ord(character) % 100 for character in text]

    def least_tokens(self, text: str) -> int:
        return len(text)


@pytest.mark.parametrize(
    "params",
    [
        {"pause_token": "LONG", "num_pause_tokens": 1},
        {"entropix": {"clarify_token": "LONG"}},
        {"sed": {"eval_prompt": "LONG"}},
        {"sed": {"eval_prompt": "x", "verdict_tokens": ["LONG", "n"]}},
        {"guidance_scale": 2.0, "negative_prompt": "LONG"},
        {"kl_bandwidth": 1.0, "kl_reference_prompt": "LONG"},
    ],
    ids=lambda params: next(iter(params)),
)
def test_a_text_longer_than_the_context_is_not_even_encoded(params: dict[str, Any]) -> None:
    given = json.loads(json.dumps(params).replace("LONG", "x" * 100))
    with pytest.raises(InvalidRequest) as raised:
        prepared(Bytes(), **given)  # type: ignore[arg-type]
    assert raised.value.code == "context_length_exceeded"
    assert "maximum context length is 64" in str(raised.value)
    assert "100 characters" in str(raised.value)
