"""Scratch folders: one owner at a time, nothing left of the dead, and what to do on a full disk."""

import errno
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.errors import ModelUnavailable
from engine.models import scratch as module
from engine.models.scratch import discard, scratch, sweep
from tests.support.servers import eventually

_HOLD = """
import sys, threading
from pathlib import Path
from engine.models.scratch import scratch
with scratch(Path(sys.argv[1]), sys.argv[2], "the model", threading.Event()) as place:
    (place.folder / "half").write_text("made")
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def owner(home: Path, key: str = "key") -> Iterator["subprocess.Popen[str]"]:
    """Another process that is making something."""
    command = [sys.executable, "-c", _HOLD, str(home), key]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def left(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home / "scratch")) for path in (home / "scratch").rglob("*"))


def test_a_scratch_is_empty_at_first_and_gone_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with scratch(tmp_path, "key", "the model", threading.Event()) as place:
            assert list(place.folder.iterdir()) == []
            (place.folder / "half").mkdir()
        assert left(tmp_path) == []
    with (
        pytest.raises(ZeroDivisionError),
        scratch(tmp_path, "key", "the model", threading.Event()),
    ):
        _ = 1 / 0
    assert left(tmp_path) == []


def test_what_the_dead_have_left_is_swept_and_what_the_living_have_stays(tmp_path: Path) -> None:
    with owner(tmp_path, "living"):
        with owner(tmp_path, "dead") as dead:
            dead.kill()
            dead.wait()
            assert "dead/half" in left(tmp_path)
            sweep(tmp_path)
        assert left(tmp_path) == ["living", "living.lock", "living/half"]


def test_what_the_dead_have_left_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    with owner(tmp_path) as dead:
        dead.kill()
        dead.wait()
    with scratch(tmp_path, "key", "the model", threading.Event()) as place:
        assert list(place.folder.iterdir()) == []


def test_a_second_owner_waits_and_says_so_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entered = threading.Event()

    def second() -> None:
        with scratch(tmp_path, "key", "the model", threading.Event()) as place:
            assert list(place.folder.iterdir()) == []
            entered.set()

    thread = threading.Thread(target=second)
    with owner(tmp_path) as first:
        thread.start()
        eventually(lambda: bool(caplog.records))
        with scratch(tmp_path, "another", "another model", threading.Event()):
            pass  # which nobody is making
        assert not entered.is_set()
        first.communicate()
    assert entered.wait(60)
    thread.join()
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (
        logging.WARNING,
        "waiting for another process, which is downloading or converting the model",
    )
    assert left(tmp_path) == []


def test_many_owners_come_one_after_the_other(tmp_path: Path) -> None:
    """Locks are removed with the scratch: nobody must hold one that is no longer the lock."""
    inside, most, turns = 0, 0, 0
    mutex = threading.Lock()

    def work() -> None:
        nonlocal inside, most, turns
        for _ in range(10):
            with scratch(tmp_path, "key", "the model", threading.Event()):
                with mutex:
                    inside, turns = inside + 1, turns + 1
                    most = max(most, inside)
                with mutex:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, turns, left(tmp_path)) == (1, 40, [])


def test_whoever_waits_can_be_told_to_stop(tmp_path: Path) -> None:
    stopping = threading.Event()
    stopping.set()
    with (
        owner(tmp_path),
        pytest.raises(ModelUnavailable, match="the start was interrupted"),
        scratch(tmp_path, "key", "the model", stopping),
    ):
        pass


def test_a_home_that_cannot_be_swept_is_left_alone(tmp_path: Path) -> None:
    sweep(tmp_path / "nowhere")
    (tmp_path / "scratch").write_text("a file")
    sweep(tmp_path)


def test_what_is_kept_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "kept" / "model"
    for content in ("first", "second"):
        with scratch(tmp_path, "key", "the model", threading.Event()) as place:
            made = place.folder / "made"
            made.mkdir()
            (made / "file").write_text(content)
            place.keep(made, target)
    assert (target / "file").read_text() == "second"
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["model"]
    with owner(tmp_path):
        discard(tmp_path, "key", target)
        assert target.exists()  # somebody is just making it
    discard(tmp_path, "key", target)
    assert not target.exists()
    assert left(tmp_path) == []


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda _: module.shutil._ntuple_diskusage(9, 8, 3 << 20)
    )
    with (
        scratch(tmp_path, "key", "the model", threading.Event()) as place,
        pytest.raises(ModelUnavailable) as caught,
        place.room(5 << 20, "the model, converted,"),
    ):
        raise AssertionError("there was room")
    assert str(caught.value) == (
        f"the model, converted, takes 5.0 MiB of disk, and {tmp_path} has 3.0 MiB left; set "
        "LOGITMILL_HOME to another folder"
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("size", [5 << 20, 0])
def test_a_disk_that_gets_full_is_told_with_the_numbers(
    tmp_path: Path, code: int, size: int
) -> None:
    with (
        scratch(tmp_path, "key", "the model", threading.Event()) as place,
        pytest.raises(ModelUnavailable) as caught,
        place.room(size, "the model"),
    ):
        raise OSError(code, "no room")
    needs = "takes 5.0 MiB of disk" if size else "takes more disk than there is"
    assert str(caught.value).startswith(f"the model {needs}, and {tmp_path} had ")
    assert " left (no room); set LOGITMILL_HOME" in str(caught.value)


def test_other_errors_are_none_of_the_disks_size(tmp_path: Path) -> None:
    with (
        scratch(tmp_path, "key", "the model", threading.Event()) as place,
        pytest.raises(PermissionError),
        place.room(1, "the model"),
    ):
        raise PermissionError(errno.EACCES, "denied")
