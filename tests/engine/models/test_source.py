"""From what --model says to a folder, and what is swept and checked on the way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelUnavailable
from engine.models.source import config_names, home, locate, read_config
from engine.models.wheels import Source
from tests.engine.models.gguf_files import write_llama


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


# -- what is here


def test_a_start_sweeps_whatever_it_is_to_serve(tmp_path: Path, own_home: Path) -> None:
    left = own_home / "scratch" / "dead"
    left.mkdir(parents=True)
    (left / "half.gguf").write_text("much")
    left.with_suffix(".lock").touch()
    model = tmp_path / "model"
    model.mkdir()
    locate(str(model)).fetch()
    assert list((own_home / "scratch").iterdir()) == []


def test_a_conversion_given_as_a_folder_is_checked(tmp_path: Path) -> None:
    kept = locate(str(write_llama(tmp_path / "m.gguf"))).fetch()
    copy = Path(shutil.copytree(kept, tmp_path / "copy"))
    for folder in (kept, copy):
        assert locate(str(folder)).fetch() == folder
        config = folder / "config.json"
        config.write_text(config.read_text().replace("10000.0", "10001.0"))
        assert refusal(locate(str(folder)).fetch) == f"{config} is not as it was written"
    # Without a manifest only the place tells that it must have one.
    for folder in (kept, copy):
        (folder / "manifest.json").write_text(json.dumps({"name": "of another tool"}))
    assert refusal(locate(str(kept)).fetch).startswith(f"{kept}/manifest.json cannot be read")
    assert locate(str(copy)).fetch() == copy


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, own_home: Path) -> None:
    own_home.write_text("a file, not a folder")
    file = write_llama(tmp_path / "m.gguf")
    source = Source(file="x.gguf", sha256="0", parts=[])
    for location in (locate(str(file)), locate("m", source)):
        message = refusal(location.fetch)
        assert message.startswith(f"cannot keep the model in {own_home} (")
        assert "LOGITMILL_HOME" in message
