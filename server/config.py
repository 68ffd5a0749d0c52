"""Settings of the HTTP front end."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from engine.config import Size
from engine.params import NonEmptyStr


def _names(value: object) -> object:
    """ "a,b" as two names, as environment variables and flags give them."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Names = Annotated[list[NonEmptyStr], BeforeValidator(_names)]


class ServerConfig(BaseModel):
    """How requests are taken in and answered. Every field is a flag, a variable and a TOML key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="Address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0: any")
    served_model_name: Names = Field(
        default=[],
        description="Names clients may use for the model, the first of which replies carry; "
        "default: the model's own",
    )
    api_key: Names = Field(
        default=[], description="Keys of which a client must bring one; default: none needed"
    )
    api_key_file: str | None = Field(
        default=None, description="File with a key per line, read again when it changes"
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
    sse_keepalive: float = Field(
        default=15.0, gt=0.0, description="Seconds of silence before a stream gets a comment line"
    )
    slow_client_timeout: float = Field(
        default=60.0, gt=0.0, description="Seconds a client may leave its stream unread"
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
