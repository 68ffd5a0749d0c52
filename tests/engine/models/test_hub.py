"""Snapshots of the hub: found, downloaded, and checked against what its files are named by."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from engine.errors import ModelUnavailable
from engine.models.source import locate

ADVICE = "give a local folder or .gguf file to --model instead"


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    return message


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


# -- what is in the cache


CONTENTS = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights" * 999}


def blob_name(name: str, content: bytes) -> str:
    """The hub names large files by their SHA-256, others as git does."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A model as `huggingface_hub` keeps it: links to files named by their content."""
    folder = tmp_path / "models--owner--model" / "snapshots" / "abc"
    blobs = folder.parent.parent / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for name, content in CONTENTS.items():
        blob = blobs / blob_name(name, content)
        blob.write_bytes(content)
        (folder / name).symlink_to(Path("../../blobs") / blob.name)
    (folder / "added_by_the_user.json").write_text("{}")
    return folder


class Downloads:
    """Stands in for `hf_hub_download`."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content
        self.calls: list[tuple[str, str, str, bool]] = []

    def __call__(self, name: str, file: str, *, revision: str, force_download: bool) -> str:
        self.calls.append((name, file, revision, force_download))
        if self.content is None:
            raise OSError("no route to host\nRetry later")
        self.link.resolve().write_bytes(self.content)
        return str(self.link)

    link: Path


def spoilt(
    snapshot: Path, name: str, downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A link whose file is no more what it was, where `downloads` bring another one."""
    downloads.link = snapshot / name
    content = bytearray(downloads.link.read_bytes())
    content[10] ^= 1
    downloads.link.resolve().write_bytes(content)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(snapshot, cached=True))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", downloads)
    return downloads.link


def test_a_whole_snapshot_is_taken_as_it_is(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(snapshot, cached=True))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert locate("owner/model").fetch() == snapshot


@pytest.mark.parametrize("name", list(CONTENTS))
def test_an_altered_file_is_downloaded_again(
    snapshot: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    downloads = Downloads(CONTENTS[name])
    link = spoilt(snapshot, name, downloads, monkeypatch)
    assert locate("owner/model@main").fetch() == snapshot
    assert downloads.calls == [("owner/model", name, "abc", True)]
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (
        logging.WARNING,
        f"{link} is not as it was downloaded; downloading it again",
    )


def test_an_altered_file_that_cannot_be_had_again_is_refused(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = spoilt(snapshot, "model.safetensors", Downloads(None), monkeypatch)
    assert refusal(locate("owner/model").fetch) == (
        f"{link} is not as it was downloaded, and cannot be downloaded again "
        "(OSError: no route to host)"
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", downloads := Downloads(b"other"))
    downloads.link = link
    assert refusal(locate("owner/model").fetch) == (
        f"{link} is not what the Hugging Face hub names it by"
    )
    link.resolve().unlink()
    downloads.content = CONTENTS["model.safetensors"]
    assert locate("owner/model").fetch() == snapshot
