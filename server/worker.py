"""Processes in which bodies are read that may take long, much memory, or never end.

One process is started with the server, imports what reading needs and gets the tokenizer; it has no
threads. Workers are forks of it: there in milliseconds, ended by the system where a body takes more
than its share, and gone with all their memory after a large one. `server.workers` is the other end.

Messages are pickles behind their length; nothing comes from anywhere but the server itself.
"""

import gc
import io
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from engine.errors import InvalidRequest
from engine.machine import free_memory
from server.errors import ApiError, to_api_error
from server.inputs import Incoming, Reader, read

LARGE_BYTES = 1 << 16  # a body from here on is read by a worker of its own
CPU_S = 1.0  # that a body may take, of processor time
LARGE_CPU_S = 10.0
_GRACE_S = 2  # until the system ends what does not even stop then
_NICE = 5  # streams go first
_MEMORY_BYTES = 512 << 20  # beside as many times a body's size:
_MEMORY_PER_BYTE = 64
_LEAST_BYTES = 32 << 20  # where the machine has hardly any left; it is half of that otherwise

FORK = b"f"  # asks for a worker, whose socket comes with it
_LENGTH = struct.Struct("!Q")


class TooSlow(Exception):
    """Reading a body takes too long."""


def main(descriptor: int) -> None:
    """Get what reading needs, then fork a worker for each socket that comes, until no more can."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the server ends this, by closing the socket
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers leave nothing behind
    os.nice(_NICE)
    with suppress(OSError):  # where memory runs out, this goes, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control = socket.socket(fileno=descriptor)
    content = receive(control)
    if not content:  # whoever started this has ended
        return
    reader: Reader = pickle.loads(content)
    del content
    reader.tokenizer.warm_up()
    gc.freeze()  # what is there by now is there for good, and shared with all workers
    while True:
        asked, descriptors, *_ = socket.recv_fds(control, len(FORK), 1)
        if asked != FORK:
            return
        if os.fork() == 0:
            control.close()
            _serve(socket.socket(fileno=descriptors[0]), reader)
        os.close(descriptors[0])


def _serve(connection: socket.socket, reader: Reader) -> NoReturn:
    """Read bodies until the server closes the connection, or one was large."""
    signal.signal(signal.SIGPROF, _on_time)
    # Where memory runs out, libraries end the process with pages of words that help nobody.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    status = 1
    try:
        send(connection, str(os.getpid()).encode())
        while message := receive(connection):
            incoming: Incoming = pickle.loads(message)
            is_large = len(incoming.data) >= LARGE_BYTES
            if is_large:
                gc.disable()  # looking through millions of new lists, of which none is garbage
            _limit(len(incoming.data), LARGE_CPU_S if is_large else CPU_S)
            answer = _answer(incoming, reader)
            signal.setitimer(signal.ITIMER_PROF, 0)
            send(connection, answer)
            if is_large:
                break
        status = 0
    except OSError:  # the server has gone
        pass
    finally:
        os._exit(status)  # nothing of the process this was forked from is to be run


def _answer(incoming: Incoming, reader: Reader) -> bytes:
    """An Input and its requests one by one, or an ApiError; a text is what nobody expected."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, pickle.HIGHEST_PROTOCOL)  # what requests share is there once
    try:
        found = read(incoming, reader)
        pickler.dump(replace(found, requests=[]))
        pickler.dump(len(found.requests))
        for request in found.requests:
            pickler.dump(request)
        return out.getvalue()
    except (TooSlow, MemoryError) as error:
        return pickle.dumps(too_much(error))
    except Exception as error:  # noqa: BLE001 - the server raises it
        known = to_api_error(error)
        return pickle.dumps(known if known.status < 500 else traceback.format_exc())


def too_much(error: BaseException | None = None) -> ApiError:
    """What is told of a body that takes too much."""
    reason = "it takes more memory or time than there is for it"
    if error is not None:
        reason = str(error) or "it takes too much memory"
    return to_api_error(InvalidRequest(f"The body cannot be read: {reason}."))


def _limit(size: int, cpu_s: float) -> None:
    """Let the next body have so much processor time, and memory in proportion to its size."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + cpu_s) + _GRACE_S
    wanted = _MEMORY_BYTES + _MEMORY_PER_BYTE * size
    memory = _data_bytes() + min(wanted, max(free_memory().free // 2, _LEAST_BYTES))
    for which, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_DATA, memory)):
        _, hard = resource.getrlimit(which)
        resource.setrlimit(which, (most if hard < 0 else min(most, hard), hard))


def _on_time(_number: int, _frame: FrameType | None) -> NoReturn:
    raise TooSlow("it takes too much processor time")


def _data_bytes() -> int:
    """The memory that RLIMIT_DATA counts, as it is now; 0 if that is not known."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        return 0


def send(connection: socket.socket, message: bytes) -> None:
    """Send one message. Raises OSError."""
    connection.sendall(_LENGTH.pack(len(message)))
    connection.sendall(message)


def receive(connection: socket.socket) -> bytes:
    """The next message; empty at the end. Raises OSError."""
    size = _LENGTH.unpack(_exactly(connection, _LENGTH.size) or bytes(_LENGTH.size))[0]
    return bytes(_exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> Any:
    """So many bytes, or none if the other end closes before."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            return b""
        view = view[count:]
    return data


if __name__ == "__main__":
    main(int(sys.argv[1]))
