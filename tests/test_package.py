"""What is packed: every package, every header, and nothing that a compiler must be there for."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.test_docker import copy_context

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = ("configs", "engine", "server")


def test_every_package_is_listed() -> None:
    found = {
        file.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for name in SHIPPED
        for file in ROOT.glob(f"{name}/**/__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_source_of_the_kernels_is_listed() -> None:
    (kernels,) = PROJECT["tool"]["setuptools"]["ext-modules"]
    found = {
        file.relative_to(ROOT).as_posix()
        for kind in ("cpp", "h")
        for file in ROOT.glob(f"engine/kernels/*.{kind}")
    }
    assert {*kernels["sources"], *kernels["depends"]} == found


@pytest.mark.slow
def test_without_a_compiler_it_is_packed_without_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_context(tmp_path / "src")
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "/bin/false")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]

    subprocess.run([*command, str(tmp_path), str(tmp_path / "src")], check=True)

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if "/_cpu." in name]
    assert {f"configs/{file.name}" for file in ROOT.glob("configs/*.toml")} <= set(names)
    assert "engine/kernels/native.py" in names
