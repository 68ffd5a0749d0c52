"""What the process may use: trees as the system lays them out, real limits, real cgroups."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.machine import Room, address_space, free_memory, processors

MIB = 1 << 20
NONE_V1 = "9223372036854771712"  # what version 1 says where there is no limit
PAGE = os.sysconf("SC_PAGE_SIZE")
MACHINE = "the machine's memory"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc of a machine with 8000 MiB to spare, of which the process has reserved 100."""
    folder = tmp_path / "proc"
    lay(
        folder,
        {
            "meminfo": f"MemTotal: 16000 kB\nMemAvailable:  {8000 * 1024} kB\n",
            "self/statm": f"{100 * MIB // PAGE} 9 9 9 0 {40 * MIB // PAGE} 0\n",
            "self/limits": limits(),
        },
    )
    return folder


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    folder = tmp_path / "cgroup"
    folder.mkdir()
    return folder


def limits(space: int | str = "unlimited", data: int | str = "unlimited") -> str:
    rows = [
        ("Limit", "Soft Limit", "Hard Limit", "Units"),
        ("Max data size", data, "unlimited", "bytes"),
        ("Max address space", space, "unlimited", "bytes"),
    ]
    return "".join(f"{row[0]:<26}{row[1]:<21}{row[2]:<21}{row[3]:<10}\n" for row in rows)


def lay(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def v1(limit: int | str, used: int = 0, inactive: int = 0) -> dict[str, str]:
    """A group's files of version 1; the numbers are MiB."""
    return {
        "memory.limit_in_bytes": f"{limit * MIB if isinstance(limit, int) else limit}\n",
        "memory.usage_in_bytes": f"{used * MIB}\n",
        "memory.stat": f"inactive_file 5\nactive_file 6\ntotal_inactive_file {inactive * MIB}\n",
    }


def v2(limit: int | str, used: int = 0, inactive: int = 0, high: str = "max") -> dict[str, str]:
    """A group's files of version 2; the numbers are MiB."""
    return {
        "memory.max": f"{limit * MIB if isinstance(limit, int) else limit}\n",
        "memory.high": f"{high}\n",
        "memory.current": f"{used * MIB}\n",
        "memory.stat": f"anon 7\ninactive_file {inactive * MIB}\nactive_file 6\n",
    }


def at(path: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{path}/{name}".lstrip("/"): content for name, content in files.items()}


# -- memory


@pytest.mark.parametrize(
    ("own", "files", "free", "bound"),
    [
        pytest.param("0::/\n", {}, 8000, "", id="nothing mounted"),
        pytest.param("0::/a/b\n", at("/a/b", v2("max")), 8000, "", id="v2 without a limit"),
        pytest.param("0::/a/b\n", at("/a/b", v2(900, 300)), 600, "/a/b", id="v2"),
        pytest.param("0::/a/b\n", at("/a/b", v2(900, 300, 200)), 800, "/a/b", id="v2 page cache"),
        pytest.param("0::/a\n", at("/a", v2(900, 300, 0, str(500 * MIB))), 200, "/a", id="v2 high"),
        pytest.param(
            "0::/a/b/c\n",
            at("/a", v2(700, 600)) | at("/a/b", v2(9000)) | at("/a/b/c", v2(500, 10)),
            100,
            "/a",
            id="v2 the outermost is the tightest",
        ),
        pytest.param(
            "0::/a/b/c\n",
            at("/a", v2(7000)) | at("/a/b", v2(500, 100)) | at("/a/b/c", v2("max", 100)),
            400,
            "/a/b",
            id="v2 the middle",
        ),
        pytest.param("0::/\n", v2(300, 100), 200, "", id="v2 a container's root"),
        pytest.param("0::/../../x\n", v2(300, 100), 200, "", id="v2 outside of the root"),
        pytest.param("0::/docker/7f\n", v2(300, 100), 200, "", id="v2 a path nobody sees"),
        pytest.param("0::/a\n", at("/a", v2(100, 300)), 0, "/a", id="v2 more than all is used"),
        pytest.param(
            "4:memory:/a/b\n0::/\n", at("memory/a/b", v1(900, 300)), 600, "memory/a/b", id="v1"
        ),
        pytest.param(
            "4:memory:/a\n", at("memory/a", v1(900, 300, 50)), 650, "memory/a", id="v1 page cache"
        ),
        pytest.param(
            "4:memory:/a/b\n",
            at("memory", v1(NONE_V1)) | at("memory/a", v1(200, 50)) | at("memory/a/b", v1(NONE_V1)),
            150,
            "memory/a",
            id="v1 nested",
        ),
        pytest.param(
            "4:memory:/docker/7f\n", at("memory", v1(300, 100)), 200, "memory", id="v1 container"
        ),
        pytest.param(
            "9:memory,hugetlb:/a\n", at("memory,hugetlb/a", v1(300)), 300, "hugetlb/a", id="v1 both"
        ),
        pytest.param(
            "4:memory:/a\n0::/s\n",
            at("memory/a", v1(300, 100)) | at("unified/s", {"cgroup.controllers": ""}),
            200,
            "memory/a",
            id="hybrid with memory in v1",
        ),
        pytest.param(
            "4:cpu:/a\n0::/s\n",
            at("unified/s", v2(300, 100)) | at("cpu/a", {"cpu.shares": "1024"}),
            200,
            "unified/s",
            id="hybrid with memory in v2",
        ),
        # A group of version 2 may be called as a controller is.
        pytest.param("0::/a\n", at("/memory", v2(5)) | at("/a", v2(300)), 300, "/a", id="v2 name"),
        pytest.param(None, v2(300, 100), 200, "", id="v2 without a list of groups"),
        pytest.param(None, at("memory", v1(300, 100)), 200, "memory", id="v1 without a list"),
        pytest.param("0::/a\n", at("/a", {"memory.max": "5"}), 8000, "", id="no usage"),
        pytest.param("0::/a\n", at("/a", v2("a few")), 8000, "", id="nonsense"),
    ],
)
def test_free_memory_is_the_least_that_any_level_leaves(
    proc: Path, cgroup: Path, own: str | None, files: dict[str, str], free: int, bound: str
) -> None:
    lay(cgroup, files)
    if own is not None:
        lay(proc, {"self/cgroup": own})
    room = free_memory(proc, cgroup)
    assert room.free == free * MIB
    if free == 8000:
        assert room.bound == MACHINE
    else:
        assert room.bound.startswith("the memory limit of cgroup ")
        assert room.bound.endswith(bound or str(cgroup))


def test_the_limits_of_the_process_count_what_it_has_reserved(proc: Path, cgroup: Path) -> None:
    assert address_space(proc) is None
    lay(proc, {"self/limits": limits(space=700 * MIB)})
    stacks = (128 + 8 * processors(proc, cgroup)) * MIB  # of threads to come
    assert address_space(proc) == Room(600 * MIB, "`ulimit -v`")
    assert free_memory(proc, cgroup) == Room(600 * MIB - stacks, "`ulimit -v`")
    lay(proc, {"self/limits": limits(space=700 * MIB, data=600 * MIB)})
    assert free_memory(proc, cgroup) == Room(560 * MIB - stacks, "`ulimit -d`")
    lay(proc, {"self/limits": limits(space=50 * MIB)})
    assert free_memory(proc, cgroup) == Room(0, "`ulimit -v`")
    lay(proc, {"self/limits": limits(space=100_000 * MIB)})
    assert free_memory(proc, cgroup) == Room(8000 * MIB, MACHINE)


def test_where_there_is_no_proc_the_system_is_asked(tmp_path: Path) -> None:
    room = free_memory(tmp_path / "nowhere", tmp_path / "nothing")
    assert room.bound == MACHINE
    assert room.free > 0


_PRINT = "from engine.machine import *; print(free_memory()); print(processors())"


def told(command: str) -> list[str]:
    """What a process says of itself that a shell has prepared."""
    script = f'{command} && exec "$0" -c "$1"'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, _PRINT],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_a_real_limit_is_read() -> None:
    room, _ = told(f"ulimit -v {600 * 1024}")
    assert room.endswith("bound='`ulimit -v`')")
    assert 400 * MIB < eval(room, {"Room": Room}).free < 600 * MIB


# -- processors


def quota(version: int, quota_us: int | str, period_us: int = 100_000) -> dict[str, str]:
    if version == 2:
        return {"cpu.max": f"{quota_us} {period_us}\n"}
    return {"cpu.cfs_quota_us": f"{quota_us}\n", "cpu.cfs_period_us": f"{period_us}\n"}


@pytest.mark.parametrize(
    ("own", "files", "count"),
    [
        pytest.param("0::/a\n", {}, 64, id="nothing mounted"),
        pytest.param("0::/a\n", at("/a", quota(2, "max")), 64, id="v2 without a quota"),
        pytest.param("0::/a\n", at("/a", quota(2, 200_000)), 2, id="v2"),
        pytest.param("0::/a\n", at("/a", quota(2, 50_000, 10_000)), 5, id="v2 another period"),
        pytest.param("0::/a\n", at("/a", quota(2, 290_000)), 2, id="v2 two processors and a bit"),
        pytest.param("0::/a\n", at("/a", quota(2, 30_000)), 1, id="v2 a third of one"),
        pytest.param("0::/a\n", at("/a", quota(2, 9_900_000)), 64, id="v2 more than there are"),
        pytest.param(
            "0::/a/b\n",
            at("/a", quota(2, 300_000)) | at("/a/b", quota(2, 900_000)),
            3,
            id="v2 nested",
        ),
        pytest.param("0::/docker/7f\n", quota(2, 400_000), 4, id="v2 a container's root"),
        pytest.param("2:cpu:/a\n", at("cpu/a", quota(1, 200_000)), 2, id="v1"),
        pytest.param("2:cpu:/a\n", at("cpu/a", quota(1, -1)), 64, id="v1 without a quota"),
        pytest.param("2:cpu:/a\n", at("cpu", quota(1, 300_000)), 3, id="v1 container"),
        pytest.param("2:cpu,cpuacct:/a\n", at("cpu,cpuacct/a", quota(1, 500_000)), 5, id="v1 both"),
        pytest.param(
            "2:cpu:/a/b\n0::/\n",
            at("cpu/a", quota(1, 150_000)) | at("cpu/a/b", quota(1, -1)),
            1,
            id="v1 nested",
        ),
        pytest.param("0::/a\n", at("/a", quota(2, "many")), 64, id="nonsense"),
        pytest.param("0::/a\n", at("/a", quota(2, 100_000, 0)), 64, id="no period"),
    ],
)
def test_processors_are_those_of_the_tightest_quota(
    proc: Path,
    cgroup: Path,
    own: str,
    files: dict[str, str],
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    lay(cgroup, files)
    lay(proc, {"self/cgroup": own})
    assert processors(proc, cgroup) == count


def test_no_more_processors_than_the_process_may_run_on() -> None:
    assert told("taskset -p -c 0 $$ > /dev/null")[1] == "1"


# -- real cgroups


@pytest.fixture
def real_cgroups() -> Iterator[dict[str, Path]]:
    """A cgroup of version 1 by each controller, with a limit, and one below it, without."""
    outer = {
        name: Path("/sys/fs/cgroup") / name / f"logitmill-test-{os.getpid()}"
        for name in ("memory", "cpu")
    }
    groups = {name: path / "inner" for name, path in outer.items()}
    try:
        for group in groups.values():
            group.mkdir(parents=True)
        yield groups
    finally:
        for name in outer:
            groups[name].rmdir()
            outer[name].rmdir()


@pytest.mark.cgroup
def test_real_cgroups_are_read(real_cgroups: dict[str, Path]) -> None:
    (real_cgroups["memory"].parent / "memory.limit_in_bytes").write_text(str(600 * MIB))
    (real_cgroups["cpu"].parent / "cpu.cfs_quota_us").write_text("100000")
    joined = " && ".join(f"echo $$ > {group}/cgroup.procs" for group in real_cgroups.values())
    room, count = told(joined)
    assert room.endswith(f"cgroup {real_cgroups['memory'].parent}')")
    assert 400 * MIB < eval(room, {"Room": Room}).free < 600 * MIB
    assert count == "1"


# -- turns


READ_TURNS = """
import ctypes, os, platform, threading
from engine.machine import _SCHED_SETATTR, _Scheduling, take_short_turns

def reads():
    own = _Scheduling()
    number = _SCHED_SETATTR[platform.machine()] + 1
    assert not ctypes.CDLL(None).syscall(number, 0, ctypes.byref(own), ctypes.sizeof(own), 0)
    return own.policy, own.nice, own.runtime

os.nice(3)
before = reads()
take_short_turns()
after = reads()
child = []
thread = threading.Thread(target=lambda: child.append(reads()))
thread.start()
thread.join()
print(before, after, child[0], sep=";")
"""


def test_turns_are_shorter_and_nothing_else_changes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ_TURNS], capture_output=True, text=True, check=True
    )
    before, after, child = (ast.literal_eval(each) for each in done.stdout.split(";"))
    assert after[:2] == before[:2]
    assert child == after
    assert after[2] == (100_000 if before[2] else 0)  # 0: this Linux knows no turns of one's own
