"""API keys: kept as hashes, compared in constant time."""

import hashlib
import hmac
import logging
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from server.settings import BadOption

_MOST_BYTES = 1 << 20  # of a file of keys: anything larger is another file
# A file written twice within a tick of the file system's clock looks the same both times; so it is
# read again until it is this old.
_SETTLED_NS = 2_000_000_000

log = logging.getLogger(__name__)


class Keys:
    """The keys clients may use, given directly and read from a file that may change."""

    def __init__(self, keys: list[str], file: str | None) -> None:
        self._fixed = _digests(keys)
        self._file = None if file is None else Path(file)
        self._read: list[bytes] = []
        self._stamp: tuple[int, ...] | None = None  # of the file as it was read, once it is settled
        self._trouble: str | None = None  # the last that was said in the log
        if self._file is not None:
            try:
                self._refresh(self._file)
            except (OSError, ValueError) as error:
                raise BadOption(f"--api-key-file: cannot read {file}: {_reason(error)}") from error

    @property
    def several(self) -> bool:
        """May requests come with different keys?"""
        return self._file is not None or len(self._fixed) > 1

    def identify(self, authorization: str | None) -> str | None:
        """Whose key an Authorization header brings; None: this request does not get in.

        The answer is an opaque id of 32 characters, the same as long as the key is, or "" where no
        key is asked for. The header is as ASGI servers give it: bytes, read as Latin-1.
        """
        if self._file is not None:
            self._refresh_if_possible(self._file)
        known = self._fixed + self._read
        if not known and self._file is None:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        # Programs send what is not ASCII as UTF-8, or as Latin-1.
        tried = [_digest(key.encode("latin-1", "replace")), _digest(key.encode())]
        found = [one for one in known if sum(hmac.compare_digest(one, it) for it in tried)]
        return found[0].hex()[:32] if found and scheme.lower() == "bearer" else None

    def _refresh_if_possible(self, file: Path) -> None:
        """Read the file if it has changed. If that fails, the keys last read stay good."""
        try:
            self._refresh(file)
        except (OSError, ValueError) as error:
            kept = "the keys last read stay good"
            self._say(f"--api-key-file: cannot read {file}: {_reason(error)}; {kept}")

    def _refresh(self, file: Path) -> None:
        """Read the file if it has changed. Raises OSError or ValueError."""
        found = file.stat()
        # A pipe can be read once.
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if stamp == self._stamp or (self._stamp and not stat.S_ISREG(found.st_mode)):
            return
        with file.open("rb") as opened:
            content = opened.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
        lines = [line.strip() for line in content.decode("utf-8-sig").split("\n")]
        self._read = _digests(line for line in lines if line and not line.startswith("#"))
        age_ns = time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns)
        settled = age_ns > _SETTLED_NS or not stat.S_ISREG(found.st_mode)
        self._stamp = stamp if settled else None
        empty = not self._read and not self._fixed
        self._say(f"--api-key-file: {file} holds no key, so nobody gets in" if empty else None)

    def _say(self, trouble: str | None) -> None:
        """Put into the log what is wrong with the file, once."""
        if trouble not in (None, self._trouble):
            log.warning("%s", trouble)
        elif self._trouble is not None and trouble is None:
            log.info("--api-key-file: read %s again", self._file)
        self._trouble = trouble


def _digests(keys: Iterable[str]) -> list[bytes]:
    """Of each key once, in order."""
    return list(dict.fromkeys(_digest(key.encode()) for key in keys))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _reason(error: OSError | ValueError) -> str:
    """What is wrong, without what the file holds."""
    if isinstance(error, OSError):
        return str(error.strerror or type(error).__name__)
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
