"""Every sampling and stopping parameter, declared once.

The HTTP schema, its validation and error messages, the OpenAPI document and
`docs/parameters.md` all follow from the fields of `SamplingParams`.
"""

import time
from collections import Counter
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

GREEDY_TEMPERATURE = 1e-5  # below this a row takes the argmax
MAX_CHOICES = 128
MAX_STOPS = 64
MAX_STOP_LEN = 1024  # characters
MAX_LAYERS = 1024  # that a list may name; a model has fewer
MAX_WAITING_TOKENS = 8_388_608  # of all hypotheses that wait in a search
LOGIT_BIAS_LIMIT = 100.0

PATTERN_PATIENCE_S = 0.01  # of processor time: a pattern is compiled where streams wait for it

INT64 = 1 << 63


def max_waiting(max_tokens: int) -> int:
    """The most hypotheses that may wait in a best-first search of so many tokens."""
    return MAX_WAITING_TOKENS // max(max_tokens, 1)


def _integral(value: object) -> object:
    """JSON has one number type: 16.0 is the integer 16, 16.5 is not one and stays as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _fits(value: int) -> int:
    if not -INT64 <= value < INT64:
        raise PydanticCustomError("invalid_value", "Input should be a number of 64 bits")
    return value


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _pair(value: object) -> object:
    """A list of two, which strict pydantic does not take for a tuple."""
    if value is None or (isinstance(value, list | tuple) and len(value) == 2):
        return None if value is None else tuple(value)
    raise PydanticCustomError("invalid_type", "Input should be a list of two numbers")


def _bias_by_token_id(value: object) -> object:
    if not isinstance(value, dict):
        return value
    biases: dict[object, object] = {}
    for key, bias in value.items():
        token_id = _decimal(key)
        if token_id is None:
            raise PydanticCustomError(
                "invalid_token_id",
                "logit_bias must have token ids as keys, got {key}",
                {"key": repr(key)[:40], "param": "logit_bias"},
            )
        biases[token_id] = bias
    return biases


def _decimal(key: object) -> int | None:
    """The number a key names, if it is written as JSON writes numbers: `int` also takes "1_0"."""
    try:
        number = int(str(key))
    except ValueError:
        return None
    return number if str(number) == str(key) else None


def _clamped(biases: dict[int, float]) -> dict[int, float]:
    limit = LOGIT_BIAS_LIMIT
    return {token_id: min(max(bias, -limit), limit) for token_id, bias in biases.items()}


def _all_integral(values: object) -> object:
    """The same for a list, which may be long: most hold nothing but integers."""
    if not isinstance(values, list) or float not in set(map(type, values)):
        return values
    return list(map(_integral, values))


def _distinct(layers: list[int]) -> list[int]:
    twice = next((layer for layer, count in Counter(layers).items() if count > 1), None)
    if twice is not None:
        raise PydanticCustomError(
            "invalid_value", "Input should name no layer twice, but {layer} is", {"layer": twice}
        )
    return layers


Integer = Annotated[int, BeforeValidator(_integral), AfterValidator(_fits)]
TokenIds = Annotated[list[int], Field(fail_fast=True), BeforeValidator(_all_integral)]
Layers = Annotated[list[Integer], Field(max_length=MAX_LAYERS), AfterValidator(_distinct)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Warmth = Annotated[Number, Field(gt=0.0, le=2.0)]
NonEmptyStr = Annotated[str, StringConstraints(min_length=1)]
StopStr = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LEN)]
BreakerStr = Annotated[str, StringConstraints(min_length=1, max_length=40)]


# Choices between types are made here, so that an error names the client's field and no branch of
# pydantic's.


def _token_or_text(value: object) -> object:
    value = _integral(value)
    if isinstance(value, bool) or not isinstance(value, int | str | None):
        raise PydanticCustomError("invalid_type", "Input should be a token id or a string")
    if value == "":
        raise PydanticCustomError("invalid_value", "Input should not be empty")
    return value


def _text_or_ids(value: object) -> object:
    if value == "":
        raise PydanticCustomError("invalid_value", "Input should not be empty")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return value
    raise PydanticCustomError("invalid_type", "Input should be a string or a list of token ids")


def _layers(value: object) -> object:
    if value is None or (isinstance(value, str) and value in ("low", "high")):
        return value
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("invalid_type", "Input should be low, high or a list of layers")
    layers = [_integral(layer) for layer in value]
    for index, layer in enumerate(layers):
        if type(layer) is not int:
            param = f"dola_layers[{index}]"
            raise PydanticCustomError("invalid_type", f"{param} must be a layer", {"param": param})
    return layers


def _never_or_bool(value: object) -> object:
    if isinstance(value, bool) or value == "never":
        return value
    raise PydanticCustomError("invalid_type", 'Input should be true, false or "never"')


TokenOrText = Annotated[int | str, BeforeValidator(_token_or_text)]


class StrictModel(BaseModel):
    """Base of everything read from a client: exact types, `null` the same as absent."""

    model_config = ConfigDict(strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class EntropixParams(StrictModel):
    """Numbers of entropix; a threshold that is left out is the profile's."""

    model_config = ConfigDict(extra="forbid")

    profile: Literal["2024-10-07", "head"] = Field(
        default="2024-10-07",
        description="That day's sampler, with attention; or the later one, in nats and without.",
    )
    clarify_token: TokenOrText | None = Field(
        default=None, description="Token id or text that is put in where the model is lost."
    )
    temperature: Number = Field(default=0.666, gt=0.0, le=2.0, description="Base temperature.")
    top_p: Number = Field(default=0.90, gt=0.0, le=1.0, description="Base top-p.")
    top_k: Integer = Field(default=27, ge=1, le=100, description="Base top-k.")
    min_p: Number = Field(default=0.03, ge=0.0, le=1.0, description="Base min-p.")
    low_ent: Number | None = Field(default=None, ge=0.0, description="Entropy threshold.")
    med_ent: Number | None = Field(default=None, ge=0.0, description="Entropy threshold.")
    high_ent: Number | None = Field(default=None, ge=0.0, description="Entropy threshold.")
    low_vent: Number | None = Field(default=None, ge=0.0, description="Varentropy threshold.")
    high_vent: Number | None = Field(default=None, ge=0.0, description="Varentropy threshold.")


class SedParams(StrictModel):
    """Numbers of self-evaluation decoding."""

    model_config = ConfigDict(extra="forbid")

    detector: Literal["ratio", "entropy", "either"] = Field(
        default="ratio", description="What makes a point chaotic."
    )
    delta_r: Number = Field(
        default=0.8, ge=0.0, le=1.0, description="The second probability over the first."
    )
    delta_e: Number | None = Field(default=None, gt=0.0, description="Entropy in nats.")
    k: Integer = Field(default=2, ge=2, le=8, description="Candidates that are tried.")
    alpha: Number = Field(
        default=0.5, ge=0.0, le=1.0, description="Weight of the evaluation against the probability."
    )
    rollout_tokens: Integer = Field(default=128, ge=1, le=4096, description="Most tokens of a try.")
    eval_prompt: NonEmptyStr = Field(
        default="\nIs this answer correct? Answer True or False:",
        description="Text behind a try, after which the verdict is read.",
    )
    verdict_tokens: tuple[NonEmptyStr, NonEmptyStr] = Field(
        default=(" True", " False"),
        strict=False,
        description="The two verdicts; the first token of each counts.",
    )
    max_points: Integer = Field(default=8, ge=1, le=64, description="Most chaotic points.")

    @model_validator(mode="after")
    def _detector_has_a_limit(self) -> Self:
        if self.detector == "entropy" and self.delta_e is None:
            raise clash("sed.delta_e is needed by the detector entropy", "sed.delta_e", self)
        return self


class Method(StrEnum):
    """Who decides which sequences a request has."""

    SAMPLING = "sampling"
    BEAM = "use_beam_search"
    CONTRASTIVE = "penalty_alpha"
    COT = "cot_branches"
    SED = "sed"


TextOrIds = Annotated[NonEmptyStr | list[int], BeforeValidator(_text_or_ids)]


class SamplingParams(StrictModel):
    """How the tokens of one request are chosen and when it stops.

    Every default is neutral: it leaves the model's distribution as it is.
    """

    # -- length and stopping
    max_tokens: Integer | None = Field(
        default=None,
        ge=0,
        description="Most tokens to generate for each choice. On /v1/completions the default is "
        "16, and 0 scores the prompt without generating; on /v1/chat/completions the default is "
        "what is left of the context.",
        examples=[128],
    )
    min_tokens: Integer = Field(
        default=0,
        ge=0,
        description="Until this many tokens are out, end-of-sequence and stop tokens are masked "
        "and stop strings do not match.",
        examples=[8],
    )
    stop: Annotated[
        list[StopStr],
        BeforeValidator(
            _one_or_many,
            json_schema_input_type=StopStr | Annotated[list[StopStr], Field(max_length=MAX_STOPS)],
        ),
    ] = Field(
        default=[],
        max_length=MAX_STOPS,
        description="Up to 64 strings of up to 1024 characters that end the text. The one that is "
        "complete first wins. An "
        "entry equal to a special token's text also acts as that token.",
        examples=[["\n\n", "User:"]],
    )
    stop_token_ids: TokenIds = Field(
        default=[],
        description="Token ids that end the sequence. The token counts in `usage`, not in the "
        "text.",
        examples=[[2]],
    )
    include_stop_str_in_output: bool = Field(
        default=False, description="Keep the stop string at the end of the text."
    )
    ignore_eos: bool = Field(
        default=False, description="Go on after an end-of-sequence token; it stays in the output."
    )

    # -- copies and seeds
    n: Integer = Field(
        default=1,
        ge=1,
        le=MAX_CHOICES,
        description="How many choices to return for each prompt. They share its memory and its "
        "prefill.",
    )
    best_of: Integer | None = Field(
        default=None,
        ge=1,
        le=MAX_CHOICES,
        description="Sample this many sequences and return the `n` with the highest mean raw "
        "logprob, best first. Default: `n`. Not with `stream`.",
        examples=[4],
    )
    seed: Integer | None = Field(
        default=None,
        ge=-INT64,
        lt=INT64,
        description="The same seed and request give the same tokens, whatever else is in the "
        "batch. Choice 0 draws from the seed itself, choice i from a seed derived from (seed, i). "
        "-1 or null: a random one.",
        examples=[7],
    )

    # -- biases and penalties, in the order in which they act
    logit_bias: Annotated[
        dict[int, Number], BeforeValidator(_bias_by_token_id), AfterValidator(_clamped)
    ] = Field(
        default={},
        description="Token id → number added to its logit. Values beyond ±100 count as ±100.",
        examples=[{"50": -100}],
    )
    repetition_penalty: Number = Field(
        default=1.0,
        gt=0.0,
        description="Divide the positive and multiply the negative logits of tokens already seen "
        "by this (Keskar et al., 2019, arXiv:1909.05858).",
        examples=[1.1],
    )
    frequency_penalty: Number = Field(
        default=0.0,
        ge=-2.0,
        le=2.0,
        description="Subtract this from a token's logit for each time it was generated.",
    )
    presence_penalty: Number = Field(
        default=0.0,
        ge=-2.0,
        le=2.0,
        description="Subtract this from a token's logit if it was generated at all.",
    )
    penalty_last_n: Integer = Field(
        default=-1,
        ge=-1,
        description="The three penalties see only this many of the latest tokens: -1 all, 0 none "
        "(Zhu et al., 2023, arXiv:2310.14971).",
        examples=[64],
    )
    penalty_prompt: bool = Field(
        default=True, description="The repetition penalty also sees the prompt."
    )

    dry_multiplier: Number = Field(
        default=0.0,
        ge=0.0,
        description="DRY: a token that would extend a repetition of m tokens loses "
        "multiplier · base^(m - allowed length) (Weidmann et al., 2026, arXiv:2608.22761). 0: off.",
        examples=[0.8],
    )
    dry_base: Number = Field(default=1.75, ge=1.0, description="DRY: see `dry_multiplier`.")
    dry_allowed_length: Integer = Field(
        default=2, ge=1, description="DRY: shorter repetitions cost nothing."
    )
    dry_penalty_last_n: Integer = Field(
        default=-1,
        ge=-1,
        description="DRY sees only this many of the latest tokens: -1 all, 0 none.",
    )
    dry_sequence_breakers: list[BreakerStr] = Field(
        default=["\n", ":", '"', "*"],
        max_length=256,
        description="DRY: strings that no repetition crosses, and that are not penalised.",
        examples=[["\n"]],
    )
    eos_length_penalty: Number = Field(
        default=0.0,
        ge=0.0,
        description="Subtract this · max(0, 1 - t / `eos_length_window`) from end-of-sequence and "
        "stop tokens after t output tokens, against early ends (after Zhu et al., 2023, "
        "arXiv:2310.14971).",
        examples=[4.0],
    )
    eos_length_window: Integer = Field(default=100, ge=1, description="See `eos_length_penalty`.")
    exponential_decay_length_penalty: Annotated[
        tuple[Integer, Number] | None, BeforeValidator(_pair)
    ] = Field(
        default=None,
        description="[start, factor], as in transformers: after `start` output tokens, raise "
        "end-of-sequence tokens by |z| · (factor^(t - start) - 1).",
        examples=[[20, 1.05]],
    )

    # -- bans
    allowed_token_ids: TokenIds | None = Field(
        default=None,
        min_length=1,
        description="Only these tokens can be generated. End-of-sequence too must be listed to be "
        "possible.",
        examples=[[15, 16, 17]],
    )
    bad_words: list[NonEmptyStr] = Field(
        default=[],
        max_length=1024,
        description="Words that cannot be generated, with or without a leading space; of a word "
        "of several tokens only the last is banned, after the others. At most 32768 tokens "
        "together.",
        examples=[["foo"]],
    )
    no_repeat_ngram_size: Integer = Field(
        default=0,
        ge=0,
        description="No run of this many tokens occurs twice in prompt and output (Paulus et al., "
        "2017, arXiv:1705.04304). 0: off.",
        examples=[3],
    )

    # -- temperature and truncation
    temperature: Number = Field(
        default=1.0,
        ge=0.0,
        le=2.0,
        description="Divide the logits by this before drawing. Below 0.00001: take the likeliest "
        "token (the lowest id of equals), and leave out the filters below.",
        examples=[0.7],
    )
    dynatemp_range: Number = Field(
        default=0.0,
        ge=0.0,
        description="Let the temperature move this far up and down with the entropy's part of its "
        "maximum (llama.cpp). 0: off.",
        examples=[0.5],
    )
    dynatemp_exponent: Number = Field(
        default=1.0, gt=0.0, description="Raise that part to this power first."
    )
    edt_theta: Number | None = Field(
        default=None,
        gt=0.0,
        description="Multiply the temperature by `edt_base`^(this / entropy): colder where the "
        "model is sure (Zhang et al., 2024, arXiv:2403.14541).",
        examples=[0.1],
    )
    edt_base: Number = Field(default=0.8, gt=0.0, lt=1.0, description="See `edt_theta`.")
    adapt_temperature: Annotated[tuple[Warmth, Warmth] | None, BeforeValidator(_pair)] = Field(
        default=None,
        description="[hot, cold]: temperatures for the first token of an indented line, and for "
        "all others (Zhu et al., 2023, arXiv:2309.02772). Instead of `temperature`.",
        examples=[[0.8, 0.6]],
    )
    sampler_order: Literal["vllm", "hf", "llama.cpp"] = Field(
        default="vllm",
        description="The order of temperature and filters: that of vLLM, of transformers, or of "
        "llama.cpp, whose temperature comes last.",
    )
    top_n_sigma: Number = Field(
        default=-1.0,
        description="Keep tokens whose logit is within this many standard deviations of the "
        "largest (Tang et al., 2024, arXiv:2411.07641). 0 or less: off.",
        examples=[1.0],
    )
    min_p: Number = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Drop tokens less than this fraction as likely as the likeliest "
        "(Nguyen et al., 2024, arXiv:2407.01082).",
        examples=[0.05],
    )
    top_k: Integer = Field(
        default=0,
        ge=-1,
        description="Keep exactly this many of the likeliest tokens (Fan et al., 2018, "
        "arXiv:1805.04833). 0 or -1: all.",
        examples=[50],
    )
    typical_p: Number = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Keep the tokens of about average surprise that together have this "
        "probability (Meister et al., 2022, arXiv:2202.00666).",
        examples=[0.95],
    )
    tfs: Number = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Tail-free sampling: cut where the sorted curve of probabilities has done this "
        "part of its bending (Phénix and Egan, 2019). 1: off.",
        examples=[0.95],
    )
    top_a: Number = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Drop tokens less likely than this times the square of the best one's "
        "probability (text-generation-webui). 0: off.",
        examples=[0.2],
    )
    top_h: Number | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="Keep likely tokens while they hold no more than this part of the entropy of "
        "the 100 likeliest (Baghaei Potraghloo et al., 2025, arXiv:2509.02510).",
        examples=[0.4],
    )
    top_p: Number = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Keep the fewest likeliest tokens that together have this probability "
        "(Holtzman et al., 2019, arXiv:1904.09751). 0 keeps only the best one.",
        examples=[0.9],
    )
    top_p_rule: Literal["strict", "inclusive"] = Field(
        default="strict",
        description="Where a prefix has exactly the probability `top_p`: `strict` stops there, "
        "`inclusive` keeps one token more.",
    )
    epsilon_cutoff: Number = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Drop tokens less likely than this (Hewitt et al., 2022, arXiv:2210.15191).",
        examples=[0.0003],
    )
    eta_cutoff: Number = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Drop tokens less likely than the smaller of this and its square root times "
        "exp(-entropy) (Hewitt et al., 2022, arXiv:2210.15191).",
        examples=[0.0006],
    )

    mirostat: Integer = Field(
        default=0,
        ge=0,
        le=2,
        description="Mirostat 1 or 2: hold the surprise of the output near a target, instead of "
        "the filters above (Basu et al., 2020, arXiv:2007.14966). 0: off.",
        examples=[2],
    )
    mirostat_tau: Number = Field(
        default=5.0, gt=0.0, description="Mirostat: the target, in bits per token."
    )
    mirostat_eta: Number = Field(
        default=0.1, gt=0.0, description="Mirostat: how fast the limit follows."
    )
    xtc_probability: Number = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="XTC: how often all tokens above the threshold but the least likely of them "
        "are dropped, so that the obvious is not always chosen (text-generation-webui). 0: never.",
        examples=[0.5],
    )
    xtc_threshold: Number = Field(
        default=0.1, ge=0.0, le=1.0, description="XTC: the threshold; above 0.5 nothing is dropped."
    )

    entropix: EntropixParams | None = Field(
        default=None,
        description="Switch between ways of sampling by entropy and varentropy, instead of "
        "temperature and filters (entropix, 2024). `{}` takes all defaults.",
        examples=[{"profile": "2024-10-07"}],
    )

    # -- beam search
    use_beam_search: bool = Field(
        default=False,
        description="Look for the likeliest sequences, `beam_width` at a time, and return the best "
        "`n`. Temperature and filters have no effect.",
    )
    beam_width: Integer | None = Field(
        default=None,
        ge=1,
        description="How many hypotheses are kept. Default: `best_of`, else `n`. Alias "
        "`num_beams`.",
        examples=[4],
    )
    length_penalty: Number = Field(
        default=1.0,
        description="A hypothesis scores Σ logprob / length^this, so that more favours length.",
    )
    length_penalty_type: Literal["hf", "gnmt", "vllm"] = Field(
        default="hf",
        description="`hf`: output tokens count; `vllm`: prompt tokens too; `gnmt`: ((5 + length) / "
        "6)^penalty (Wu et al., 2016, arXiv:1609.08144).",
    )
    early_stopping: Annotated[
        bool | Literal["never"],
        BeforeValidator(_never_or_bool, json_schema_input_type=bool | Literal["never"]),
    ] = Field(
        default=False,
        description="When to end: true, at `beam_width` finished hypotheses; false, when the best "
        "open one scores no better now; `never`, when it cannot become better.",
    )
    beam_prune: Number | None = Field(
        default=None,
        gt=0.0,
        description="Drop tokens whose score is more than this below the step's best, and finished "
        "hypotheses more than this below the best (GNMT).",
        examples=[3.0],
    )
    coverage_penalty: Number = Field(
        default=0.0,
        ge=0.0,
        description="Add this · Σ ln min(attention received, 1) over the prompt (GNMT).",
        examples=[0.2],
    )
    num_beam_groups: Integer = Field(
        default=1,
        ge=1,
        description="Diverse beam search: groups of beams, each kept off what those before it "
        "chose (Vijayakumar et al., 2016, arXiv:1610.02424).",
        examples=[2],
    )
    diversity_penalty: Number = Field(
        default=0.0,
        ge=0.0,
        description="What a token loses for each beam of an earlier group that chose it.",
        examples=[0.5],
    )
    stochastic_beams: bool = Field(
        default=False,
        description="Draw the hypotheses without replacement instead of taking the likeliest "
        "(Kool et al., 2019, arXiv:1903.06059).",
    )
    beam_strategy: Literal["breadth", "best_first", "astar"] = Field(
        default="breadth",
        description="Which hypothesis is extended next: all of a length; the best; or the best by "
        "what it can still become (Meister et al., 2020, arXiv:2007.03909).",
    )
    beam_memory: Integer = Field(
        default=0,
        ge=0,
        description="Most hypotheses that wait in a best-first search; the shortest are forgotten "
        "first. At most, and with 0, 8,388,608 divided by `max_tokens`.",
    )

    # -- contrast
    penalty_alpha: Number | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Contrastive search: of the `top_k` likeliest tokens, take the one of highest "
        "(1 - α)·p - α·max cosine to the hidden states before (Su et al., 2022, arXiv:2202.06417).",
        examples=[0.6],
    )
    guidance_scale: Number = Field(
        default=1.0,
        description="Classifier-free guidance: away from `negative_prompt` above 1, towards it "
        "below (Sanchez et al., 2023, arXiv:2306.17806).",
        examples=[1.5],
    )
    negative_prompt: TextOrIds | None = Field(
        default=None, description="Text or token ids; default: the last token of the prompt."
    )
    kl_bandwidth: Number = Field(
        default=0.0,
        ge=0.0,
        description="Divide the temperature by 2^(KL / this), KL the divergence from what "
        "`kl_reference_prompt` would say: colder where the difference matters (Chang et al., 2023, "
        "arXiv:2306.01286). 0: off.",
        examples=[1.0],
    )
    kl_reference_prompt: TextOrIds | None = Field(
        default=None, description="The prompt without its source; needed by `kl_bandwidth`."
    )
    cd_amateur: NonEmptyStr | None = Field(
        default=None,
        description="Contrastive decoding against this model, which the server must have loaded "
        "(Li et al., 2022, arXiv:2210.15097).",
    )
    cd_alpha: Number = Field(
        default=0.1,
        gt=0.0,
        le=1.0,
        description="Only tokens this fraction as likely as the likeliest are considered.",
    )
    cd_beta: Number | None = Field(
        default=None,
        ge=0.0,
        description="Use (1 + β)·z - β·z' (O'Brien and Lewis, 2023, arXiv:2309.09117). Default: "
        "ln p - ln p'.",
        examples=[0.5],
    )
    cd_temperature: Number = Field(
        default=1.0, gt=0.0, description="The amateur's temperature in ln p - ln p'."
    )
    dola_layers: Annotated[
        Literal["low", "high"] | Layers | None,
        BeforeValidator(_layers, json_schema_input_type=Literal["low", "high"] | Layers | None),
    ] = Field(
        default=None,
        description="DoLa: contrast the last layer with the one of these that differs most (Chuang "
        "et al., 2023, arXiv:2309.03883).",
        examples=["high"],
    )
    dola_relative_top: Number = Field(
        default=0.1,
        gt=0.0,
        le=1.0,
        description="DoLa: only tokens this fraction as likely as the likeliest are considered.",
    )
    dola_mode: Literal["paper", "hf"] = Field(
        default="paper",
        description="DoLa: measure the difference as in the paper, or as transformers' code does.",
    )
    dola_norm: bool = Field(
        default=False, description="DoLa: read earlier layers through the final norm."
    )

    # -- answers that are looked at
    cot_branches: Integer | None = Field(
        default=None,
        ge=2,
        le=32,
        description="CoT-decoding: go on from each of this many first tokens, and return the `n` "
        "answers the model is surest of (Wang and Zhou, 2024, arXiv:2402.10200).",
        examples=[5],
    )
    cot_branch_position: Integer = Field(
        default=0, ge=0, description="CoT-decoding: branch after this many tokens."
    )
    cot_aggregate: Literal["max", "sum"] = Field(
        default="sum",
        description="CoT-decoding: the surest branch first, or the answer whose branches are "
        "surest together.",
    )
    cot_pattern: NonEmptyStr | None = Field(
        default=None,
        max_length=1000,
        description="CoT-decoding: a regular expression whose last match is the answer; default: "
        "the last number. A request whose pattern takes long is refused, or ends with an error.",
        examples=["\\\\b(yes|no)\\\\b"],
    )
    sed: SedParams | None = Field(
        default=None,
        description="Self-evaluation decoding: at uncertain points, try candidates to the end and "
        "let the model judge them (Luo et al., 2024, arXiv:2405.16552). `{}` takes all defaults.",
        examples=[{"k": 2}],
    )

    # -- thinking without words
    pause_token: TokenOrText | None = Field(
        default=None, description="The token of `num_pause_tokens`."
    )
    num_pause_tokens: Integer = Field(
        default=0,
        ge=0,
        le=256,
        description="Put this many pause tokens behind the prompt, for models that were trained "
        "with them (Goyal et al., 2023, arXiv:2310.02226).",
    )
    num_latent_thoughts: Integer = Field(
        default=0,
        ge=0,
        le=64,
        description="Let the last hidden state be the next input this many times before "
        "answering, for models trained so (Coconut: Hao et al., 2024, arXiv:2412.06769).",
    )

    @property
    def greedy(self) -> bool:
        """Is the likeliest token taken, with no draw?"""
        searches = self.method in (Method.BEAM, Method.CONTRASTIVE, Method.COT)
        return searches or self.temperature < GREEDY_TEMPERATURE

    @property
    def method(self) -> Method:
        """Who decides which sequences there are."""
        asked = [method for method in Method if method is not Method.SAMPLING and self.asks(method)]
        return asked[0] if asked else Method.SAMPLING

    @property
    def without_effect(self) -> list[str]:
        """Fields that are asked for, but only change what a draw would be, where none is made."""
        if self.method not in (Method.BEAM, Method.CONTRASTIVE, Method.COT):
            return []
        used = {"top_k"} if self.method is Method.CONTRASTIVE else set()
        seeded = self.stochastic_beams
        names = [*DRAWING, *(() if seeded else ("seed",))]
        silent = {"temperature"} if self.temperature == 0.0 else set()
        return [name for name in names if name not in used | silent and self.asks(name)]

    @property
    def width_field(self) -> str:
        """The field that says how many sequences there are."""
        match self.method:
            case Method.BEAM if self.beam_width is not None:
                return "beam_width"
            case Method.CONTRASTIVE:
                return "top_k"
            case Method.COT:
                return "cot_branches"
            case Method.SED:
                return "sed.k"
            case _:
                return "n" if self.best_of is None else "best_of"

    @property
    def beams(self) -> int:
        """How many hypotheses a beam search keeps."""
        return self.beam_width or self.best_of or self.n

    @property
    def best_of_several(self) -> bool:
        """Are more sequences sampled than returned?"""
        return self.method is Method.SAMPLING and self.num_sequences > self.n

    @property
    def has_companion(self) -> bool:
        """Does each sequence need another one beside it?"""
        return self.asks("guidance_scale") or self.asks("kl_bandwidth") or self.asks("cd_amateur")

    @property
    def wants_signals(self) -> bool:
        """Do its filters look at more than its logits?"""
        return self.entropix is not None or self.kl_bandwidth > 0.0

    @property
    def scores_logprobs(self) -> bool:
        """Do penalties act on logprobs, and the result counts as it is, as in transformers?"""
        return self.method is Method.BEAM and self.sampler_order == "hf"

    @property
    def reads_attention(self) -> bool:
        """Does it take attention weights to choose tokens?"""
        return self.entropix is not None and self.entropix.profile == "2024-10-07"

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, by whatever name a client gave it."""
        return self.max_tokens

    @property
    def reads_layers(self) -> bool:
        """Does it look into the model to choose tokens?"""
        return self.reads_attention or self.dola_layers is not None or self.coverage_penalty > 0.0

    @property
    def num_sequences(self) -> int:
        """How many sequences are computed together for each prompt, at the most."""
        match self.method:
            case Method.BEAM:
                return self.beams if self.beam_strategy == "breadth" else 1
            case Method.CONTRASTIVE:
                return self.top_k
            case Method.COT:
                return self.cot_branches or 1
            case Method.SED:
                return max(self.sed.k, 1) if self.sed is not None else 1
            case _:
                return self.best_of or self.n

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise clash("best_of must be at least n ({n}), got {best_of}", "best_of", self)
        if self.limit is not None and self.min_tokens > self.limit:
            raise clash(
                f"min_tokens must be at most max_tokens ({self.limit}), got {self.min_tokens}",
                "min_tokens",
                self,
            )
        for name, others in EXCLUDES.items():
            both = [other for other in others if self.asks(name) and self.asks(other)]
            if both:
                raise PydanticCustomError(
                    "incompatible_parameters",
                    "{name} and {other} cannot be combined",
                    {"name": name, "other": both[0], "param": name},
                )
        for name, other in NEEDS.items():
            if self.asks(name) and not self.asks(other):
                raise clash(f"{name} needs {other}", name, self)
        self._strategy_agrees()
        return self

    def _strategy_agrees(self) -> None:
        """What only one of the methods needs."""
        if self.method is Method.BEAM:
            beams = self.beams
            if beams < self.n:
                raise clash("beam_width must be at least n ({n}), got {beam_width}", "n", self)
            if beams % self.num_beam_groups:
                message = "num_beam_groups must divide the beam width, got {num_beam_groups}"
                raise clash(message, "num_beam_groups", self)
        if self.penalty_alpha is not None and self.top_k < 2:
            raise clash("penalty_alpha needs a top_k of at least 2, got {top_k}", "top_k", self)
        if self.cot_pattern is not None:
            _check_pattern(self.cot_pattern)
        if self.cot_branches is not None and self.n > self.cot_branches:
            raise clash("n must be at most cot_branches ({cot_branches}), got {n}", "n", self)

    def asks(self, name: str) -> bool:
        """Does a field ask for anything? Some values besides the default do not."""
        value = getattr(self, name)
        if name in ("top_k", "top_n_sigma", "min_p"):
            return bool(value > 0)
        if name == "beam_width":
            return value is not None and value > 1
        return bool(value != SamplingParams.model_fields[name].default)


def _check_pattern(pattern: str) -> None:
    """Raise for what is no regular expression, or one that takes too long to compile.

    Some short ones take forever, and all memory: whoever cannot trust them has this done where it
    can be stopped, and the process ended.
    """
    started = time.process_time()
    try:
        regex.compile(pattern)
        if time.process_time() - started <= PATTERN_PATIENCE_S:
            return
        message = f"cot_pattern is too complex: compiling it takes over {PATTERN_PATIENCE_S:g} s"
    except RecursionError:
        message = "cot_pattern is too complex: it is nested too deeply"
    except MemoryError:
        message = "cot_pattern is too complex: compiling it takes too much memory"
    except regex.error as error:
        message = f"cot_pattern is no regular expression: {error}"
    except Exception as error:  # noqa: BLE001 - what else `regex` raises, or who watches over it
        message = f"cot_pattern cannot be compiled: {error}"
    raise PydanticCustomError(
        "invalid_value", "{message}", {"message": message, "param": "cot_pattern"}
    )


TRUNCATION = (
    "top_n_sigma",
    "min_p",
    "top_k",
    "typical_p",
    "tfs",
    "top_a",
    "top_h",
    "top_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "xtc_probability",
)

# What shapes only the draw.
DRAWING = (
    "temperature",
    "dynatemp_range",
    "edt_theta",
    "adapt_temperature",
    *TRUNCATION,
)

# What asks for nothing without another field.
NEEDS = {
    "beam_width": "use_beam_search",
    "length_penalty": "use_beam_search",
    "length_penalty_type": "use_beam_search",
    "early_stopping": "use_beam_search",
    "beam_prune": "use_beam_search",
    "coverage_penalty": "use_beam_search",
    "num_beam_groups": "beam_width",
    "diversity_penalty": "num_beam_groups",
    "stochastic_beams": "use_beam_search",
    "beam_strategy": "use_beam_search",
    "beam_memory": "beam_strategy",
    "kl_bandwidth": "kl_reference_prompt",
    "num_pause_tokens": "pause_token",
}

# What cannot be asked for together: a field, and those it goes without.
EXCLUDES: dict[str, tuple[str, ...]] = {
    "mirostat": TRUNCATION,
    "adapt_temperature": ("temperature", "dynatemp_range", "edt_theta"),
    "edt_theta": ("dynatemp_range",),
    "kl_bandwidth": ("dynatemp_range", "edt_theta", "adapt_temperature", "entropix"),
    "use_beam_search": (
        "mirostat",
        "entropix",
        "kl_bandwidth",
        "penalty_alpha",
        "cot_branches",
        "sed",
    ),
    "penalty_alpha": ("n", "best_of", "cot_branches", "sed", "entropix"),
    "cot_branches": ("best_of", "sed", "mirostat", "entropix"),
    "sed": ("n", "best_of"),
    "guidance_scale": ("kl_bandwidth", "cd_amateur", "dola_layers"),
    "cd_amateur": ("kl_bandwidth", "dola_layers"),
    "stochastic_beams": ("num_beam_groups",),
    "beam_strategy": ("num_beam_groups", "stochastic_beams", "coverage_penalty", "beam_prune"),
    "num_latent_thoughts": ("guidance_scale", "kl_bandwidth", "cd_amateur", "num_pause_tokens"),
    "entropix": (
        *TRUNCATION,
        "mirostat",
        "temperature",
        "dynatemp_range",
        "edt_theta",
        "adapt_temperature",
    ),
}


def combinable(defaults: dict[str, Any], own: SamplingParams) -> dict[str, Any]:
    """Those defaults that can stand beside what somebody asks for himself."""
    asked = {name for name in SamplingParams.model_fields if own.asks(name)}
    excluded: set[str] = set()
    for name, others in EXCLUDES.items():
        if name in asked:
            excluded |= set(others) - asked
        elif asked & set(others):
            excluded.add(name)
    kept = {name: value for name, value in defaults.items() if name not in excluded}
    while gone := [one for one in kept if NEEDS.get(one, one) not in kept.keys() | asked]:
        for name in gone:
            del kept[name]
    return kept


def clash(template: str, param: str, model: BaseModel) -> PydanticCustomError:
    """An error about two fields that cannot both have their values; `param` is the one to blame.

    `template` may name any field of the model in braces.
    """
    message = template.format_map(dict(model)).replace("{", "{{").replace("}", "}}")
    return PydanticCustomError("invalid_value", message, {"param": param})
