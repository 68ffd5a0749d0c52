"""Standard streams that are nobody's trouble: closed, broken, full or not read, they lose text."""

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import TextIO

_PATIENCE_S = 0.05  # for a reader who is busy; one who still does not read is not waited for again
_NOTE_BYTES = 100  # of what is said of text that was lost, and more
_GONE = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ENXIO)  # and will not come back


class _Descriptor(io.RawIOBase):
    """A file descriptor to which writing never fails. `failure` is why something was lost.

    A patient one waits for its reader.
    """

    def __init__(self, descriptor: int, *, patient: bool) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._patient = patient
        self._has_reader = True  # as far as is known
        self._num_lost = 0  # bytes, since something was last written
        self.failure: OSError | None = None

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]  # any buffer, says the base
        try:
            if self._has_room():
                if self._num_lost:
                    note, self._num_lost = f"[{self._num_lost} bytes are missing here]\n", 0
                    os.write(self._descriptor, note.encode())
                # What a pipe with room takes without waiting.
                return os.write(self._descriptor, view[: select.PIPE_BUF - _NOTE_BYTES])
        except OSError as error:
            self.failure = error
            if error.errno in _GONE:
                _lead_nowhere(self._descriptor)
        self._num_lost += len(view)
        return len(view)

    def _has_room(self) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        patience_ms = 1000 * _PATIENCE_S if self._has_reader else 0
        self._has_reader = bool(poll.poll(None if self._patient else patience_ms))
        return self._has_reader


class _Stream(io.TextIOWrapper):
    """A text stream over a descriptor."""

    def __init__(self, descriptor: int, encoding: str, errors: str, *, patient: bool) -> None:
        self.descriptor = _Descriptor(descriptor, patient=patient)
        super().__init__(io.BufferedWriter(self.descriptor), encoding, errors, line_buffering=True)


def protect() -> None:
    """Make the process's standard output and error such streams, unless they are replaced already.

    For programs it starts, too: they inherit descriptors that lead somewhere. What is lost of
    standard output, `lost_output` tells; standard error does not wait for its reader.
    """
    if not hasattr(select, "poll"):  # not a Unix
        return
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file opened would pass for it
            _lead_nowhere(descriptor)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _protected(sys.stdout, 1, patient=True)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _protected(sys.stderr, 2, patient=False)


def lost_output() -> OSError | None:
    """Why something written to standard output did not arrive, if anybody was there to read it."""
    if not isinstance(sys.stdout, _Stream):
        return None
    sys.stdout.flush()
    failure = sys.stdout.descriptor.failure
    return None if failure is None or failure.errno in _GONE else failure


def _protected(stream: TextIO | None, descriptor: int, *, patient: bool) -> TextIO:
    if stream is None:  # it was closed when Python started
        return open(os.devnull, "w", encoding="utf-8")
    stream.flush()
    # A path is printed in the bytes it has.
    errors = "surrogateescape" if patient else "backslashreplace"
    return _Stream(descriptor, stream.encoding, errors, patient=patient)


def _lead_nowhere(descriptor: int) -> None:
    with suppress(OSError):  # no file is left for that, either
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere == descriptor:
            os.set_inheritable(descriptor, True)
        else:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
