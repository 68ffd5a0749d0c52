"""An engine in this process, for benchmarks that need one."""

from typing import Any

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.load import load_engine
from engine.models.source import locate, read_config
from engine.params import SamplingParams
from engine.prepare import ModelInfo, Output, prepare


def load(
    model: str, amateur: tuple[str, str] | None = None, **options: Any
) -> tuple[EngineCore, ModelInfo]:
    """Load what --model names, with the options its config in configs/ has, and these.

    The amateur is a name for requests and the model it means.
    """
    shipped = read_config(model) or {}
    config = EngineConfig.model_validate(shipped.get("engine", {}) | {"model": model} | options)
    beside = None if amateur is None else (amateur[0], locate(amateur[1]).fetch())
    core, info = load_engine(config, locate(model).fetch(), beside)
    while core.idle():  # as a server's is before anybody comes
        pass
    return core, info


def submit(
    core: EngineCore,
    info: ModelInfo,
    request_id: str,
    prompt_ids: list[int],
    params: dict[str, Any],
    output: Output,
) -> None:
    """Give an engine one request, prepared as the server does."""
    checked = SamplingParams.model_validate({"ignore_eos": True} | params)
    core.submit(prepare(prompt_ids, checked, output, info, core.tokenizer, request_id=request_id))


def stop(core: EngineCore, request_ids: list[str]) -> None:
    """Abort requests."""
    for request_id in request_ids:
        core.abort(request_id)
