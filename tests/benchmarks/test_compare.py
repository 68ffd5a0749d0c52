"""Servers side by side: who is asked what and when, and what is made of the answers."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.support.engines import tiny_core
from tests.support.servers import live_server, make_app

ROOT = Path(__file__).parent.parent.parent
WARM_UP = 2  # requests: one for each of the most clients


def compare(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.compare", *arguments]
    lengths = ("--prompt-tokens", "16", "--output-tokens", "4", "--clients", "1", "2")
    return subprocess.run([*command, *lengths], cwd=ROOT, capture_output=True, text=True)


def compared(*arguments: str) -> tuple[list[str], dict[str, Any]]:
    """The table's lines without its head, and the report."""
    done = compare(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    _, *table, report = done.stdout.splitlines()
    return table, json.loads(report)


@contextmanager
def stand_in(name: str, log: list[tuple[str, Any]], usage: dict[str, int] | None) -> Iterator[str]:
    """A server that answers three chunks, and logs what it was asked under its name."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, json.dumps({"data": [{"id": f"{name}'s"}]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            log.append((name, body))
            if "unknown" in body:
                self._answer(400, "what is unknown?")
                return
            if "empty" in body:
                self._answer(200, "data: [DONE]\n\n")
                return
            chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "text": "x"}]}] * 3
            chunks = chunks if usage is None else [*chunks, {"choices": [], "usage": usage}]
            lines = [*map(json.dumps, chunks), "[DONE]"]
            self._answer(200, "".join(f"data: {line}\n\n" for line in lines))

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_servers_take_turns_with_the_same_prompts() -> None:
    log: list[tuple[str, Any]] = []
    with stand_in("a", log, None) as a, stand_in("b", log, None) as b:
        arguments = ["--rounds", "3", "--requests", "2", "--params", '{"top_p": 1, "min_p": null}']
        arguments += ["--params-for", 'b={"top_p": 0.5, "ignore_eos": null}']
        compared(f"a={a}", f"b={b}", *arguments)

    names = "".join(name for name, _ in log[2 * WARM_UP :])
    assert names == "aabbbbaaaabb" * 2
    bodies = {name: [body for other, body in log[2 * WARM_UP :] if other == name] for name in "ab"}
    prompts = [tuple(body.pop("prompt")) for body in bodies["a"]]
    assert len(set(prompts)) == len(prompts)
    # Clients of one round are not in order.
    assert set(prompts) == {tuple(body.pop("prompt")) for body in bodies["b"]}
    assert {len(prompt) for prompt in prompts} == {16}
    fixed = {"max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    assert bodies["a"] == [fixed | {"model": "a's", "ignore_eos": True, "top_p": 1}] * len(prompts)
    assert bodies["b"] == [fixed | {"model": "b's", "top_p": 0.5}] * len(prompts)


def test_a_server_named_twice_never_gets_a_prompt_again() -> None:
    log: list[tuple[str, Any]] = []
    with stand_in("a", log, None) as a:
        compared(f"a={a}", f"again={a}", "--rounds", "2", "--requests", "2")

    assert len({tuple(body["prompt"]) for _, body in log}) == len(log) == 2 * WARM_UP + 2 * 2 * 4


def test_a_list_of_parameters_is_dealt_to_the_requests() -> None:
    log: list[tuple[str, Any]] = []
    with stand_in("a", log, None) as a:
        dealt = ["--params-for", 'a=[{"top_k": 1}, {"top_k": 2}]']
        compared(f"a={a}", "--rounds", "1", "--requests", "4", "--params", '{"seed": 7}', *dealt)

    bodies = [body for _, body in log[WARM_UP:]]
    assert all(body["seed"] == 7 for body in bodies)
    assert sorted(body["top_k"] for body in bodies) == [1] * 4 + [2] * 4


def test_a_line_for_each_server_sums_up_its_rounds(tiny_folder: Path) -> None:
    log: list[tuple[str, Any]] = []
    usage = {"prompt_tokens": 17, "completion_tokens": 9}
    with (
        live_server(make_app(lambda: tiny_core(tiny_folder))) as ours,
        stand_in("counts", log, usage) as counts,
        stand_in("silent", log, None) as silent,
    ):
        servers = {"ours": ours, "counts": counts, "silent": silent}
        named = [f"{name}={url}" for name, url in servers.items()]
        table, report = compared(*named, "--text", "--rounds", "3", "--requests", "2")

    assert {name: load["url"] for name, load in report["servers"].items()} == servers
    assert [line.split()[:2] for line in table] == [[c, name] for c in "12" for name in servers]
    for loop in report["closed_loop"].values():
        assert [found["output_tokens"] for found in loop.values()] == [4, 9, 3]
        assert [loop[name]["prompt_tokens"] for name in ("counts", "silent")] == [17, 0]
        first = [turn["tokens_per_s"] for turn in loop["ours"]["rounds"]]
        for found in loop.values():
            rates = [turn["tokens_per_s"] for turn in found["rounds"]]
            assert len(rates) == 3
            ratios = [rate / other for rate, other in zip(rates, first, strict=True)]
            for values, spread in ((rates, found["tokens_per_s"]), (ratios, found["ratio"])):
                want = {"median": median(values), "min": min(values), "max": max(values)}
                assert spread == pytest.approx(want, abs=1e-3)


def test_a_failure_ends_it_in_a_line() -> None:
    with stand_in("a", [], None) as a:
        refused = compare(f"a={a}", "--params-for", 'a={"unknown": 1}')
        unnamed = compare(f"a={a}", "--params-for", 'b={"unknown": 1}')
        empty = compare(f"a={a}", "--params-for", 'a={"empty": 1}')
    gone = compare(f"a={a}")

    assert refused.returncode == gone.returncode == 1
    assert refused.stderr == f"{a}/v1/completions: 400: what is unknown?\n"
    assert empty.returncode == 1
    assert empty.stderr == f"{a}/v1/completions: the stream ended without a token\n"
    assert gone.stderr.startswith(f"{a}/v1/models: ")
    assert gone.stderr.count("\n") == 1
    assert unnamed.returncode == 2
    assert unnamed.stderr.endswith("--params-for names no server: b\n")
