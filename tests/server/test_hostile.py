"""What one client asks for does not stop the others: the attack list against a real process.

The bounds are generous, for a machine that has other things to do: what held the server up took
seconds to minutes. `benchmarks.hostile` measures it.
"""

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import serve
from benchmarks.hostile import ATTACKS, Seen, Target, attacked, children, resident
from tests.support import tiny
from tests.support.servers import eventually

pytestmark = pytest.mark.slow

TARGET = Target(vocab_size=49152, context_len=8192, num_layers=6)
PATIENCE_S = 1.5
LATE_S = 2.0
GROWTH_BYTES = 128 << 20  # by which what the allocator keeps goes up and down


@dataclass(frozen=True)
class Attacked:
    url: str
    rounds: list[list[Seen]]
    resident: list[int]  # bytes, after each round


@pytest.fixture(scope="module")
def result(real_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    """Two rounds of all attacks on a small model with a real vocabulary and context."""
    folder = tmp_path_factory.mktemp("hostile")
    model = tiny.hf_model(
        "llama",
        vocab_size=TARGET.vocab_size,
        num_hidden_layers=TARGET.num_layers,
        max_position_embeddings=TARGET.context_len,
    )
    tiny.save(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(real_folder / name, folder)
    # So small that all of the cache is in memory from the start.
    options = ["--trust-request-templates", "--kv-cache-memory", "256MiB"]
    before = set(children())
    with serve.own_server(str(folder), options) as url:
        pids = [pid for pid in children() if pid not in before]
        rounds, sizes = [], []
        for _ in range(2):
            _, found = asyncio.run(attacked(url, ATTACKS, TARGET, pids, PATIENCE_S))
            rounds.append(found)
            eventually(lambda: _is_idle(url))
            sizes.append(resident(pids))
        yield Attacked(url, rounds, sizes)


def _gauge(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    (family,) = [one for one in text_string_to_metric_families(text) if one.name == name]
    return float(family.samples[0].value)


def _is_idle(url: str) -> bool:
    return _gauge(url, "logitmill:num_requests_running") == 0


def test_every_attack_is_answered_or_left(result: Attacked) -> None:
    for seen in [seen for found in result.rounds for seen in found]:
        # 1: its client has left, by then
        assert set(seen.statuses) <= {1, 200, 400, 413}, seen.name
        assert seen.statuses, seen.name


def test_others_go_on_meanwhile(result: Attacked) -> None:
    late = {
        seen.name: (seen.longest_gap, seen.live)
        for found in result.rounds
        for seen in found
        if max(seen.longest_gap, seen.live) > LATE_S
    }
    assert late == {}


def test_the_second_round_takes_no_more_memory(result: Attacked) -> None:
    first, second = result.resident
    assert second < first + GROWTH_BYTES


def test_nothing_is_lost(result: Attacked) -> None:
    assert httpx.get(f"{result.url}/health", trust_env=False).status_code == 200
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert _gauge(result.url, f"logitmill:{name}") == 0
