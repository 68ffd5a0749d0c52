"""API keys: kept as hashes, compared in constant time."""

import hashlib
import hmac
from contextlib import suppress
from pathlib import Path

from server.settings import BadOption


class Keys:
    """The keys clients may use, given directly and read from a file that may change."""

    def __init__(self, keys: list[str], file: str | None) -> None:
        self._fixed = [_digest(key) for key in keys]
        self._file = None if file is None else Path(file)
        self._read: list[bytes] = []
        self._read_at: int | None = None
        try:
            self._refresh()
        except (OSError, ValueError) as error:
            raise BadOption(f"--api-key-file: cannot read {file}: {error}") from error

    def allow(self, authorization: str | None) -> bool:
        """Does a request with this Authorization header get in? Without keys, all do."""
        with suppress(OSError, ValueError):  # being replaced: the keys last read stay good
            self._refresh()
        known = self._fixed + self._read
        if not known and self._file is None:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, other) for other in known]
        return scheme.lower() == "bearer" and any(matches)

    def _refresh(self) -> None:
        if self._file is None:
            return
        changed_at = self._file.stat().st_mtime_ns
        if changed_at != self._read_at:
            lines = [line.strip() for line in self._file.read_text().splitlines()]
            self._read = [_digest(line) for line in lines if line and not line.startswith("#")]
            self._read_at = changed_at


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
