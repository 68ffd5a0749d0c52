"""Streams that are watched alone and beside long prompts."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine.core import EngineCore
from engine.prepare import ModelInfo
from tests.support.engines import tiny_core
from tests.support.servers import live_server, make_app

ROOT = Path(__file__).parent.parent.parent


def slow_core(folder: Path) -> tuple[EngineCore, ModelInfo]:
    """So slow that streams last for a second or more."""
    core, info = tiny_core(folder)
    step = core.step

    def slowed() -> Any:
        time.sleep(0.005)
        return step()

    core.step = slowed
    return core, info


def steady(url: str, output_tokens: int) -> "subprocess.CompletedProcess[str]":
    lengths = ("--prompt-tokens", "4", "--long-prompt", "40", "--prompts", "1", "--text")
    lengths += ("--short-prompt", "2")
    watched = ("--clients", "2", "--seconds", "0.3", "--output-tokens", str(output_tokens))
    command = [sys.executable, "-m", "benchmarks.steady", "--url", url, *lengths, *watched]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_what_is_seen_alone_and_beside_a_long_prompt(tiny_folder: Path) -> None:
    with live_server(make_app(lambda: slow_core(tiny_folder))) as url:
        done, ended, refused = (steady(url, tokens) for tokens in (240, 5, 400))

    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout.splitlines()[-1])["2"]
    assert list(found) == ["alone", "long prompts"]
    for one in found.values():
        assert one["tokens"] > 0
        assert 0.0 < one["gap_ms"]["p50"] <= one["gap_ms"]["max"]
        assert 0.0 < one["live_ms"]["p50"] <= one["live_ms"]["max"]
    assert found["alone"]["short_ttft_ms"]["p50"] > 0.0
    lag = found["alone"]["lag_ms"]  # the other time is too short for a timer
    assert 0.0 < lag["p99"] <= lag["max"]
    assert (ended.returncode, refused.returncode) == (1, 1)
    assert "a stream ended too early: ask for more --output-tokens" in ended.stderr
    assert refused.stderr.startswith(f"{url}/v1/completions: 400: ")
