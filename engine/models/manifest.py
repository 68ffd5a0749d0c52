"""What a folder's files must be: written when they are, and checked before they are used."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import xxhash
from pydantic import BaseModel, ValidationError

from engine.errors import ModelUnavailable
from engine.machine import processors

FILE = "manifest.json"
_SEGMENT = 32 << 20  # a thread's share of a large file
_MOST_THREADS = 4  # more of them only wait for memory
_BUFFER = 1 << 20  # small enough to be hashed while it is in the processor's cache


class Manifest(BaseModel):
    """A folder's digests, by the names of its files, and what it was made of."""

    version: int  # of the form of such folders
    content: str  # names what it was made of by that one's own digest
    path: str | None  # where a user keeps that
    files: dict[str, str]

    @classmethod
    def of(cls, folder: Path, *, version: int, content: str, path: Path | None) -> Self:
        """The manifest of what a folder holds now. Raises OSError."""
        files = _files(folder)
        found = dict(zip(files, digests(list(files.values())), strict=True))
        where = None if path is None else str(path)
        return cls(version=version, content=content, path=where, files=found)

    def write(self, folder: Path) -> None:
        """Put it beside the files. Raises OSError."""
        (folder / FILE).write_text(json.dumps(self.model_dump(), indent=1))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """A folder's manifest. Raises ModelUnavailable if there is none that can be read."""
        try:
            return cls.model_validate_json((folder / FILE).read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no manifest"
            raise ModelUnavailable(f"{folder / FILE} cannot be read: {reason}") from error

    def check(self, folder: Path) -> None:
        """Hold a folder against this. Raises ModelUnavailable with the first difference."""
        try:
            files = _files(folder)
            for name in sorted(self.files.keys() ^ files.keys()):
                reason = "is missing" if name in self.files else "was not there when it was made"
                raise ModelUnavailable(f"{folder / name} {reason}")
            for name, digest in zip(files, digests(list(files.values())), strict=True):
                if digest != self.files[name]:
                    raise ModelUnavailable(f"{folder / name} is not as it was written")
        except OSError as error:
            where = error.filename or folder
            raise ModelUnavailable(f"{where} cannot be read: {error.strerror}") from error


def digests(files: Sequence[Path]) -> list[str]:
    """The digest of each file, read in parallel: of its segments, and then of their digests.

    128 bits of XXH3, which takes no longer than reading. Raises OSError.
    """
    segments = [
        (file, start) for file in files for start in range(0, max(file.stat().st_size, 1), _SEGMENT)
    ]
    with ThreadPoolExecutor(min(processors(), _MOST_THREADS)) as pool:
        parts = list(pool.map(_segment_digest, segments))
    wholes = {file: xxhash.xxh3_128() for file in files}
    for (file, _), part in zip(segments, parts, strict=True):
        wholes[file].update(part)
    return [wholes[file].hexdigest() for file in files]


def _segment_digest(segment: tuple[Path, int]) -> bytes:
    path, start = segment
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_BUFFER))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        for _ in range(_SEGMENT // _BUFFER):
            digest.update(buffer[: file.readinto(buffer)])
    return digest.digest()


def _files(folder: Path) -> dict[str, Path]:
    """What a manifest speaks of; file systems leave hidden files of their own."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.name != FILE and not path.name.startswith(".")
    }
