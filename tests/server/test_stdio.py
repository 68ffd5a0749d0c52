"""Standard streams that are closed, broken, full or not read, in processes of their own."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import eventually, free_port
from tests.support.wire import COMPLETIONS

NOISY = """
import sys
from server.stdio import lost_output, protect
protect()
for number in range(3000):
    print("line", number, "x" * 60)
    print("line", number, "y" * 60, file=sys.stderr)
sys.stdout.flush()
failure = lost_output()
sys.exit(0 if failure is None else failure.errno)
"""


def shell(command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a line of bash in which "$@" is this Python with some arguments."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, "x", sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ('"$@" | true', 0),
        ('"$@" 2>&1 | head -1', 0),
        ('"$@" 2>&1 | tail -1', 0),
        ('"$@" >&-', 0),
        ('"$@" 2>&-', 0),
        ('"$@" <&- >&- 2>&-', 0),
        ('"$@" 2>/dev/full', 0),
        ('"$@" >/dev/full', 28),  # ENOSPC: somebody wanted it
        ('"$@" >/dev/full 2>&1', 28),
    ],
)
def test_streams_never_end_a_program_or_make_it_complain(command: str, status: int) -> None:
    done = shell(command, "-c", NOISY)

    assert done.returncode == status
    lines = (done.stdout + done.stderr).splitlines()
    assert all(re.fullmatch(r"line \d+ [xy]{60}", line) for line in lines)


def test_where_all_is_well_nothing_changes() -> None:
    done = shell('"$@"', "-c", NOISY)

    assert done.stdout == "".join(f"line {number} {'x' * 60}\n" for number in range(3000))
    assert done.stderr == "".join(f"line {number} {'y' * 60}\n" for number in range(3000))


def test_what_opens_next_does_not_pass_for_a_stream_that_was_closed() -> None:
    program = (
        "import os, sys, subprocess\n"
        "from server.stdio import protect\n"
        "protect()\n"
        "opened = open(sys.argv[1], 'wb')\n"
        "print('lost')\n"
        "os.write(2, b'lost')\n"
        "subprocess.run(['sh', '-c', 'echo lost; echo lost >&2'], check=True)\n"
        "sys.exit(opened.fileno() < 3)"
    )
    done = shell('"$@" <&- >&- 2>&-', "-c", program, "/dev/null")

    assert done.returncode == 0


def test_programs_started_after_a_reader_has_gone_have_a_stream_to_write_to() -> None:
    """A program that is told of the broken pipe by a signal would end of it."""
    program = (
        "import subprocess, sys, time\n"
        "from server.stdio import protect\n"
        "protect()\n"
        "sys.stdin.readline()\n"
        "print('downloading', file=sys.stderr)\n"
        "done = subprocess.run(['sh', '-c', 'echo progress && echo end >&2'], stdout=sys.stderr)\n"
        "sys.exit(done.returncode)"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert started.stdin is not None
    assert started.stderr is not None
    started.stderr.close()
    started.stdin.write(b"now\n")
    started.stdin.close()
    assert started.wait(60) == 0


def test_a_reader_who_does_not_read_holds_up_nobody_and_is_told_what_is_missing() -> None:
    program = (
        "import sys\n"
        "from server.stdio import protect\n"
        "protect()\n"
        "for number in range(5000): print('line', number, 'x' * 60, file=sys.stderr)\n"
        "print('done', flush=True)\n"
        "sys.stdin.readline()\n"
        "print('line 5000', 'x' * 60, file=sys.stderr)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stdin is not None
        assert started.stdout is not None
        assert started.stderr is not None
        assert started.stdout.readline() == "done\n"  # with nobody reading the errors
        first = os.read(started.stderr.fileno(), 1 << 20).decode()
        started.stdin.write("now\n")
        started.stdin.close()
        rest = started.stderr.read()
        assert started.wait(60) == 0

    *lines, end = (first + rest).splitlines()
    assert lines[0] == "line 0 " + "x" * 60
    assert end == "line 5000 " + "x" * 60
    (note,) = [line for line in lines if line.endswith(" bytes are missing here]")]
    missing = int(note.rpartition("[")[2].split()[0])
    whole = sum(len(f"line {number} {'x' * 60}\n") for number in range(5000))
    assert (
        len(first + rest) - len(note.rpartition("[")[1] + note.rpartition("[")[2]) + missing
        >= whole
    )


# -- the command


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        ('"$@"', 0, ""),
        ('"$@" | true', 0, ""),
        ('"$@" >&-', 0, ""),
        ('"$@" 2>&- >&-', 0, ""),
        ('"$@" >/dev/full', 2, "cannot write to standard output: No space left on device"),
    ],
)
def test_a_pull_ends_as_it_went(tiny_folder: Path, command: str, status: int, says: str) -> None:
    done = shell(command, "-m", "server", "pull", str(tiny_folder))

    assert done.returncode == status
    assert done.stdout == (f"{tiny_folder}\n" if command == '"$@"' else "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == bool(says)
    failed = shell(command, "-m", "server", "pull", "potato")
    assert failed.returncode == 2


@contextmanager
def serving(folder: Path, redirection: str, **options: Any) -> Iterator[tuple[Any, str]]:
    """The real server, its streams redirected by a shell; gives the process and its URL."""
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "--model", str(folder), "--port", str(port)]
    command += ["--drain-delay", "0", "--kv-cache-memory", "4MiB", "--dtype", "float32"]
    command += ["--threads", "1", "--log-level", "debug"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LOGITMILL_")}
    started = subprocess.Popen(
        ["bash", "-c", f'exec "$@" {redirection}', "x", *command], env=environment, **options
    )
    url = f"http://127.0.0.1:{port}"
    try:
        yield started, url
    finally:
        started.kill()
        started.wait()
        for stream in (started.stdout, started.stderr):
            if stream is not None:
                stream.close()


def healthy(process: "subprocess.Popen[bytes]", url: str) -> bool:
    assert process.poll() is None
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def completes(url: str) -> bool:
    body = {"prompt": "the hen", "max_tokens": 2}
    response = httpx.post(f"{url}{COMPLETIONS}", json=body, trust_env=False, timeout=60)
    return response.status_code == 200


@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", "2>/dev/full"])
def test_a_server_serves_without_streams(tiny_folder: Path, redirection: str) -> None:
    with serving(tiny_folder, redirection) as (process, url):
        eventually(lambda: healthy(process, url))
        assert completes(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize("reads", [True, False], ids=["goes", "does not read"])
def test_a_server_outlives_the_reader_of_its_log(tiny_folder: Path, reads: bool) -> None:
    ours, theirs = socket.socketpair() if not reads else (None, None)
    error: Any = subprocess.PIPE if theirs is None else theirs
    with serving(tiny_folder, "", stderr=error) as (process, url):
        if reads:
            assert process.stderr.readline()
            process.stderr.close()
        eventually(lambda: healthy(process, url))
        with httpx.Client(base_url=url, trust_env=False) as client:
            for _ in range(2000):  # far more than a pipe or a socket holds
                assert client.get("/live").status_code == 200
        assert completes(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    for end in (ours, theirs):
        if end is not None:
            end.close()
