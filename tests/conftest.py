"""Fixtures that tests of every kind share."""

import os
import sys
from pathlib import Path

import pytest
import torch

from engine.models.source import locate, read_config
from engine.models.wheels import Source
from engine.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.engines import tiny_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# For `benchmarks`, which is not installed; last, so that what is installed is what is tested.
sys.path.append(str(Path(__file__).parent.parent))

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_CORES = max(1, torch.get_num_threads() // _WORKERS)  # for this process


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread for tiny tensors: more of them wait for each other, and for other processes."""
    torch.set_num_threads(1 if item.get_closest_marker("slow") is None else _CORES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what makes cgroups, unless it is named.

    An `-m` among the options in pyproject.toml would be replaced by one on the command line.
    """
    if "cgroup" not in config.option.markexpr:
        needs = {item: item.get_closest_marker("cgroup") is not None for item in items}
        config.hook.pytest_deselected(items=[item for item in items if needs[item]])
        items[:] = [item for item in items if not needs[item]]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny models' tokenizer."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama as a Hugging Face folder."""
    return tiny.save(tiny.hf_model("llama"), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """The default model, SmolLM2-135M-Instruct, as a folder; fetched the first time."""
    return _named("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma_folder() -> Path:
    """Gemma 3 270M, fetched the first time."""
    return _named("gemma-3-270m")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def _named(name: str) -> Path:
    config = read_config(name)
    assert config is not None
    return locate(name, Source.model_validate(config["source"])).fetch()
