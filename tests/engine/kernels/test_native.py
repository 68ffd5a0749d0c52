"""Loading the compiled kernels, or doing without."""

import importlib.util
import logging
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from engine.kernels import native


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the compiled library is looked for; nothing is there."""
    monkeypatch.delenv("LOGITMILL_KERNELS", raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    return tmp_path / f"_cpu{EXTENSION_SUFFIXES[0]}"


@pytest.mark.usefixtures("library")
def test_without_a_compiled_library_there_are_no_kernels() -> None:
    assert native._load() is None


@pytest.mark.parametrize("kind", ["nonsense", "of something else"])
def test_a_library_that_cannot_be_used_is_a_warning(
    kind: str, library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = importlib.util.find_spec("safetensors._safetensors_rust")
    assert other is not None
    assert other.origin is not None
    content = b"no library" if kind == "nonsense" else Path(other.origin).read_bytes()
    library.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert native._load() is None
    assert "the CPU kernels cannot be loaded" in caplog.text


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITMILL_KERNELS", "off")
    assert native._load() is None
