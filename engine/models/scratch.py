"""Folders in which models are downloaded and converted, one process at a time.

Each has a lock, which the system gives up however its owner ends. What an owner that was killed
has left is swept by the next start.
"""

import errno
import fcntl
import logging
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from engine.config import shown_size
from engine.errors import ModelUnavailable

_FOLDER = "scratch"
_POLL_S = 0.1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write fails with where there is no room

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scratch:
    """A folder of one's own, and a sign to give up."""

    folder: Path
    stopping: threading.Event

    def go_on(self) -> None:
        """To be called often. Raises ModelUnavailable once it is time to stop."""
        if self.stopping.is_set():
            raise ModelUnavailable("the start was interrupted")

    @contextmanager
    def progress(self, size: int, what: str) -> Iterator[Callable[[int], None]]:
        """To be told of every few bytes: shows them to whoever waits, and does as `go_on`."""
        # Standard error may be closed, or a pipe whose reader is gone.
        watched = sys.stderr is not None and sys.stderr.isatty()
        with tqdm(
            total=size, unit="B", unit_scale=True, desc=what, leave=False, disable=not watched
        ) as bar:

            def go_on(num_bytes: int) -> None:
                self.go_on()
                bar.update(num_bytes)

            yield go_on

    @contextmanager
    def room(self, size: int, what: str) -> Iterator[None]:
        """Write this many bytes. Raises ModelUnavailable with the numbers if there is no room."""
        home = self.folder.parent.parent
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise _full(what, size, f"{home} has {shown_size(free)} left")
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            left = f"{home} had {shown_size(free)} left ({error.strerror})"
            if error.errno == errno.EFBIG:
                limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
                left = f"`ulimit -f` allows files of {shown_size(limit)}"
            raise _full(what, size, left) from error

    def keep(self, made: Path, target: Path) -> None:
        """Move a file or folder of this scratch to where it stays, whole or not at all.

        What is at the target goes. Raises OSError.
        """
        for path in [*made.iterdir(), made] if made.is_dir() else [made]:
            _to_disk(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if made.is_dir() and target.exists():
            target.rename(self.folder / "superseded")
        made.rename(target)
        _to_disk(target.parent)


@contextmanager
def scratch(home: Path, key: str, name: str, stopping: threading.Event) -> Iterator[Scratch]:
    """An empty folder in which to make what `key` stands for; waits while another process does.

    `name` is what people call it. Raises ModelUnavailable when interrupted, OSError.
    """
    folder = home / _FOLDER / key
    one = Scratch(folder, stopping)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder)
    if lock is None:
        log.warning("waiting for another process, which is downloading or converting %s", name)
    while lock is None:
        one.go_on()
        stopping.wait(_POLL_S)
        lock = _locked(folder)
    try:
        _remove(folder)  # what an owner that was killed has left
        folder.mkdir()
        yield one
    finally:
        _give_up(folder, lock)


def sweep(home: Path) -> None:
    """Remove what owners that were killed have left; what cannot be removed stays."""
    with suppress(OSError):
        for path in list((home / _FOLDER).glob("*.lock")):
            folder = path.with_suffix("")
            if (lock := _locked(folder)) is not None:
                _give_up(folder, lock)


def discard(home: Path, key: str, folder: Path) -> None:
    """Remove a folder that `key` stands for, unless somebody is just making it anew."""
    with suppress(OSError):
        place = home / _FOLDER / key
        if (lock := _locked(place)) is not None:
            try:
                _remove(place)
                folder.rename(place)  # half removed, it must not be taken for the whole
            finally:
                _give_up(place, lock)


def _locked(folder: Path) -> int | None:
    """The open lock of a folder, ours alone until it is closed; None while it is another's."""
    path = folder.with_name(f"{folder.name}.lock")
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have removed the file, and a third one made another.
            if _is_at(lock, path):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError:
            os.close(lock)
            raise
        os.close(lock)


def _is_at(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _give_up(folder: Path, lock: int) -> None:
    _remove(folder)
    with suppress(OSError):
        folder.with_name(f"{folder.name}.lock").unlink()
    os.close(lock)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Have what was written survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _full(what: str, size: int, left: str) -> ModelUnavailable:
    needs = f"takes {shown_size(size)} of disk" if size else "takes more disk than there is"
    return ModelUnavailable(f"{what} {needs}, and {left}; set LOGITMILL_HOME to another folder")
