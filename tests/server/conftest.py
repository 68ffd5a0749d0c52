"""A server with a tiny model for each module, and clients of it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from tests.support.engines import tiny_core
from tests.support.servers import live_server, make_app


@pytest.fixture(scope="module")
def app(tiny_folder: Path) -> FastAPI:
    """The application around a tiny random Llama."""
    return make_app(lambda: tiny_core(tiny_folder))


@pytest.fixture(scope="module")
def url(app: FastAPI) -> Iterator[str]:
    """Where the application listens."""
    with live_server(app) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        yield client
