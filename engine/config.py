"""Settings of the engine."""

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(value: object) -> object:
    """ "2GiB", "512M" or a number of bytes, in bytes."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("expected a size such as 2GiB or 512MB")
    number, unit, binary = match.groups()
    base = 1024 if binary or not unit else 1000
    return int(float(number) * base ** " KMGT".index(unit.upper() or " "))


def shown_size(num_bytes: int) -> str:
    """1610612736 as "1.5 GiB"."""
    size, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


Size = Annotated[int, BeforeValidator(parse_size)]


class LogprobsMode(StrEnum):
    """What the reported numbers are: of the model's own row, or of the row that was drawn from."""

    RAW_LOGPROBS = "raw_logprobs"
    PROCESSED_LOGPROBS = "processed_logprobs"
    RAW_LOGITS = "raw_logits"
    PROCESSED_LOGITS = "processed_logits"

    @property
    def raw(self) -> bool:
        return self in (LogprobsMode.RAW_LOGPROBS, LogprobsMode.RAW_LOGITS)

    @property
    def normalised(self) -> bool:
        return self in (LogprobsMode.RAW_LOGPROBS, LogprobsMode.PROCESSED_LOGPROBS)


class EngineConfig(BaseModel):
    """How the engine runs a model. Every field is a flag, a variable and a TOML key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        default="smollm2-135m-instruct",
        min_length=1,
        description="A folder in Hugging Face form, a .gguf file, a hub id (owner/name, "
        "owner/name@revision), or a name in configs/",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N; auto takes CUDA where there is one",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of weights and cache. auto: the checkpoint's on CUDA; on CPU bfloat16 "
        "where the processor multiplies it, else float32",
    )
    quantization: Literal["auto", "none", "int8"] = Field(
        default="auto",
        description="int8: on CPU, multiply by weights of 8 bits in groups of 32, or of 4 bits "
        "where the checkpoint has them. auto: int8, unless --dtype names a type",
    )
    amateur_model: str | None = Field(
        default=None,
        min_length=1,
        description="A smaller model of the same vocabulary, for contrastive decoding "
        "(`cd_amateur`)",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads for tensor operations; default: as many as the process may keep "
        "busy, by its affinity and the quotas of its cgroups",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        description="Longest prompt and output together; default: the model's own",
    )
    block_size: int = Field(default=16, ge=1, le=256, description="Tokens per KV-cache block")
    kv_cache_memory: Size | None = Field(
        default=None,
        ge=1,
        description="Memory for the KV cache, such as 2GiB; default: --kv-cache-fraction of what "
        "is free after loading",
    )
    kv_cache_fraction: float = Field(
        default=0.3,
        gt=0.0,
        lt=1.0,
        description="Part of the memory free after loading the weights that the KV cache may take",
    )
    max_num_seqs: int = Field(
        default=256, ge=1, description="Most sequences computed together (lanes)"
    )
    max_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens computed in one step; longer prompts are split. Default: 512 on "
        "CPU, 4096 on CUDA",
    )
    prefill_ratio: int | None = Field(
        default=None,
        ge=1,
        description="Most prompt tokens computed in a step for each sequence that gets a token in "
        "it, but at least 16: so a long prompt does not hold up running streams. Default: 2 on "
        "CPU, no limit on CUDA",
    )
    max_beam_width: int = Field(
        default=64, ge=1, description="Most hypotheses a beam search may keep"
    )
    max_waiting: int = Field(
        default=1024,
        ge=0,
        description="Most sequences waiting for a place; beyond that the server answers 503",
    )
    prefix_cache: bool = Field(
        default=True, description="Reuse the cached beginnings of earlier sequences"
    )
    batch_invariant: bool = Field(
        default=False,
        description="Compute every token by the same operations whatever else is in the batch, so "
        "that logprobs have the same bits alone and among others. Costs nothing with our CPU "
        "kernels' quantised weights, which always do; elsewhere it is slower",
    )
    logprobs_mode: LogprobsMode = Field(
        default=LogprobsMode.RAW_LOGPROBS,
        description="Report logprobs (or logits) of the model's own distribution, or of the one "
        "that was drawn from",
    )

    @model_validator(mode="after")
    def _any_group_fits(self) -> Any:
        if self.max_batch_tokens is not None and self.max_batch_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that a step can serve every sequence"
            )
        return self

    @property
    def quantize(self) -> bool:
        """Should weights be quantised where kernels for them exist?"""
        return self.quantization == "int8" or (self.quantization == "auto" and self.dtype == "auto")

    def batch_tokens(self, device: str) -> int:
        """The token budget of a step on this device."""
        budget = self.max_batch_tokens or (512 if device == "cpu" else 4096)
        return max(budget, self.max_num_seqs)

    def prompt_tokens_beside(self, device: str) -> int | None:
        """How many prompt tokens a step may have for each running sequence; None: any number."""
        return self.prefill_ratio or (2 if device == "cpu" else None)
