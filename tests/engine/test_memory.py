"""What is asked of the system's memory, and of the garbage collector."""

import gc
from collections.abc import Iterator

import pytest

from engine import memory


@pytest.fixture
def collector() -> Iterator[None]:
    """Leaves the collector as it was."""
    before = gc.callbacks.copy()
    yield
    gc.callbacks[:] = before
    gc.unfreeze()


@pytest.mark.usefixtures("collector")
def test_what_takes_a_collection_long_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.keep_collections_short()
    memory.keep_collections_short()
    assert gc.callbacks.count(memory._on_collection) == 1
    at_first = gc.get_freeze_count()
    few: list[list[int]] = [[] for _ in range(1000)]
    monkeypatch.setattr(memory, "_LONG_S", 1e6)
    gc.collect()
    assert gc.get_freeze_count() <= at_first
    monkeypatch.setattr(memory, "_LONG_S", 0.0)
    gc.collect()
    assert gc.get_freeze_count() >= at_first + len(few)
    assert not any(one is few for one in gc.get_objects())
    gc.collect(1)  # a young generation is never what takes long
    frozen = gc.get_freeze_count()
    del few
    assert gc.get_freeze_count() < frozen - 900  # what is spared is freed all the same
