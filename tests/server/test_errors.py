"""What a client may get wrong, and exactly what it is told."""

import json
import math
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI

from server.schemas import ChatCompletionRequest, CompletionRequest
from tests.support.engines import info, scripted_core, tiny_core
from tests.support.scripted import ScriptedModel, constant, pseudo_random
from tests.support.servers import asgi_client, make_app
from tests.support.wire import CHAT, COMPLETIONS, post_stream

INT64 = 1 << 63
VOCAB = 128
HELLO = [{"role": "user", "content": "hi"}]
BASE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": [5, 6], "max_tokens": 2},
    CHAT: {"messages": HELLO, "max_tokens": 2},
}


@pytest.fixture(scope="module")
def app(tiny_folder: Path) -> FastAPI:
    """With enough lanes for the largest n."""
    return make_app(lambda: tiny_core(tiny_folder, max_num_seqs=128))


# -- each field


@dataclass(frozen=True)
class Row:
    """A field: what it accepts, and what it refuses as a value or as a type.

    A refused value may stand with the code and the field that are blamed.
    """

    name: str
    good: tuple[Any, ...] = ()
    values: tuple[Any, ...] = ()
    types: tuple[Any, ...] = ()
    says: str = ""  # the bound, in the message about a value
    also: dict[str, Any] = field(default_factory=dict)  # the rest of the body
    paths: tuple[str, ...] = (COMPLETIONS, CHAT)


@dataclass(frozen=True)
class Bad:
    """A value, and an error that is not the usual one."""

    value: Any
    code: str = "invalid_value"
    param: str | None = None


def flag(name: str, *paths: str) -> Row:
    return Row(name, (True, False), (), (1, "true", []), paths=paths or (COMPLETIONS, CHAT))


def above(number: float) -> float:
    return math.nextafter(number, math.inf)


def below(number: float) -> float:
    return math.nextafter(number, -math.inf)


NOT_NUMBERS: tuple[Any, ...] = ("0.5", True, [1], {})
NOT_INTEGERS: tuple[Any, ...] = ("1", True, 1.5, [1], {})
ANYTHING = ("x", 1, [1], {"a": "b"}, True)
DRY: dict[str, Any] = {"dry_multiplier": 1}
BEAMS: dict[str, Any] = {"use_beam_search": True}
GUIDED: dict[str, Any] = {"guidance_scale": 1.5}
REFERENCE: dict[str, Any] = {"kl_reference_prompt": "a"}
DOLA: dict[str, Any] = {"dola_layers": [0]}
COT: dict[str, Any] = {"cot_branches": 2}
PAUSED: dict[str, Any] = {"num_pause_tokens": 2}
DECAY = "exponential_decay_length_penalty"
BAD_IDS = (
    "",
    "x",
    "1.5",
    "128",
    "-1",
    "-0",
    "1_0",
    " 5 ",
    "+5",
    "05",
    "\N{ARABIC-INDIC DIGIT FIVE}",
)

ROWS = [
    # length and stopping
    Row("max_tokens", (0, 1, 16.0), (-1,), NOT_INTEGERS, "at least 0", paths=(COMPLETIONS,)),
    Row(
        "max_tokens",
        (1, 16.0),
        (
            0,
            -1,
        ),
        NOT_INTEGERS,
        "at least 1",
        paths=(CHAT,),
    ),
    Row("max_completion_tokens", (1, 3.0), (0,), NOT_INTEGERS, "at least 1", paths=(CHAT,)),
    Row("min_tokens", (0, 1, 2, 2.0), (-1,), NOT_INTEGERS, "at least 0"),
    Row("min_tokens", (), (3,), (), "at most max_tokens (2)"),
    Row("min_tokens", (16,), (17,), (), "16", also={"max_tokens": None}, paths=(COMPLETIONS,)),
    Row(
        "min_tokens",
        (),
        (4,),
        (),
        "3",
        also={"max_tokens": None, "max_completion_tokens": 3},
        paths=(CHAT,),
    ),
    Row("min_tokens", (3,), (4,), (), "(3)", also={"max_completion_tokens": 3}, paths=(CHAT,)),
    Row("stop", ("a", [], ["a"], ["a"] * 64), (["a"] * 65,), (5, {}, True), "64"),
    Row("stop", (), (Bad(["a", ""], param="stop[1]"),), (Bad([5], param="stop[0]"),)),
    Row("stop_token_ids", ([], [0, VOCAB - 1], [5.0]), (), (5, "5", {})),
    Row("stop_token_ids", (), (Bad([VOCAB], "invalid_token_id"), Bad([-1], "invalid_token_id"))),
    Row("stop_token_ids", (), (), (Bad([1, "5"], param="stop_token_ids[1]"),)),
    flag("include_stop_str_in_output"),
    flag("ignore_eos"),
    # copies and seeds
    Row("n", (1, 2.0, 128), (0, -1, 129), NOT_INTEGERS, "between 1 and 128"),
    Row("best_of", (1, 2.0, 128), (0, 129), NOT_INTEGERS, "between 1 and 128"),
    Row("best_of", (2,), (1,), (), "at least n (2)", also={"n": 2}),
    Row("best_of", (), (Bad(2, "incompatible_parameters"),), also={"stream": True}),
    Row("seed", (-INT64, INT64 - 1, -1, 0), (-INT64 - 1, INT64), NOT_INTEGERS, "64 bits"),
    # biases, penalties and bans
    Row("logit_bias", ({}, {"0": 100, "127": -100}, {"5": 1e9}), (), (5, "x", [1])),
    Row("logit_bias", (), tuple(Bad({k: 1}, "invalid_token_id") for k in BAD_IDS)),
    Row("logit_bias", (), (), (Bad({"5": "1"}, param="logit_bias[5]"),)),
    Row("repetition_penalty", (5e-324, 1, 1e308), (0, -1.0), NOT_NUMBERS, "greater than 0"),
    Row("frequency_penalty", (-2, 2), (below(-2), above(2)), NOT_NUMBERS, "between -2 and 2"),
    Row("presence_penalty", (-2, 2), (below(-2), above(2)), NOT_NUMBERS, "between -2 and 2"),
    Row("penalty_last_n", (-1, 0, INT64 - 1), (-2,), NOT_INTEGERS, "at least -1"),
    flag("penalty_prompt"),
    Row("dry_multiplier", (0, 5e-324, 1e308), (below(0),), NOT_NUMBERS, "at least 0"),
    Row("dry_base", (1, 1e308), (below(1), 0), NOT_NUMBERS, "at least 1", also=DRY),
    Row("dry_allowed_length", (1, 2.0, INT64 - 1), (0,), NOT_INTEGERS, "at least 1", also=DRY),
    Row("dry_penalty_last_n", (-1, 0, INT64 - 1), (-2,), NOT_INTEGERS, "at least -1", also=DRY),
    Row(
        "dry_sequence_breakers",
        ([], ["a"], ["ab"] * 256, ["x" * 40]),
        (["ab"] * 257,),
        (5, "a", {}),
        "256",
        also=DRY,
    ),
    Row(
        "dry_sequence_breakers",
        (),
        tuple(Bad(["a", text], param="dry_sequence_breakers[1]") for text in ("", "x" * 41)),
        (Bad([5], param="dry_sequence_breakers[0]"),),
    ),
    Row("eos_length_penalty", (0, 5e-324, 1e308), (below(0),), NOT_NUMBERS, "at least 0"),
    Row(
        "eos_length_window",
        (1, 2.0, INT64 - 1),
        (0,),
        NOT_INTEGERS,
        "at least 1",
        also={"eos_length_penalty": 1},
    ),
    Row(
        DECAY,
        ([0, 1], [-INT64, -1e308], [INT64 - 1, 1e308], [5.0, 2]),
        tuple(Bad([number, 1], param=f"{DECAY}[0]") for number in (-INT64 - 1, INT64)),
        (5, "x", {}, [], [1], [1, 2, 3]),
    ),
    Row(
        DECAY,
        types=(
            *(Bad([number, 1], param=f"{DECAY}[0]") for number in ("1", 1.5, True, [1])),
            *(Bad([1, number], param=f"{DECAY}[1]") for number in NOT_NUMBERS),
        ),
    ),
    Row("allowed_token_ids", ([5], [0, VOCAB - 1]), ([],), (5, "5", {}), "1 item"),
    Row("allowed_token_ids", (), (Bad([VOCAB], "invalid_token_id"), Bad([-1], "invalid_token_id"))),
    Row("allowed_token_ids", (), (), (Bad(["5"], param="allowed_token_ids[0]"),)),
    Row("bad_words", ([], ["a"], ["ab"] * 1024), (["ab"] * 1025,), (5, "a", {}), "1024"),
    Row("bad_words", (), (Bad([""], param="bad_words[0]"), Bad(["</s>"], param="bad_words[0]"))),
    Row("no_repeat_ngram_size", (0, 1, INT64 - 1), (-1,), NOT_INTEGERS, "at least 0"),
    # temperature and truncation
    Row("temperature", (0, 5e-324, 2), (below(0), above(2)), NOT_NUMBERS, "between 0 and 2"),
    Row("dynatemp_range", (0, 5e-324, 1e308), (below(0),), NOT_NUMBERS, "at least 0"),
    Row(
        "dynatemp_exponent",
        (5e-324, 1e308),
        (0, -1.0),
        NOT_NUMBERS,
        "greater than 0",
        also={"dynatemp_range": 1},
    ),
    Row("edt_theta", (5e-324, 1e308), (0, -1.0), NOT_NUMBERS, "greater than 0"),
    Row(
        "edt_base",
        (5e-324, below(1)),
        (0, 1),
        NOT_NUMBERS,
        "greater than 0 and less than 1",
        also={"edt_theta": 1},
    ),
    Row(
        "adapt_temperature",
        ([0.8, 0.6], [5e-324, 2], [2, 5e-324]),
        (
            *(Bad([number, 1], param="adapt_temperature[0]") for number in (0, above(2))),
            *(Bad([1, number], param="adapt_temperature[1]") for number in (0, above(2))),
        ),
        (5, "x", {}, [], [1], [1, 1, 1], Bad([1, "1"], param="adapt_temperature[1]")),
    ),
    Row("sampler_order", ("vllm", "hf", "llama.cpp"), ("", "HF"), (5, True), "'llama.cpp'"),
    Row("top_n_sigma", (-1e308, 0, 1e308), (), NOT_NUMBERS),
    Row("min_p", (0, 5e-324, 1), (below(0), above(1)), NOT_NUMBERS, "between 0 and 1"),
    Row("top_k", (-1, 0, 1, INT64 - 1), (-2,), NOT_INTEGERS, "at least -1"),
    Row("typical_p", (5e-324, 1), (0, above(1)), NOT_NUMBERS, "greater than 0 and at most 1"),
    Row("tfs", (0, 5e-324, 1), (below(0), above(1)), NOT_NUMBERS, "between 0 and 1"),
    Row("top_a", (0, 5e-324, 1), (below(0), above(1)), NOT_NUMBERS, "between 0 and 1"),
    Row("top_h", (5e-324, 1), (0, above(1)), NOT_NUMBERS, "greater than 0 and at most 1"),
    Row("top_p", (0, 5e-324, 1), (below(0), above(1)), NOT_NUMBERS, "between 0 and 1"),
    Row("top_p_rule", ("strict", "inclusive"), ("loose", ""), (5, True), "'strict'"),
    Row("epsilon_cutoff", (0, below(1)), (below(0), 1), NOT_NUMBERS, "less than 1"),
    Row("eta_cutoff", (0, below(1)), (below(0), 1), NOT_NUMBERS, "less than 1"),
    Row("mirostat", (0, 1, 2.0), (-1, 3), NOT_INTEGERS, "between 0 and 2"),
    *(
        Row(name, (5e-324, 1e308), (0, -1.0), NOT_NUMBERS, "greater than 0", also={"mirostat": 2})
        for name in ("mirostat_tau", "mirostat_eta")
    ),
    Row("xtc_probability", (0, 5e-324, 1), (below(0), above(1)), NOT_NUMBERS, "between 0 and 1"),
    Row(
        "xtc_threshold",
        (0, 5e-324, 1),
        (below(0), above(1)),
        NOT_NUMBERS,
        "between 0 and 1",
        also={"xtc_probability": 1},
    ),
    *(
        Row(name, (), (Bad(value, "incompatible_parameters"),), says=other, also={other: given})
        for name, value, other, given in (
            ("mirostat", 1, "top_p", 0.9),
            ("adapt_temperature", [0.8, 0.6], "temperature", 0.5),
            ("edt_theta", 0.1, "dynatemp_range", 0.5),
        )
    ),
    Row(
        "entropix",
        ({}, {"profile": "head"}, {"clarify_token": 5}, {"clarify_token": "a"}),
        (
            *(Bad({"top_k": number}, param="entropix.top_k") for number in (0, 101)),
            Bad({"profile": "tail"}, param="entropix.profile"),
            Bad({"unheard": 1}, param="entropix.unheard"),
            Bad({"clarify_token": VOCAB}, "invalid_token_id", "entropix.clarify_token"),
        ),
        (5, "x", [], True, Bad({"top_k": "1"}, param="entropix.top_k")),
    ),
    Row(
        "trace",
        (True, False, {}, {"top": 1}, {"top": 100, "layers": [0, 2]}),
        (
            *(Bad({"top": number}, param="trace.top") for number in (0, 101)),
            *(Bad({"layers": [number]}, param="trace.layers") for number in (-1, 3)),
            Bad({"unheard": 1}, param="trace.unheard"),
        ),
        (5, "x", [], Bad({"layers": ["x"]}, param="trace.layers[0]")),
    ),
    # which sequences there are
    flag("use_beam_search"),
    Row("beam_width", (1, 2.0, 8), (0, -1), NOT_INTEGERS, "at least 1", also=BEAMS),
    Row("beam_width", (1,), (2,), says="use_beam_search"),
    Row("beam_width", (), (65,), says="at most 64", also=BEAMS),
    Row("beam_width", (2,), (Bad(1, param="n"),), also=BEAMS | {"n": 2}),
    Row("length_penalty", (-1e3, 0, 1e3), (), NOT_NUMBERS, also=BEAMS),
    Row("length_penalty_type", ("hf", "gnmt", "vllm"), ("", "HF"), (5, True), "'hf'", also=BEAMS),
    Row("early_stopping", (True, False, "never"), (), ("always", 1, []), "never", also=BEAMS),
    Row("beam_prune", (5e-324, 1e308), (0, -1.0), NOT_NUMBERS, "greater than 0", also=BEAMS),
    Row("coverage_penalty", (0, 1e308), (below(0),), NOT_NUMBERS, "at least 0", also=BEAMS),
    Row("num_beam_groups", (1, 2.0, 4), (0, 3), NOT_INTEGERS, also=BEAMS | {"beam_width": 4}),
    Row(
        "diversity_penalty",
        (0, 1e308),
        (below(0),),
        NOT_NUMBERS,
        "at least 0",
        also=BEAMS | {"beam_width": 4, "num_beam_groups": 2},
    ),
    Row("stochastic_beams", (True, False), (), (1, "true", []), also=BEAMS),
    Row(
        "beam_strategy",
        ("breadth", "best_first", "astar"),
        ("", "best"),
        (5, True),
        "'astar'",
        also=BEAMS,
    ),
    Row(
        "beam_memory",
        (0, 1, 2.0),
        (-1,),
        NOT_INTEGERS,
        "at least 0",
        also=BEAMS | {"beam_strategy": "best_first"},
    ),
    Row("penalty_alpha", (0, 0.6, 1), (below(0), above(1)), NOT_NUMBERS, also={"top_k": 3}),
    Row("penalty_alpha", (), (Bad(0.6, param="top_k"),), says="at least 2", also={"top_k": 1}),
    Row("guidance_scale", (-1e308, 0, 1, 1e308), (), NOT_NUMBERS),
    Row("negative_prompt", ("a", [5, 6]), (), (5, [], ["a"], True, {}), also=GUIDED),
    Row("negative_prompt", (), (Bad([VOCAB], "invalid_token_id"),), also=GUIDED),
    Row("kl_bandwidth", (0, 5e-324, 1e308), (below(0),), NOT_NUMBERS, also=REFERENCE),
    Row("kl_bandwidth", (), (1,), says="kl_reference_prompt"),
    Row("kl_reference_prompt", ("a", [5]), (), (5, [], ["a"], True)),
    Row("cd_amateur", (), ("small", ""), (5, True, [])),
    Row("cd_alpha", (5e-324, 1), (0, above(1)), NOT_NUMBERS, "greater than 0 and at most 1"),
    Row("cd_beta", (0, 1e308), (below(0),), NOT_NUMBERS, "at least 0"),
    Row("cd_temperature", (5e-324, 1e308), (0, -1.0), NOT_NUMBERS, "greater than 0"),
    Row("dola_layers", ("low", "high", [0], [0, 1]), ([2], [-1]), (5, "middle", True, {})),
    Row("dola_layers", (), (), (Bad([0, "1"], param="dola_layers[1]"),)),
    Row("dola_relative_top", (5e-324, 1), (0, above(1)), NOT_NUMBERS, also=DOLA),
    Row("dola_mode", ("paper", "hf"), ("", "HF"), (5, True), "'paper'", also=DOLA),
    Row("dola_norm", (True, False), (), (1, "true", []), also=DOLA),
    Row("cot_branches", (2, 3.0, 32), (1, 33), NOT_INTEGERS, "between 2 and 32"),
    Row("cot_branches", (2,), (), also={"n": 2}),
    Row("cot_branch_position", (0, 1, 2.0), (-1,), NOT_INTEGERS, "at least 0", also=COT),
    Row("cot_aggregate", ("max", "sum"), ("", "mean"), (5, True), "'max'", also=COT),
    Row("cot_pattern", ("a|b", "[0-9]+"), ("", "(", "x" * 1001), (5, True), also=COT),
    Row(
        "sed",
        ({}, {"k": 3, "detector": "either", "delta_e": 1}, {"verdict_tokens": ["a", "b"]}),
        (
            *(Bad({"k": number}, param="sed.k") for number in (1, 9)),
            *(Bad({"delta_r": number}, param="sed.delta_r") for number in (below(0), above(1))),
            *(Bad({"alpha": number}, param="sed.alpha") for number in (below(0), above(1))),
            Bad({"detector": "entropy"}, param="sed.delta_e"),
            Bad({"detector": "x"}, param="sed.detector"),
            Bad({"verdict_tokens": ["a", "ab"]}, param="sed.verdict_tokens"),
            Bad({"unheard": 1}, param="sed.unheard"),
        ),
        (5, "x", [], True, Bad({"k": "2"}, param="sed.k")),
    ),
    Row("pause_token", (5, "a", 0), ("",), (True, [])),
    Row("pause_token", (), (Bad(VOCAB, "invalid_token_id"), "ab"), also=PAUSED),
    Row("num_pause_tokens", (1, 2.0, 8), (-1, 257), NOT_INTEGERS, also={"pause_token": 5}),
    Row("num_pause_tokens", (0,), (1,), says="pause_token"),
    Row("num_latent_thoughts", (0, 1, 2.0, 8), (-1, 65), NOT_INTEGERS, "between 0 and 64"),
    *(
        Row(name, (), (Bad(value, "incompatible_parameters"),), says=other, also=given)
        for name, value, other, given in (
            ("use_beam_search", True, "mirostat", {"mirostat": 2}),
            ("penalty_alpha", 0.6, "n", {"n": 2, "top_k": 3}),
            ("cot_branches", 3, "sed", {"sed": {}}),
            ("sed", {}, "n", {"n": 2}),
            ("guidance_scale", 1.5, "dola_layers", {"dola_layers": "low"}),
            ("num_latent_thoughts", 2, "guidance_scale", {"guidance_scale": 1.5}),
        )
    ),
    # the request as a whole
    Row("request_id", ("a", "A.b_c:d-9", "a" * 128), ("", "a" * 129, "a b", "ä"), (5, True)),
    Row("priority", (-INT64, 0, INT64 - 1), (-INT64 - 1, INT64), NOT_INTEGERS, "64 bits"),
    Row("cache_salt", ("", "a" * 128), ("a" * 129,), (5, True), "128"),
    flag("stream"),
    Row("stream_options", ({}, {"include_usage": True}), (), (5, "x"), also={"stream": True}),
    Row("stream_options", (), ({}, {"include_usage": True}), says="stream"),
    Row(
        "stream_options",
        (),
        (Bad({"continuous_usage_stats": True}, param="stream_options.continuous_usage_stats"),),
        (Bad({"include_usage": 1}, param="stream_options.include_usage"),),
        also={"stream": True},
    ),
    flag("skip_special_tokens"),
    flag("spaces_between_special_tokens"),
    Row("truncate_prompt_tokens", (-1, 1, 2.0, INT64 - 1), (0, -2), NOT_INTEGERS, "-1"),
    Row("truncation_side", ("left", "right"), ("up",), (5, True), "'left'"),
    Row("prompt_logprobs", (0, 20, 1.0), (-1,), NOT_INTEGERS, "at least 0"),
    Row("prompt_logprobs", (), (21,), says="between 0 and 20"),
    Row("prompt_logprobs", (), (Bad(1, "incompatible_parameters"),), also={"stream": True}),
    flag("return_token_ids"),
    flag("return_tokens_as_token_ids"),
    *(
        Row(name, ANYTHING)
        for name in (
            "user",
            "safety_identifier",
            "metadata",
            "store",
            "service_tier",
            "prompt_cache_key",
            "verbosity",
            "prediction",
        )
    ),
    Row("model", ("tiny",), (), (5, True, ["tiny"])),
    # only /v1/completions
    Row(
        "prompt",
        ("a", [5], [5.0, 6], ["a", "b"], [[5], [6, 7]]),
        ("", []),
        (5, True, {}),
        paths=(COMPLETIONS,),
    ),
    Row(
        "prompt",
        (),
        (Bad([5, VOCAB], "invalid_token_id"), Bad([[5], [-1]], "invalid_token_id", "prompt[1]")),
        (
            Bad([[]], param="prompt[0]"),
            Bad(["a", 5], param="prompt[1]"),
            Bad([5, "a"], param="prompt[1]"),
            Bad([5, True], param="prompt[1]"),
            Bad([5, 1.5], param="prompt[1]"),
            Bad([[5], 5], param="prompt[1]"),
            Bad([[5], [5, "a"]], param="prompt[1]"),
        ),
        paths=(COMPLETIONS,),
    ),
    flag("echo", COMPLETIONS),
    Row("logprobs", (0, 20, 1.0), (21, -1), NOT_INTEGERS, "0 and 20", paths=(COMPLETIONS,)),
    flag("add_special_tokens"),
    Row("suffix", ("",), (Bad("x", "unsupported_parameter"),), (5, True), paths=(COMPLETIONS,)),
    # only /v1/chat/completions
    Row("messages", (HELLO,), ([],), (5, "x", {}), "1 item", paths=(CHAT,)),
    flag("logprobs", CHAT),
    Row(
        "top_logprobs",
        (0, 20, 1.0),
        (-1, 21),
        NOT_INTEGERS,
        also={"logprobs": True},
        paths=(CHAT,),
    ),
    Row("top_logprobs", (0,), (1,), says="logprobs", paths=(CHAT,)),
    flag("add_generation_prompt", CHAT),
    Row("continue_final_message", (True, False), (), (1, "true"), paths=(CHAT,)),
    Row(
        "continue_final_message",
        (False,),
        (Bad(True, "incompatible_parameters"),),
        also={"add_generation_prompt": True},
        paths=(CHAT,),
    ),
    Row("chat_template", (), (Bad("x", "unsupported_parameter"),), (5, True), paths=(CHAT,)),
    Row("chat_template_kwargs", ({}, {"a": 1}), (), (5, "x", []), paths=(CHAT,)),
    Row(
        "chat_template_kwargs",
        (),
        (Bad({"tokenize": True}, param="chat_template_kwargs.tokenize"),),
        paths=(CHAT,),
    ),
    Row("documents", ([], [{"title": "a"}]), (), (5, "x", {}), paths=(CHAT,)),
    Row("documents", (), (), (Bad([5], param="documents[0]"),), paths=(CHAT,)),
    Row("tools", ([],), (Bad([{}], "unsupported_parameter"),), (5, "x", {}), paths=(CHAT,)),
    Row("tool_choice", ("none",), (Bad("auto", "unsupported_parameter"),), paths=(CHAT,)),
    Row("parallel_tool_calls", (True, False), (), (1, "true"), paths=(CHAT,)),
]


def _as_bad(value: Any) -> Bad:
    return value if isinstance(value, Bad) else Bad(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:40]}…{len(text)}"


ACCEPTED = [
    (path, row, value)
    for row in ROWS
    for path in row.paths
    for value in (
        *row.good,
        *([None] if row.good and row.name not in ("prompt", "messages") else []),
    )
]
VALUES = [(p, row, _as_bad(value)) for row in ROWS for p in row.paths for value in row.values]
TYPES = [(p, row) for row in ROWS for p in row.paths if row.types]


def names(cases: list[tuple[str, Row, Any]]) -> list[str]:
    return [
        f"{p.split('/')[2]}-{row.name}-{_shown(getattr(value, 'value', value))}"
        for p, row, value in cases
    ]


def test_every_field_is_in_the_table() -> None:
    for path, model in ((COMPLETIONS, CompletionRequest), (CHAT, ChatCompletionRequest)):
        listed = {row.name for row in ROWS if path in row.paths}
        assert listed == model.model_fields.keys()


@pytest.mark.parametrize(("path", "row", "value"), ACCEPTED, ids=names(ACCEPTED))
def test_values_up_to_the_bounds_and_null_are_accepted(
    client: httpx.Client, path: str, row: Row, value: Any
) -> None:
    response = client.post(path, json=BASE[path] | row.also | {row.name: value})

    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("path", "row", "bad"), VALUES, ids=names(VALUES))
def test_a_value_outside_the_range_is_named_with_its_bound(
    client: httpx.Client, path: str, row: Row, bad: Bad
) -> None:
    response = client.post(path, json=BASE[path] | row.also | {row.name: bad.value})

    error = refusal(response, 400)
    assert (error["param"], error["code"]) == (bad.param or row.name, bad.code)
    assert (bad.param or row.name).rpartition(".")[2] in error["message"]
    assert row.says in error["message"]
    if isinstance(bad.value, int | float) and bad.code == "invalid_value" and row.says:
        assert f"got {json.dumps(bad.value)}" in error["message"] or "needs" in error["message"]


@pytest.mark.parametrize(("path", "row"), TYPES, ids=[f"{p}-{row.name}" for p, row in TYPES])
def test_a_wrong_type_is_named(client: httpx.Client, path: str, row: Row) -> None:
    for bad in map(_as_bad, row.types):
        response = client.post(path, json=BASE[path] | row.also | {row.name: bad.value})

        error = refusal(response, 400)
        assert (error["param"], error["code"]) == (bad.param or row.name, "invalid_type"), bad
        assert row.name in error["message"]


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "repetition_penalty", "top_n_sigma", "eta_cutoff"]
)
@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_too_large_for_a_float_is_refused(
    client: httpx.Client, name: str, number: str
) -> None:
    error = refusal(post_text(client, f'{{"prompt": [5], "{name}": {number}}}'), 400)

    assert (error["param"], error["code"]) == (name, "invalid_value")


INTEGERS = sorted({(path, row.name) for row in ROWS for path in row.paths if 1.5 in row.types})


@pytest.mark.parametrize(("path", "name"), INTEGERS)
def test_an_integer_beyond_64_bits_is_refused(client: httpx.Client, path: str, name: str) -> None:
    for number in (INT64, -INT64 - 1, 10**4200, 1e300):
        error = refusal(client.post(path, json=BASE[path] | {name: number}), 400)

        assert (error["param"], error["code"]) == (name, "invalid_value")
        assert len(error["message"]) < 300


def test_the_engine_survived_all_of_this(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok", "reason": None}


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, in the one form that errors have."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["type"] == ("server_error" if status == 500 else "invalid_request_error")
    assert "Traceback" not in error["message"]
    assert response.headers["x-request-id"]
    return error


def post_text(client: httpx.Client, text: str | bytes, **headers: str) -> httpx.Response:
    all_headers = {"Content-Type": "application/json"} | headers
    return client.post(COMPLETIONS, content=text, headers=all_headers)


# -- several problems, and what messages must not hold


def test_a_message_lists_at_most_ten_problems(client: httpx.Client) -> None:
    wrong = [name for name in SAMPLING_NUMBERS if name != "seed"]
    body = {"prompt": [5]} | dict.fromkeys(wrong, "x")

    message = refusal(client.post(COMPLETIONS, json=body), 400)["message"]

    assert len(wrong) > 10
    assert message.count("; ") == 10
    assert message.endswith(f"and {len(wrong) - 10} more")


SAMPLING_NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_n_sigma",
)


def test_a_long_value_is_cut_off(client: httpx.Client) -> None:
    error = refusal(client.post(COMPLETIONS, json={"prompt": [5], "temperature": "x" * 9999}), 400)

    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": ["a secret", 5]}),
        (COMPLETIONS, {"prompt": {"a secret": 5}}),
        (COMPLETIONS, {"prompt": "a secret" * 99}),
        (CHAT, {"messages": "a secret"}),
        (CHAT, {"messages": [{"role": "a secret", "content": "a secret"}]}),
        (CHAT, {"messages": [{"role": "user", "content": {"text": "a secret"}}]}),
        (CHAT, {"messages": [{"role": "user", "content": ["a secret"]}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "a", "text": "a secret"}]}]}),
    ],
)
def test_a_prompt_is_never_repeated_in_an_error(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    assert "secret" not in refusal(client.post(path, json=body), 400)["message"]


# -- the body as a whole


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "EOF while parsing a value"),
        ("{", "EOF while parsing an object"),
        ('{"prompt": "a",}', "trailing comma"),
        ("{'prompt': 'a'}", "key must be a string at line 1 column 2"),
        ('{"prompt": "a", "temperature": NaN}', "expected value at line 1 column 32"),
        ('{"prompt": "a", "temperature": Infinity}', "expected value"),
        ('{"prompt": "a", "temperature": -Infinity}', "number"),
        ('{"prompt": "a", "prompt": "b"}', 'duplicate key "prompt"'),
        ('{"prompt": "a", "metadata": {"x": 1, "x": 1}}', 'duplicate key "x"'),
        ('{"prompt": "a"} {}', "trailing characters"),
        ('{"prompt": "a"}x', "trailing characters"),
        ("[]", "object"),
        ('"prompt"', "object"),
        ("null", "object"),
        (b"\xff", "expected value"),
        (b'{"prompt": "\xff"}', "invalid unicode"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "expected value at line 1 column 1"),
        ('{"prompt": "\\ud83d"}', "hex escape"),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_what_is_not_a_json_object_is_refused(
    client: httpx.Client, text: str | bytes, says: str
) -> None:
    error = refusal(post_text(client, text), 400)

    assert (error["param"], error["code"]) == (None, "invalid_json")
    assert says in error["message"]


@pytest.mark.parametrize("depth", [10, 300, 900, 990])
def test_a_deeply_nested_value_is_no_problem_of_the_server(
    client: httpx.Client, depth: int
) -> None:
    for name in ("temperature", "metadata", "unheard_of", "logit_bias"):
        nested = "[" * depth + "]" * depth
        response = post_text(client, f'{{"prompt": [5], "max_tokens": 1, "{name}": {nested}}}')
        assert response.status_code in (200, 400)


@pytest.mark.parametrize(
    "media_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/vnd.api+json", "json", ""],
)
def test_another_media_type_is_refused(client: httpx.Client, media_type: str) -> None:
    error = refusal(post_text(client, '{"prompt": "a"}', **{"Content-Type": media_type}), 415)

    assert (error["param"], error["code"]) == (None, "unsupported_media_type")


def test_a_media_type_may_have_parameters(client: httpx.Client) -> None:
    header = {"Content-Type": "Application/JSON; charset=utf-8"}

    assert post_text(client, '{"prompt": "a"}', **header).status_code == 200


def test_a_missing_field_is_named(client: httpx.Client) -> None:
    for path, name in ((COMPLETIONS, "prompt"), (CHAT, "messages"), ("/detokenize", "tokens")):
        error = refusal(client.post(path, json={}), 400)
        assert (error["param"], error["code"]) == (name, "missing_required_parameter")


# -- models, addresses and methods


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/v1/detokenize"])
def test_an_unknown_model_is_not_found(client: httpx.Client, path: str) -> None:
    error = refusal(client.post(path, json={"model": "Tiny"}), 404)

    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "'Tiny'" in error["message"]


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/completions/", "/v1/embeddings", "/health/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_address_is_not_found(client: httpx.Client, method: str, path: str) -> None:
    error = refusal(client.request(method, path), 404)

    assert (error["param"], error["code"]) == (None, "unknown_url")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", COMPLETIONS, {"POST"}),
        ("PUT", CHAT, {"POST"}),
        ("OPTIONS", CHAT, {"POST"}),
        ("DELETE", "/health", {"GET", "HEAD"}),
        ("POST", "/v1/models", {"GET"}),
        ("GET", "/tokenize", {"POST"}),
    ],
)
def test_a_wrong_method_is_told_the_right_one(
    client: httpx.Client, method: str, path: str, allowed: set[str]
) -> None:
    response = client.request(method, path)

    error = refusal(response, 405)
    assert (error["param"], error["code"]) == (None, "method_not_allowed")
    assert set(response.headers["allow"].split(", ")) == allowed


# -- size

LIMIT = 10_000


@pytest.fixture
async def small(tiny_folder: Path) -> Any:
    """A server that takes only small bodies and asks for a key."""
    app = make_app(lambda: tiny_core(tiny_folder), max_body_bytes=LIMIT, api_key="k")
    async with asgi_client(app) as client:
        client.headers["Authorization"] = "Bearer k"
        yield client


@pytest.mark.anyio
async def test_a_body_may_have_the_largest_size_and_not_a_byte_more(
    small: httpx.AsyncClient,
) -> None:
    start = '{"prompt": [5], "max_tokens": 1, "user": "'
    for extra in (0, 1):
        text = start + "x" * (LIMIT - len(start) - 2 + extra) + '"}'
        headers = {"Content-Type": "application/json"}
        response = await small.post(COMPLETIONS, content=text, headers=headers)
        assert len(text) == LIMIT + extra
        assert response.status_code == (413 if extra else 200)


@pytest.mark.anyio
async def test_a_body_without_a_length_is_refused_while_it_is_read(
    small: httpx.AsyncClient,
) -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while True:
            sent += 1000
            assert sent < 10 * LIMIT, "the server reads on"
            yield b" " * 1000

    response = await small.post(COMPLETIONS, content=endless())

    error = refusal(response, 413)
    assert (error["param"], error["code"]) == (None, "request_too_large")
    assert str(LIMIT) in error["message"]
    assert response.headers["connection"] == "close"


def test_a_body_announced_as_too_large_is_refused_before_it_is_sent(url: str) -> None:
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 999999999\r\n\r\n"
        )
        answer = b""
        while data := connection.recv(65536):  # ends, as the server closes
            answer += data

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "request_too_large"


# -- the order of checks


@pytest.mark.anyio
async def test_checks_are_made_in_a_fixed_order(small: httpx.AsyncClient) -> None:
    """Each request has the problem of its row and of all rows below it that are possible."""
    wrong_type = '{"prompt": [5], "model": "tiny", "top_p": "x", "temperature": 3, "n": 2,'
    wrong_type += '"best_of": 1, "max_tokens": 999}'
    steps: list[tuple[int, str | None, str | None, str, str, str, str]] = [
        # status, code, param, path, key, media type, body
        (401, "invalid_api_key", None, "/nowhere", "no", "a/b", " " * 20_000),
        (404, "unknown_url", None, "/nowhere", "k", "a/b", " " * 20_000),
        (413, "request_too_large", None, COMPLETIONS, "k", "a/b", " " * 20_000),
        (415, "unsupported_media_type", None, COMPLETIONS, "k", "a/b", "{"),
        (400, "invalid_json", None, COMPLETIONS, "k", "application/json", '{"model": "x"'),
        (404, "model_not_found", "model", COMPLETIONS, "k", "application/json",
         wrong_type.replace("tiny", "other")),
        (400, "invalid_type", "top_p", COMPLETIONS, "k", "application/json", wrong_type),
        (400, "invalid_value", "temperature", COMPLETIONS, "k", "application/json",
         wrong_type.replace('"x"', "1")),
        (400, "invalid_value", "best_of", COMPLETIONS, "k", "application/json",
         wrong_type.replace('"x"', "1").replace("3", "1")),
        (400, "context_length_exceeded", "prompt", COMPLETIONS, "k", "application/json",
         wrong_type.replace('"x"', "1").replace("3", "1").replace('"best_of": 1', '"best_of": 2')),
    ]  # fmt: skip
    for status, code, param, path, key, media_type, body in steps:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": media_type}
        error = refusal(await small.post(path, content=body, headers=headers), status)
        assert (error["code"], error["param"]) == (code, param)


# -- length

SENTENCE = (
    "This model's maximum context length is 256 tokens. However, you requested {total} tokens "
    "({prompt} in the prompt, {completion} in the completion). Please reduce the length of the "
    "prompt or the completion."
)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "completion"),
    [(250, 7, 7), (257, 0, 0), (256, 1, 1), (256, None, 16), (300, None, 16), (1, 256, 256)],
)
def test_a_prompt_that_is_too_long_is_told_the_numbers(
    client: httpx.Client, prompt: int, max_tokens: int | None, completion: int
) -> None:
    body = {"prompt": [5] * prompt, "max_tokens": max_tokens}

    error = refusal(client.post(COMPLETIONS, json=body), 400)

    numbers = {"total": prompt + completion, "prompt": prompt, "completion": completion}
    assert error["message"] == SENTENCE.format(**numbers)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


def test_the_prompt_to_blame_is_named(client: httpx.Client) -> None:
    several = refusal(client.post(COMPLETIONS, json={"prompt": [[5], [5] * 300]}), 400)
    messages = [{"role": "user", "content": "a" * 300}]
    chat = refusal(client.post(CHAT, json={"messages": messages}), 400)

    assert (several["param"], several["code"]) == ("prompt[1]", "context_length_exceeded")
    assert (chat["param"], chat["code"]) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "generated"), [(256, 0, 0), (255, 1, 1), (250, 6, 6), (250, None, 6)]
)
def test_what_just_fits_is_served(
    client: httpx.Client, prompt: int, max_tokens: int | None, generated: int
) -> None:
    body = {"prompt": [5] * prompt, "max_tokens": max_tokens, "ignore_eos": True}

    answer = client.post(COMPLETIONS, json=body).json()

    assert answer["usage"]["completion_tokens"] == generated


@pytest.mark.anyio
async def test_clamping_can_be_asked_for(tiny_folder: Path) -> None:
    app = make_app(lambda: tiny_core(tiny_folder), clamp_max_tokens=True)
    async with asgi_client(app) as client:
        body = {"prompt": [5] * 250, "max_tokens": 100, "ignore_eos": True}
        answer = (await client.post(COMPLETIONS, json=body)).json()
        too_long = await client.post(COMPLETIONS, json=body | {"prompt": [5] * 256})

    assert answer["usage"]["completion_tokens"] == 6
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.anyio
async def test_a_request_may_hold_only_so_many_prompts(tiny_folder: Path) -> None:
    async with asgi_client(make_app(lambda: tiny_core(tiny_folder), max_prompts=3)) as client:
        body = {"prompt": ["a"] * 3, "max_tokens": 1}
        accepted = await client.post(COMPLETIONS, json=body)
        refused = await client.post(COMPLETIONS, json=body | {"prompt": ["a"] * 4})

    assert accepted.status_code == 200
    error = refusal(refused, 400)
    assert (error["param"], error["code"]) == ("prompt", "invalid_value")
    assert "3" in error["message"]
    assert "4" in error["message"]


def test_more_copies_than_can_run_together_are_refused(client: httpx.Client) -> None:
    body = {"prompt": [5] * 10, "max_tokens": 240, "n": 100}

    error = refusal(client.post(COMPLETIONS, json=body), 400)

    assert (error["param"], error["code"]) == ("n", "invalid_value")
    assert "100 x 240 tokens behind a prompt of 10" in error["message"]


# -- faults that are not the client's


@pytest.mark.anyio
async def test_a_bug_is_an_internal_error_and_says_nothing_of_itself(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(lambda: tiny_core(tiny_folder))
    async with asgi_client(app) as client:
        with monkeypatch.context() as patch:
            patch.setattr(app.state.server.engine, "generate", lambda _requests: 1 / 0)
            response = await client.post(COMPLETIONS, json={"prompt": "a"})
        after = await client.post(COMPLETIONS, json={"prompt": "a"})

    error = refusal(response, 500)
    assert (error["param"], error["code"]) == (None, "internal_error")
    assert "division" not in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert "ZeroDivisionError" in caplog.text
    assert after.status_code == 200


@pytest.mark.anyio
async def test_one_failed_request_does_not_touch_the_others(tokenizer: Any) -> None:
    def script(token: int, position: int) -> Any:
        broken = constant([float("nan")] * VOCAB)
        return broken(token, position) if token == 99 else pseudo_random(token, position)

    core = scripted_core(ScriptedModel(script), tokenizer)
    body = {"max_tokens": 20, "temperature": 0, "logit_bias": {"99": -100}, "ignore_eos": True}
    async with asgi_client(make_app(lambda: (core, info(core)))) as client:
        alone = await client.post(COMPLETIONS, json=body | {"prompt": [5]})
        # Two prompts of one request: the answer is whole or an error, never in part.
        failed = await client.post(COMPLETIONS, json=body | {"prompt": [[5], [7, 99]]})
        after = await client.post(COMPLETIONS, json=body | {"prompt": [5]})

    error = refusal(failed, 500)
    assert error["code"] == "internal_error"
    assert failed.headers["x-should-retry"] == "false"
    assert after.json()["choices"] == alone.json()["choices"]


def test_running_requests_do_not_notice_bad_ones(client: httpx.Client) -> None:
    body = {"prompt": "the hen", "max_tokens": 100, "seed": 1, "ignore_eos": True}
    undisturbed = client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]

    def disturbances() -> Iterator[httpx.Response]:
        for path, row, one in cycle(VALUES):
            yield client.post(path, json=BASE[path] | row.also | {row.name: one.value})

    refused = disturbances()
    pieces: list[str] = []
    with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
                assert next(refused).status_code == 400

    assert "".join(pieces) == undisturbed
    assert post_stream(client, COMPLETIONS, body)


# -- fields nobody knows


def test_unknown_fields_are_reported_in_a_header(client: httpx.Client) -> None:
    extra = {"foo": 1, "döner": [2], "a, b": None, "do_sample": False}
    for path in (COMPLETIONS, CHAT):
        response = client.post(path, json=BASE[path] | extra)
        assert response.status_code == 200
        assert response.headers["x-ignored-fields"] == "do_sample, d%C3%B6ner, foo"
        stream = client.post(path, json=BASE[path] | extra | {"stream": True})
        assert stream.headers["x-ignored-fields"] == "do_sample, d%C3%B6ner, foo"
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        response = client.post(path, json=body | {"foo": 1})
        assert response.headers["x-ignored-fields"] == "foo"


def test_unknown_fields_within_others_are_reported_too(client: httpx.Client) -> None:
    nested = {
        "stream": True,
        "stream_options": {"include_usage": True, "foo": 1},
        "response_format": {"type": "text", "schema": {}, "name": None},
    }
    for path in (COMPLETIONS, CHAT):
        response = client.post(path, json=BASE[path] | nested)
        assert response.status_code == 200
        assert response.headers["x-ignored-fields"] == "response_format.schema, stream_options.foo"


def test_known_fields_are_not_reported(client: httpx.Client) -> None:
    assert "x-ignored-fields" not in client.post(COMPLETIONS, json=BASE[COMPLETIONS]).headers


@pytest.mark.anyio
async def test_a_strict_server_refuses_unknown_fields(tiny_folder: Path) -> None:
    async with asgi_client(make_app(lambda: tiny_core(tiny_folder), strict_params=True)) as client:
        for path in (COMPLETIONS, CHAT):
            error = refusal(await client.post(path, json=BASE[path] | {"foo": 1}), 400)
            assert (error["param"], error["code"]) == ("foo", "unknown_parameter")
            nested = {"stream": True, "stream_options": {"foo": 1}}
            error = refusal(await client.post(path, json=BASE[path] | nested), 400)
            assert (error["param"], error["code"]) == ("stream_options.foo", "unknown_parameter")
            null = await client.post(path, json=BASE[path] | {"foo": None, "beam_width": 1})
            assert null.status_code == 200
