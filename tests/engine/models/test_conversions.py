"""Conversions in the cache: keyed by content, checked at every load, made again where they must."""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers

from engine.errors import ModelUnavailable
from engine.models import conversions
from engine.models.manifest import FILE
from tests.engine.models import gguf_files
from tests.engine.models.gguf_files import Kind, converted
from tests.support.engines import request, run, tiny_core

NAMES = (
    *("config.json", "generation_config.json", "groups.safetensors", "model-00000.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def write_quantised(path: Path, **more: Any) -> Path:
    """A tiny Llama whose matrices are in groups of 4 bits."""
    hf = transformers.LlamaForCausalLM(gguf_files.CONFIGS["llama"]())
    tensors: dict[str, Any] = {}
    kinds = {}
    for name, weight in gguf_files.tensors_of("llama", hf).items():
        kinds[name] = Kind.F32 if weight.ndim == 1 else Kind.Q4_1
        tensors[name] = weight if weight.ndim == 1 else gguf.quantize(weight, Kind.Q4_1)
    metadata = gguf_files.metadata_of("llama", hf.config) | gguf_files.tokenizer_metadata() | more
    return gguf_files.write(path, "llama", metadata, tensors, kinds)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_quantised(tmp_path / "m.gguf")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was converted, for real."""
    names: list[str] = []
    convert = conversions._converted

    def counting(original: conversions.Original, *rest: Any) -> Path:
        names.append(original.name)
        return convert(original, *rest)

    monkeypatch.setattr(conversions, "_converted", counting)
    return names


def kept(home: Path) -> list[Path]:
    return sorted((home / "converted").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- by content


def test_the_same_content_is_converted_once_wherever_it_is(
    file: Path, home: Path, tmp_path: Path, made: list[str]
) -> None:
    folder = converted(file, home)
    assert folder == home / "converted" / folder.name
    assert converted(file, home) == folder
    os.utime(file, (1, 1))  # touched
    assert converted(file, home) == folder
    moved = file.rename(tmp_path / "another-name.gguf")
    assert converted(moved, home) == folder
    assert converted(Path(shutil.copy(moved, tmp_path / "copy.gguf")), home) == folder
    assert made == ["m"]
    assert kept(home) == [folder]


def test_other_content_of_the_same_size_and_time_is_found_out(
    file: Path, home: Path, made: list[str]
) -> None:
    before, stat = converted(file, home), file.stat()
    content = file.read_bytes()
    context = b"llama.context_length" + (4).to_bytes(4, "little")  # and its type
    at = content.index(context) + len(context)
    file.write_bytes(content[:at] + (128).to_bytes(4, "little") + content[at + 4 :])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)

    after = converted(file, home)

    assert json.loads((after / "config.json").read_text())["max_position_embeddings"] == 128
    assert made == ["m", "m"]
    assert not before.exists()  # what the path held before is of no use any more
    assert kept(home) == [after]


def test_files_of_the_same_name_do_not_share_a_conversion(home: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name / "m.gguf" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        write_quantised(path)
    assert len({converted(path, home) for path in paths}) == 2
    assert len(kept(home)) == 2


def test_what_cannot_be_checked_is_not_kept_beside_what_can(file: Path, home: Path) -> None:
    old = home / "converted" / "m-0123456789ab"  # as it was before there were manifests
    others = home / "converted" / "another-0123456789ab"
    for folder in (old, others):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    folder = converted(file, home)
    assert kept(home) == [others, folder]


# -- checked


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(min(4096, path.stat().st_size // 3)))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("name", [*NAMES, FILE])
@pytest.mark.parametrize("spoil", [flipped, overwritten, cut, emptied, Path.unlink])
def test_an_altered_file_is_found_and_made_again_with_one_line(
    file: Path,
    home: Path,
    name: str,
    spoil: Callable[[Path], None],
    made: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = converted(file, home)
    before = contents(folder)
    assert sorted(before) == sorted([*NAMES, FILE])
    spoil(folder / name)

    assert converted(file, home) == folder

    assert contents(folder) == before
    assert made == ["m", "m"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    # A digest that was altered blames the file it is of.
    assert message.startswith(f"{folder}/" if name == FILE else f"{folder / name} ")
    assert message.endswith("; converting m again")
    assert kept(home) == [folder]
    assert list((home / "scratch").iterdir()) == []


def test_one_digit_of_the_angles_base_does_not_go_unnoticed(file: Path, home: Path) -> None:
    folder = converted(file, home)
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
    assert config.read_text() != text
    converted(file, home)
    assert config.read_text() == text


def test_a_file_nobody_wrote_does_not_go_unnoticed(file: Path, home: Path) -> None:
    folder = converted(file, home)
    (folder / "chat_template.jinja").write_text("{{ 'something else' }}")
    converted(file, home)
    assert not (folder / "chat_template.jinja").exists()


def test_a_conversion_that_cannot_be_made_again_is_refused_and_left(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted(file, home)
    flipped(folder / "config.json")
    before = contents(folder)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.models.tensor_file.np.ascontiguousarray", fail)
    with pytest.raises(ModelUnavailable, match=r"takes \d.* of disk, and .* had .* left"):
        converted(file, home)
    assert contents(folder) == before
    assert list((home / "scratch").iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_refused(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def late(source: Path, target: Path) -> None:
        copy(source, target)
        flipped(target)

    monkeypatch.setattr(shutil, "copyfile", late)
    with pytest.raises(ModelUnavailable, match=f"{file} changed while it was read"):
        converted(file, home)
    assert not (home / "converted").exists()


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"gone\.gguf cannot be read: No such file"):
        conversions.of_file(tmp_path / "gone.gguf")


def test_a_conversion_answers_as_before_when_it_was_made_again(file: Path, home: Path) -> None:
    def answer() -> list[int]:
        core, _ = tiny_core(converted(file, home), dtype="auto")
        return run(core, request(core, [5, 6, 7], ignore_eos=True)).ids()

    before = answer()
    for name in ("groups.safetensors", "model-00000.safetensors"):
        overwritten(next(home.rglob(name)))
        assert answer() == before


# -- alone and together


def test_of_those_who_need_the_same_one_makes_it(file: Path, home: Path, made: list[str]) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(converted(file, home))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert made == ["m"]
    assert list((home / "scratch").iterdir()) == []


def test_whoever_is_told_to_stop_leaves_nothing(file: Path, home: Path) -> None:
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(ModelUnavailable, match="the start was interrupted"):
        conversions.fetch(conversions.of_file(file), home, stopping)
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_nothing_of_a_converted_file_stays_mapped(file: Path, home: Path) -> None:
    converted(file, home)
    maps = Path("/proc/self/maps").read_text()
    assert str(home) not in maps
    assert str(file) not in maps


# -- memory


def test_a_vocabulary_too_large_for_the_memory_is_refused_before_it_is_read(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = conversions.free_memory
    monkeypatch.setattr(conversions, "_TOKEN_BYTES", 1 << 45)
    with pytest.raises(ModelUnavailable) as caught:
        converted(file, home)
    assert str(caught.value).startswith("reading m.gguf takes 4096.0 TiB of memory, and ")
    assert room().bound in str(caught.value)
