"""From what --model says to a local Hugging Face folder: find, download, verify, convert, cache."""

import os
import threading
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import platformdirs

from engine.config import shown_size
from engine.errors import ModelUnavailable
from engine.machine import free_memory
from engine.models import conversions, hub
from engine.models.manifest import FILE, Manifest
from engine.models.scratch import sweep
from engine.models.wheels import Source


@dataclass(frozen=True, slots=True)
class Location:
    """A model that seems to exist: what clients call it, and how it gets here."""

    name: str
    _get: Callable[[threading.Event], Path]

    def fetch(self, stopping: threading.Event | None = None) -> Path:
        """Download and convert what is not here yet; returns a Hugging Face folder, checked.

        Raises ModelUnavailable, in one line, with what was tried; so it does soon after somebody
        has set `stopping`.
        """
        sweep(home())
        try:
            return self._get(threading.Event() if stopping is None else stopping)
        except (MemoryError, RuntimeError) as error:  # threads that cannot start are the second
            room = free_memory()
            raise ModelUnavailable(
                f"there is too little memory to look for {self.name} ({error}): {room.bound} "
                f"leaves {shown_size(room.free)}"
            ) from error


def home() -> Path:
    """Where downloads and conversions are kept: LOGITMILL_HOME, or the platform's cache folder."""
    chosen = os.environ.get("LOGITMILL_HOME")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("logitmill"))


def read_config(name: str) -> dict[str, Any] | None:
    """The shipped configs/<name>.toml; None if there is none."""
    file = resources.files("configs").joinpath(f"{name}.toml")
    return tomllib.loads(file.read_text()) if file.is_file() else None


def config_names() -> list[str]:
    """The names of the shipped configs."""
    files = resources.files("configs").iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".toml"))


def locate(model: str, source: Source | None = None) -> Location:
    """Find out what --model means, without fetching anything.

    `model` is a folder, a .gguf file, a hub id with an optional @revision, or only a name: for
    `source`, or of a file in configs/. Raises ModelUnavailable if it cannot be any of them.
    """
    if source is None and (shipped := (read_config(model) or {}).get("source")):
        source = Source.model_validate(shipped)
    path = Path(model).expanduser()
    if path.is_dir():
        return Location(path.resolve().name, lambda _: _checked(path))
    if path.suffix == ".gguf" and path.is_file():
        return Location(path.stem, lambda stopping: _converted(path, stopping))
    if source is not None:
        return Location(model, lambda stopping: _converted(source, stopping))
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")):
        raise ModelUnavailable(f"there is no file or folder {model}")
    if "/" in model:
        return Location(model.partition("@")[0], lambda _: hub.fetch(model))
    raise ModelUnavailable(
        f"{model!r} is no folder, no .gguf file, no hub id (owner/name) and none of the names "
        f"in configs/ ({', '.join(config_names())})"
    )


def _checked(folder: Path) -> Path:
    """A user's folder, held against its manifest if it is a conversion of ours."""
    kept = folder.resolve().parent == (home() / "converted").resolve()
    if kept or (folder / FILE).exists():
        try:
            manifest = Manifest.read(folder)
        except ModelUnavailable:  # other tools' files have the same name
            if kept:
                raise
            return folder
        manifest.check(folder)
    return folder


def _converted(file: Path | Source, stopping: threading.Event) -> Path:
    where = home()
    if isinstance(file, Path):
        original = conversions.of_file(file)
    else:
        original = conversions.of_source(file, where)
    try:
        return conversions.fetch(original, where, stopping)
    except OSError as error:
        raise ModelUnavailable(
            f"cannot keep the model in {where} ({error}); set LOGITMILL_HOME to another folder"
        ) from error
