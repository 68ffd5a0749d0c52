"""Every option from where it was given: flag, then environment, then TOML file, then default."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from engine.config import EngineConfig
from engine.models.source import read_config
from engine.models.wheels import Source
from engine.params import SamplingParams
from server.config import ServerConfig

SECTIONS: dict[str, type[BaseModel]] = {
    "source": Source,
    "engine": EngineConfig,
    "server": ServerConfig,
    "sampling": SamplingParams,
}
OPTIONS: dict[str, type[BaseModel]] = {"engine": EngineConfig, "server": ServerConfig}
# An empty variable is as good as none, except here, where a secret that was not filled in would let
# everybody in.
_NEVER_EMPTY = ("api_key", "api_key_file")


class BadOption(Exception):
    """An option that cannot be used; the message names where it was given, in one line."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All options, and what the model's configuration says of it."""

    engine: EngineConfig
    server: ServerConfig
    sampling: dict[str, Any] = field(default_factory=dict)
    source: Source | None = None


def flag(name: str) -> str:
    """max_model_len as --max-model-len."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """max_model_len as LOGITMILL_MAX_MODEL_LEN."""
    return "LOGITMILL_" + name.upper()


def resolve(
    flags: Mapping[str, Any], file: str | None, environ: Mapping[str, str] = os.environ
) -> Settings:
    """Settle every option. Raises BadOption.

    `flags` holds what the command line gave, by field name. Options come from the model's own
    file in configs/ too, if its name has one; `file` is a further one and goes before that.
    """
    given: dict[str, tuple[Any, str]] = {}  # by field: the value and where it is from
    for model in OPTIONS.values():
        for name in model.model_fields:
            if name in flags:
                given[name] = flags[name], flag(name)
            elif environ.get(variable(name)) or (
                name in _NEVER_EMPTY and variable(name) in environ
            ):
                given[name] = environ[variable(name)], variable(name)
    own = {} if file is None else _read(Path(file))
    model_name = given["model"][0] if "model" in given else own.get("engine", {}).get("model")
    model_name = EngineConfig.model_fields["model"].default if model_name is None else model_name
    shipped = read_config(str(model_name)) or {}
    for content, origin in ((own, str(file)), (shipped, f"configs/{model_name}.toml")):
        for section in OPTIONS:
            for name, value in content.get(section, {}).items():
                given.setdefault(name, (value, f"{name} in {origin}"))
    sampling = shipped.get("sampling", {}) | own.get("sampling", {})
    _checked(SamplingParams, sampling, {name: f"[sampling] {name}" for name in sampling})
    source = own.get("source") or shipped.get("source")
    origins = {name: origin for name, (_, origin) in given.items()}
    engine, server = (
        _checked(
            model, {name: given[name][0] for name in given.keys() & model.model_fields}, origins
        )
        for model in (EngineConfig, ServerConfig)
    )
    source = None if source is None else _checked(Source, source, {})
    return Settings(engine, server, sampling, source)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption(f"--config: cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise BadOption(f"--config: {path} is not TOML: {error}") from error
    for section, values in content.items():
        if section not in SECTIONS or not isinstance(values, dict):
            known = ", ".join(f"[{name}]" for name in SECTIONS)
            raise BadOption(f"--config: {path} may hold {known}, not {section}")
        if unknown := values.keys() - SECTIONS[section].model_fields.keys():
            raise BadOption(f"--config: {path}: [{section}] has no {min(unknown)}")
    return content


def _checked(model: type[BaseModel], values: Mapping[str, Any], origins: Mapping[str, str]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else ""
        message = problem["msg"].removeprefix("Value error, ")
        where = origins.get(name, name)
        secret = name in model.model_fields and not model.model_fields[name].repr
        got = f", got {problem['input']!r}" if name and not secret else ""
        raise BadOption(f"{where}: {message}{got}" if where else message) from error
