"""What requests may hold and what answers look like.

Requests inherit `SamplingParams`, so a sampling parameter is declared once, in the engine.
"""

from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic asks for these below 3.12
    Self,
)

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from engine.messages import TraceWish
from engine.params import Integer, Layers, SamplingParams, StrictModel, TokenIds, clash

RequestId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
MAX_LOGPROBS = 20

# Other servers' names for the same thing.
ALIASES = {
    "repeat_penalty": "repetition_penalty",
    "no_stop_trim": "include_stop_str_in_output",
    "truncate": "truncate_prompt_tokens",
    "num_beams": "beam_width",
}

# Fields that are known, would change the output, and cannot be honoured yet: refused by name.
# The values listed with a field are those that ask for nothing; further keys of an object are
# unknown fields.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "custom_logit_processor": (),
    "ebnf": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "logprob_token_ids": (),
    "lora_path": (),
    "n_keep": (0,),
    "prompt_embeds": (),
    "regex": (),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "return_hidden_states": (False,),
    "samplers": (),
    "stop_regex": (),
    "structured_outputs": (),
    "t_max_predict_ms": (),
    "thinking_token_budget": (),
    "watermark": (False,),
}


class StreamOptions(StrictModel):
    """What a stream carries besides its text. Unknown fields are kept apart."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool = Field(default=False, description="Send a last chunk with the usage.")
    continuous_usage_stats: bool = Field(
        default=False, description="Send each choice's running usage with every chunk."
    )
    include_obfuscation: bool = Field(default=False, description="Accepted, without effect.")

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.continuous_usage_stats and not self.include_usage:
            raise clash(
                "continuous_usage_stats needs include_usage",
                "stream_options.continuous_usage_stats",
                self,
            )
        return self


class TraceOptions(StrictModel):
    """How much of a trace is wanted."""

    model_config = ConfigDict(extra="forbid")

    top: Integer = Field(default=10, ge=1, le=100, description="Tokens in each list.")
    layers: Layers = Field(
        default=[],
        description="Also what these layers alone would say next; 0 is the embedding.",
    )

    @property
    def wish(self) -> TraceWish:
        return TraceWish(self.top, tuple(self.layers))


def _trace_options(value: object) -> object:
    """true as all defaults, false as nothing."""
    return {} if value is True else None if value is False else value


Trace = Annotated[
    TraceOptions | None,
    BeforeValidator(_trace_options, json_schema_input_type=bool | TraceOptions | None),
]


class GenerationRequest(SamplingParams):
    """What both generating routes have in common. Unknown fields are kept apart."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(
        default=None,
        description="Name of the served model; may be left out where there is only one.",
    )
    request_id: RequestId | None = Field(
        default=None,
        description="A label for the request, part of the answer's id. The header X-Request-Id "
        "goes before it.",
    )
    priority: Integer = Field(default=0, description="Requests of lower priority go first.")
    cache_salt: str = Field(
        default="",
        max_length=128,
        description="Only requests of equal salt reuse each other's cached prompt beginnings.",
    )
    stream: bool = Field(default=False, description="Send the text as it appears, as events.")
    stream_options: StreamOptions | None = Field(
        default=None, description="Only with `stream`: `include_usage`, `continuous_usage_stats`."
    )
    skip_special_tokens: bool = Field(
        default=True,
        description="Leave special tokens out of the text; ids and logprobs keep them.",
    )
    spaces_between_special_tokens: bool = Field(
        default=True,
        description="Accepted for compatibility: byte-exact decoding never puts spaces between "
        "special tokens.",
    )
    truncate_prompt_tokens: Integer | None = Field(
        default=None,
        ge=-1,
        description="Keep only this many tokens of a longer prompt; -1: the context but one. "
        "Alias `truncate`.",
        examples=[512],
    )
    truncation_side: Literal["left", "right"] = Field(
        default="left", description="`left` keeps the prompt's end, `right` its beginning."
    )
    prompt_logprobs: Integer | None = Field(
        default=None,
        ge=0,
        description="Report each prompt token's logprob and rank, with this many of the "
        "likeliest tokens in its place. Not with `stream`.",
        examples=[1],
    )
    trace: Trace = Field(
        default=None,
        description="Tell, for each token, what every stage of the pipeline did to its "
        'distribution: true, or `{"top": 10, "layers": [..]}`.',
        examples=[True],
    )
    return_token_ids: bool = Field(
        default=False, description="Add `prompt_token_ids` and each choice's `token_ids`."
    )
    return_tokens_as_token_ids: bool = Field(
        default=False, description="Write tokens in logprobs as `token_id:N`."
    )
    # Accepted, without effect on the output.
    user: Any = Field(default=None, description="Accepted, without effect.")
    safety_identifier: Any = Field(default=None, description="Accepted, without effect.")
    metadata: Any = Field(default=None, description="Accepted, without effect.")
    store: Any = Field(default=None, description="Accepted, without effect.")
    service_tier: Any = Field(default=None, description="Accepted, without effect.")
    prompt_cache_key: Any = Field(default=None, description="Accepted, without effect.")
    verbosity: Any = Field(default=None, description="Accepted, without effect.")
    prediction: Any = Field(default=None, description="Accepted, without effect.")

    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.keys() & ALIASES.keys():
            return data
        renamed = dict(data)
        for alias, name in ALIASES.items():
            if alias in renamed:
                value = renamed.pop(alias)
                if value is not None and renamed.get(name) not in (None, value):
                    raise PydanticCustomError(
                        "incompatible_parameters",
                        "{alias} and {name} are the same parameter with two values",
                        {"alias": alias, "name": name, "param": alias},
                    )
                renamed[name] = value if renamed.get(name) is None else renamed[name]
        return renamed

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise clash("stream_options is only allowed with stream", "stream_options", self)
        if self.stream and self.best_of_several:
            raise PydanticCustomError(
                "incompatible_parameters",
                "best_of cannot be streamed: which choices are best is only known at the end",
                {"param": "best_of"},
            )
        if self.stream and self.prompt_logprobs is not None:
            raise PydanticCustomError(
                "incompatible_parameters",
                "prompt_logprobs cannot be combined with stream",
                {"param": "prompt_logprobs"},
            )
        if self.truncate_prompt_tokens == 0:
            raise clash(
                "truncate_prompt_tokens must be at least 1, or -1, got 0",
                "truncate_prompt_tokens",
                self,
            )
        return self

    @property
    def options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


# -- /v1/completions

Prompt = str | list[int]


def _prompts(value: Any) -> Any:
    """The four forms of a prompt as one list of strings or of lists of ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise _prompt_type("a string, a list of strings, or token ids")
    if not value:
        raise PydanticCustomError("invalid_value", "prompt must not be empty", {"param": "prompt"})
    first = value[0]
    if isinstance(first, str):
        return _each(value, lambda item: item if isinstance(item, str) else None, "a string")
    if isinstance(first, list):
        return _each(value, lambda item: _token_ids(item), "a list of token ids")
    return [_each(value, _token_id, "a token id")]


def _each(values: list[Any], convert: Any, expected: str) -> list[Any]:
    converted = [convert(value) for value in values]
    if None in converted:
        raise _prompt_type(expected, converted.index(None))
    return converted


def _token_ids(value: Any) -> list[int] | None:
    if not isinstance(value, list) or not value:
        return None
    ids = [_token_id(item) for item in value]
    return None if None in ids else ids  # type: ignore[return-value]


def _token_id(value: Any) -> int | None:
    if type(value) is int:
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _prompt_type(expected: str, index: int | None = None) -> PydanticCustomError:
    param = "prompt" if index is None else f"prompt[{index}]"
    message = f"{param} must be {expected}"
    return PydanticCustomError("invalid_type", message, {"param": param})


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        list[Prompt],
        BeforeValidator(
            _prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ] = Field(
        default=[""],
        description="Text, token ids, or a list of either. Token ids are taken as they are.",
        examples=["Once upon a time"],
    )
    echo: bool = Field(
        default=False,
        description="Put the prompt before the text; with `logprobs`, its logprobs too.",
    )
    logprobs: Integer | None = Field(
        default=None,
        ge=-1,
        description="Report each token's logprob and those of this many of the likeliest tokens; "
        "at most 20 unless the server allows more.",
        examples=[1],
    )
    add_special_tokens: bool = Field(
        default=True, description="Encode text with the special tokens the tokenizer adds."
    )
    suffix: str = Field(default="", description="Not supported: refused unless empty.")


# -- /v1/chat/completions


class TextPart(StrictModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str = ""

    @field_validator("type")
    @classmethod
    def _only_text(cls, value: str) -> str:
        if value != "text":
            raise PydanticCustomError("unsupported_parameter", "Input should be 'text'")
        return value

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if "text" not in self.model_fields_set:
            raise PydanticCustomError("missing_required_parameter", "text is required")
        return self


def _text_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [TextPart(type="text", text=value)]
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_type", "Input should be a string or a list of parts")
    return value


class ChatMessage(StrictModel):
    """One message of a conversation; other keys are passed on to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Annotated[
        list[TextPart] | None,
        BeforeValidator(_text_parts, json_schema_input_type=str | list[TextPart] | None),
    ] = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        calls = (self.model_extra or {}).get("tool_calls")
        if self.content is None and not (self.role == "assistant" and calls):
            raise PydanticCustomError(
                "missing_required_parameter",
                "content may only be left out of an assistant's message with tool_calls",
                {},
            )
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: `system`, and plain text."""
        content = self.content
        text = None if content is None else "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text, **(self.model_extra or {})}


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(
        min_length=1,
        description="The conversation so far.",
        examples=[[{"role": "user", "content": "Hello!"}]],
    )
    max_tokens: Integer | None = Field(
        default=None,
        ge=1,
        description="Most tokens to generate for each choice; default: the rest of the context.",
    )
    max_completion_tokens: Integer | None = Field(
        default=None, ge=1, description="The newer name of `max_tokens`; goes before it."
    )
    logprobs: bool = Field(default=False, description="Report each token's logprob.")
    top_logprobs: Integer = Field(
        default=0,
        ge=0,
        description="With `logprobs`: how many of the likeliest tokens to list for each token; at "
        "most 20 unless the server allows more.",
    )
    add_special_tokens: bool = Field(
        default=False,
        description="Encode the rendered prompt with the tokenizer's special tokens, which most "
        "templates already write.",
    )
    add_generation_prompt: bool = Field(
        default=True, description="End the prompt where the assistant's answer begins."
    )
    continue_final_message: bool = Field(
        default=False, description="Go on with the last message instead of answering it."
    )
    chat_template: str | None = Field(
        default=None, description="A template to use; only where the server trusts them."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="More variables for the chat template."
    )
    documents: list[dict[str, Any]] | None = Field(
        default=None, description="Documents for templates that can quote them."
    )
    tools: list[Any] = Field(default=[], description="Not supported: refused unless empty.")
    tool_choice: Any = Field(default=None, description="Only `none` is supported.")
    parallel_tool_calls: bool = Field(default=True, description="Accepted: there are no calls.")

    @model_validator(mode="after")
    def _chat_agrees(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise clash("top_logprobs needs logprobs: true", "top_logprobs", self)
        given = self.model_fields_set
        if self.continue_final_message and (
            self.add_generation_prompt and "add_generation_prompt" in given
        ):
            raise PydanticCustomError(
                "incompatible_parameters",
                "continue_final_message and add_generation_prompt cannot both be true",
                {"param": "continue_final_message"},
            )
        return self

    @property
    def limit(self) -> int | None:
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer


# -- the other routes


def _text_or_ids(value: Any) -> Any:
    ids = _token_ids(value) if isinstance(value, list) else None
    if isinstance(value, str) or ids:
        return value if ids is None else ids
    raise PydanticCustomError("invalid_type", "Input should be a string or a list of token ids")


class ExplainRequest(SamplingParams):
    """The body of POST /v1/explain. Unknown fields are kept apart."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(default=None, description="Name of the served model.")
    prompt: Annotated[Prompt, BeforeValidator(_text_or_ids)] = Field(
        description="Text or token ids.", examples=["The capital of France is"]
    )
    continuation: Annotated[Prompt | None, BeforeValidator(_text_or_ids)] = Field(
        default=None,
        description="Text or token ids that count as output, as if they had been drawn.",
        examples=[" Paris"],
    )
    positions: list[Integer] | None = Field(
        default=None,
        min_length=1,
        description="Positions in prompt and continuation whose tokens are explained; the one "
        "behind the end is drawn. Default: those of the continuation, or the one behind the end.",
        examples=[[4, 5]],
    )
    trace: Trace = Field(default=TraceOptions(), description="As in /v1/completions.")
    add_special_tokens: bool = Field(
        default=True, description="Encode the prompt with the special tokens the tokenizer adds."
    )


class TokenizeRequest(StrictModel):
    """The body of POST /tokenize: either a prompt or messages."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(default=None, description="Name of the served model.")
    prompt: str | None = Field(default=None, description="Text to encode.")
    messages: list[ChatMessage] | None = Field(
        default=None, min_length=1, description="Messages to encode through the chat template."
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Add the tokenizer's special tokens; default: to a prompt, not to messages.",
    )
    add_generation_prompt: bool = Field(
        default=True, description="End messages where the assistant's answer begins."
    )
    return_token_strs: bool = Field(default=False, description="Also return the tokens as text.")

    @model_validator(mode="after")
    def _either_or(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise clash("give exactly one of prompt and messages", "prompt", self)
        return self


class DetokenizeRequest(StrictModel):
    """The body of POST /detokenize."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(default=None, description="Name of the served model.")
    tokens: TokenIds = Field(description="Token ids to decode.")


REQUESTS = (
    CompletionRequest,
    ChatCompletionRequest,
    ExplainRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


# -- answers


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptTokensDetails]


class CompletionLogprobs(TypedDict):
    """Parallel arrays over the reported tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TracedToken(TypedDict):
    token_id: int
    token: str
    prob: float


class TracedStage(TypedDict):
    stage: str
    candidates: int
    removed: float


class TracedLayer(TypedDict):
    layer: int
    top: list[TracedToken]


class TokenTraceBody(TypedDict):
    """A token's way through the pipeline; entropy in nats, lists likeliest first."""

    token_id: int
    token: str
    rank: int
    prob_before: float
    prob_after: float
    entropy: float
    varentropy: float
    temperature: float
    uniform: float | None
    stages: list[TracedStage]
    top_before: list[TracedToken]
    top_after: list[TracedToken]
    layers: NotRequired[list[TracedLayer]]


class ExplainedPosition(TypedDict):
    position: int
    forced: bool
    trace: TokenTraceBody


class Explanation(TypedDict):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    token_ids: list[int]
    positions: list[ExplainedPosition]
    usage: Usage


class CotBranch(TypedDict):
    branch: int
    answer: str | None
    confidence: float


class CotReport(CotBranch):
    branches: list[CotBranch]


class SedCandidate(TypedDict):
    token_id: int
    p_gen: float
    p_se: float
    propensity: float
    rollout_token_ids: list[int]


class SedPoint(TypedDict):
    position: int
    ratio: float
    entropy: float
    chosen: int
    candidates: list[SedCandidate]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]
    trace: NotRequired[list[TokenTraceBody]]
    cumulative_logprob: NotRequired[float]
    sequence_score: NotRequired[float]
    num_expansions: NotRequired[int]
    cot: NotRequired[CotReport]
    sed: NotRequired[list[SedPoint]]


class Completion(TypedDict):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(TypedDict, total=False):
    role: str
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: NotRequired[AnswerMessage]
    delta: NotRequired[AnswerMessage]
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int]]
    trace: NotRequired[list[TokenTraceBody]]
    cumulative_logprob: NotRequired[float]
    sequence_score: NotRequired[float]
    num_expansions: NotRequired[int]
    cot: NotRequired[CotReport]
    sed: NotRequired[list[SedPoint]]


class ChatCompletion(TypedDict):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[list[int]] | list[int]]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorDetail
