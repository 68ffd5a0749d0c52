"""What this process may use of the machine: memory and processors, by whatever bounds them most.

A container sees the whole machine in /proc, and its own share in the files of its cgroup, which are
those of version 1 or 2. A cgroup is bounded by those above it, too. Where both trees begin is an
argument.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.config import shown_size
from engine.errors import ModelUnavailable

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_STACK = 8 << 20
_STACKS = 128 << 20  # of threads that compute nothing, and what malloc reserves for each
_SPACE = "`ulimit -v`"
_NO_LIMIT = 1 << 60  # version 1 writes "none" as the largest number of whole pages

_TURN_NS = 100_000
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # the system call's number, by machine

# Files of a cgroup, of either version: its limits, what it uses, and in memory.stat what of that is
# given up before anything else, the part of its page cache that nobody has asked for lately.
_MEMORY = (
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that can still be had, and what leaves no more: the subject of a sentence."""

    free: int
    bound: str

    def require(self, size: int, what: str) -> None:
        """Raise ModelUnavailable with the numbers if there are fewer bytes than that."""
        if size > self.free:
            raise ModelUnavailable(
                f"{what} takes {shown_size(size)} of memory, and {self.bound} leaves "
                f"{shown_size(self.free)}"
            )


def free_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> Room:
    """The memory that this process can still come to use."""
    rooms = [_of_machine(proc), *_of_groups(proc, cgroup)]
    # Threads to come will reserve some of what limits leave, and end the process if they cannot.
    stacks = _STACKS + _STACK * processors(proc, cgroup)
    rooms += (Room(max(room.free - stacks, 0), room.bound) for room in _of_limits(proc))
    return min(rooms, key=lambda room: room.free)


def address_space(proc: Path = _PROC) -> Room | None:
    """What `ulimit -v` leaves, where code counts, too; None: no limit."""
    return next((room for room in _of_limits(proc) if room.bound == _SPACE), None)


def processors(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """How many threads can compute at the same time; at least one.

    A quota that is no whole number counts as the one below: a thread that is held up until the next
    period holds up all others, which wait for it at the end of every operation.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    whole = [quota for group in _groups("cpu", proc, cgroup) if (quota := _quota(group))]
    return max(1, min([count or 1, *whole]))


class _Scheduling(ctypes.Structure):
    """The first version of the kernel's `struct sched_attr`."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),  # of an ordinary thread: its turn, in ns
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def take_short_turns() -> None:
    """Have this thread, and those it will start, run for shorter turns, which come sooner.

    Threads that wait for each other get their fair share beside busy processes only if whoever is
    waited for need not wait for whole turns of others. Linux listens from 6.12 on (EEVDF's slices).
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or not hasattr(os, "sched_getscheduler"):
        return
    if os.sched_getscheduler(0) == os.SCHED_OTHER:
        wanted = _Scheduling(
            size=ctypes.sizeof(_Scheduling),
            policy=os.SCHED_OTHER,
            nice=os.getpriority(os.PRIO_PROCESS, 0),
            runtime=_TURN_NS,
        )
        # Where it is not allowed, everything works all the same.
        ctypes.CDLL(None).syscall(number, 0, ctypes.byref(wanted), 0)


def _of_machine(proc: Path) -> Room:
    bound = "the machine's memory"
    try:
        fields = dict(line.split(":", 1) for line in _lines(proc / "meminfo"))
        return Room(int(fields["MemAvailable"].split()[0]) * 1024, bound)
    except (OSError, ValueError, LookupError):  # not on Linux
        return Room(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), bound)


def _of_groups(proc: Path, cgroup: Path) -> Iterator[Room]:
    for group in _groups("memory", proc, cgroup):
        for names, usage, reclaimable in _MEMORY:
            limits = [limit for name in names if (limit := _number(group / name)) is not None]
            used = _number(group / usage)
            if used is not None and min(limits, default=_NO_LIMIT) < _NO_LIMIT:
                free = min(limits) - used + _statistic(group, reclaimable)
                yield Room(max(free, 0), f"the memory limit of cgroup {group}")


def _of_limits(proc: Path) -> Iterator[Room]:
    """What the limits of a process leave, which are reached by reserving memory, used or not."""
    try:
        pages = [int(number) for number in _text(proc / "self/statm").split()]
        soft = {line[:26].strip(): line[26:].split()[0] for line in _lines(proc / "self/limits")}
        for name, used, bound in (
            ("Max address space", pages[0], _SPACE),
            ("Max data size", pages[5], "`ulimit -d`"),
        ):
            if soft[name] != "unlimited":
                free = int(soft[name]) - used * os.sysconf("SC_PAGE_SIZE")
                yield Room(max(free, 0), bound)
    except (OSError, ValueError, LookupError):  # not on Linux
        return


def _groups(controller: str, proc: Path, cgroup: Path) -> Iterator[Path]:
    """The cgroups that this process is in, as far as they can be seen, each before its parent."""
    for mount, path in _mounts(controller, proc, cgroup):
        group = mount / path.lstrip("/")
        # A container may be told its path on the machine, of which it sees only the end, as root.
        if ".." in group.parts or not group.is_dir():
            group = mount
        if mount.is_dir():
            yield group
            yield from (parent for parent in group.parents if parent.is_relative_to(mount))


def _mounts(controller: str, proc: Path, cgroup: Path) -> Iterator[tuple[Path, str]]:
    """Where groups with this controller may be mounted, and the process's path there."""
    try:
        lines = _lines(proc / "self/cgroup")
    except OSError:
        lines = ["0::/", f"1:{controller}:/"]
    for line in lines:
        _, names, path = line.split(":", 2)
        if not names:  # version 2, which has a folder of its own where version 1 is mounted, too
            yield from ((cgroup, path), (cgroup / "unified", path))
        elif controller in names.split(","):
            mount = cgroup / controller
            yield mount if mount.is_dir() else cgroup / names, path


def _quota(group: Path) -> int | None:
    """The processors a group may keep busy, in whole ones but at least one; None: no limit."""
    try:
        if (group / "cpu.max").exists():  # version 2
            quota, period = _text(group / "cpu.max").split()
        else:
            quota, period = (_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        return max(1, int(quota) // int(period)) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no such file
        return None


def _number(file: Path) -> int | None:
    """What a file of a cgroup holds; None where there is none, or "max"."""
    try:
        return int(_text(file))
    except (OSError, ValueError):
        return None


def _statistic(group: Path, name: str) -> int:
    try:
        return int(dict(line.split() for line in _lines(group / "memory.stat"))[name])
    except (OSError, ValueError, LookupError):
        return 0


def _lines(file: Path) -> list[str]:
    return _text(file).splitlines()


def _text(file: Path) -> str:
    return file.read_text().strip()
