"""Digests of a folder's files: what differs from them is named, whatever it is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import ModelUnavailable
from engine.models import manifest
from engine.models.manifest import FILE, Manifest, digests

CONTENTS = {"empty": b"", "small.json": b'{"rope_theta": 10000.0}', "large": bytes(range(256)) * 64}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many segments and buffers as gigabytes would have."""
    monkeypatch.setattr(manifest, "_SEGMENT", 4096)
    monkeypatch.setattr(manifest, "_BUFFER", 1024)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    for name, content in CONTENTS.items():
        (path / name).write_bytes(content)
    Manifest.of(path, version=1, content="x", path=None).write(path)
    return path


def refusal(folder: Path) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        Manifest.read(folder).check(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_as_it_was_written_passes(folder: Path) -> None:
    Manifest.read(folder).check(folder)
    (folder / ".hidden").write_text("file systems leave such files")
    Manifest.read(folder).check(folder)


@pytest.mark.parametrize("at", [0, 1023, 1024, 4095, 4096, 8192, 16383])
def test_any_changed_byte_is_found(folder: Path, at: int) -> None:
    content = bytearray(CONTENTS["large"])
    content[at] ^= 1
    (folder / "large").write_bytes(content)
    assert refusal(folder) == f"{folder}/large is not as it was written"


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 16383])
def test_a_file_cut_short_is_found_wherever_the_cut_is(folder: Path, length: int) -> None:
    (folder / "large").write_bytes(CONTENTS["large"][:length])
    assert refusal(folder) == f"{folder}/large is not as it was written"


def test_segments_that_changed_places_are_found(folder: Path) -> None:
    content = bytearray(CONTENTS["large"])
    content[:4096] = b"a" * 4096
    (folder / "large").write_bytes(content)
    Manifest.of(folder, version=1, content="x", path=None).write(folder)
    content[:8192] = content[4096:8192] + content[:4096]
    (folder / "large").write_bytes(content)
    assert refusal(folder) == f"{folder}/large is not as it was written"


def test_missing_files_and_strange_ones_are_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ 'another' }}")
    assert refusal(folder) == f"{folder}/chat_template.jinja was not there when it was made"
    (folder / "chat_template.jinja").unlink()
    (folder / "empty").unlink()
    assert refusal(folder) == f"{folder}/empty is missing"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-3]),
        lambda file: file.write_bytes(b"\xff" + file.read_bytes()),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text('{"version": "one", "content": "x", "path": null}'),
        lambda file: file.write_text("[" * 100_000),
    ],
)
def test_a_broken_manifest_is_no_manifest(folder: Path, spoil: Callable[[Path], object]) -> None:
    spoil(folder / FILE)
    assert refusal(folder).startswith(f"{folder / FILE} cannot be read: ")


def test_digests_are_by_content_alone(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path, content in zip(paths, (b"x" * 5000, b"x" * 5000, b"x" * 5001), strict=True):
        path.write_bytes(content)
    first, second, third = digests(paths)
    assert first == second != third
    assert digests([paths[2], paths[0]]) == [third, first]
    assert digests([]) == []
