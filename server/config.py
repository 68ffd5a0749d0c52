"""Settings of the HTTP front end."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from engine.config import Size
from engine.params import NonEmptyStr


def _names(value: object) -> object:
    """ "a,b" as two names, as environment variables and flags give them."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _keys(value: object) -> object:
    """Names that are keys: an empty one is a mistake, and would not be seen in an error."""
    keys = _names(value)
    if isinstance(keys, list):
        keys = [key.strip() if isinstance(key, str) else key for key in keys]
        if "" in keys:
            raise ValueError("a key must not be empty; without the option, none is needed")
    return keys


Names = Annotated[list[NonEmptyStr], BeforeValidator(_names)]
ApiKeys = Annotated[list[NonEmptyStr], BeforeValidator(_keys)]


class ServerConfig(BaseModel):
    """How requests are taken in and answered. Every field is a flag, a variable and a TOML key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: NonEmptyStr = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0 and ::, every one"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0: any")
    served_model_name: Names = Field(
        default=[],
        description="Names clients may use for the model, the first of which replies carry; "
        "default: the model's own",
    )
    api_key: ApiKeys = Field(
        default=[],
        repr=False,  # nothing shows its value: see settings.py
        description="Keys of which a client must bring one, with commas between them; default: "
        "none needed. Given, it must hold a key: an empty variable is an error here",
    )
    api_key_file: NonEmptyStr | None = Field(
        default=None,
        description="File with a key per line, commas and all, read again when it changes; lines "
        "that begin with # are left out. Without a key in it, nobody gets in",
    )
    share_prefix_cache: bool = Field(
        default=False,
        description="Let requests with different API keys reuse each other's cached prompt "
        "beginnings, which lets one key find out what another has sent",
    )
    protect_metrics: bool = Field(default=False, description="Ask for a key on /metrics too")
    docs: bool = Field(default=True, description="Serve /docs and /openapi.json")
    vllm_metrics: bool = Field(
        default=True, description="Export metrics under vLLM's names too, for its dashboards"
    )
    max_body_bytes: Size = Field(
        default=4 << 20,
        ge=1,
        description="Largest request body. Reading one may take a second of a core for each 4 MiB, "
        "and 64 times its size in memory; 16 of the largest may be there at once",
    )
    max_prompts: int = Field(
        default=256,
        ge=1,
        description="Most prompts in one request. Queueing more holds up streams",
    )
    max_logprobs: int = Field(
        default=20, ge=-1, description="Most logprobs a request may ask for per token; -1: all"
    )
    strict_params: bool = Field(
        default=False, description="Refuse unknown fields instead of reporting them in a header"
    )
    clamp_max_tokens: bool = Field(
        default=False, description="Cut a max_tokens that does not fit instead of refusing it"
    )
    trust_request_templates: bool = Field(
        default=False, description="Let requests bring their own chat template"
    )
    generation_config: bool = Field(
        default=True, description="Take sampling defaults from the model's generation_config.json"
    )
    head_timeout: float = Field(
        default=20.0,
        gt=0.0,
        description="Seconds a client may take to send the head of a request, from connecting or "
        "from its first byte",
    )
    body_timeout: float = Field(
        default=60.0, gt=0.0, description="Seconds a client may take to send a request's body"
    )
    request_timeout: float = Field(
        default=0.0,
        ge=0.0,
        description="Seconds a request may take from its head to the end of its answer; 0: any",
    )
    sse_keepalive: float = Field(
        default=15.0, gt=0.0, description="Seconds of silence before a stream gets a comment line"
    )
    slow_client_timeout: float = Field(
        default=60.0,
        gt=0.0,
        description="Seconds in which a client must read 64 KiB of its answer, or what is left",
    )
    watchdog: float = Field(
        default=120.0, gt=0.0, description="Seconds without a step, with work waiting, to be ill"
    )
    drain_delay: float = Field(
        default=5.0, ge=0.0, description="Seconds after SIGTERM in which requests are still taken"
    )
    shutdown_timeout: float = Field(
        default=60.0, ge=0.0, description="Seconds running requests get to finish on shutdown"
    )
    log_level: str = Field(
        default="info",
        pattern="^(debug|info|warning|error)$",
        description="debug, info, warning or error",
    )
