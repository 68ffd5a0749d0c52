"""Load a server over HTTP and say how fast it streams.

Closed loop: a number of clients, each of which sends its next request when the last is answered.
Open loop (--rate): requests arrive at random (Poisson) whether or not earlier ones are done.

Prompts are random token ids, and end-of-sequence is ignored, so every request has the same lengths.
Tokens are counted as the server's own usage does, or where it sends none as one for each chunk.
A warm-up is not counted. One line of JSON comes last.

    python -m benchmarks.serve --clients 1 8 32
    python -m benchmarks.serve --clients 32 --params '{"temperature": 0.8, "top_p": 0.9}'
    python -m benchmarks.serve --url http://127.0.0.1:8000 --rate 4 --requests 64
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import socket
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import aiohttp
import httpx


class NoAnswer(Exception):
    """The server did not do what it was asked for."""


@dataclass
class Sample:
    """One request and its answer as it comes. Times in seconds."""

    sent: float = 0.0
    times: list[float] = field(default_factory=list)  # of the chunks that hold tokens
    prompt_tokens: int = 0
    tokens: int = 0

    def gaps(self, begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """The times between tokens, of those that came between begin and end."""
        return [b - a for a, b in itertools.pairwise(self.times) if begin <= a and b <= end]


@dataclass(frozen=True)
class Load:
    """What to ask of a server. Two loads have a prompt in common only if they have the seed."""

    url: str
    model: str
    prompt_tokens: int
    output_tokens: int
    params: list[dict[str, Any]]  # dealt to the requests; None leaves out what is otherwise sent
    text: bool  # prompts of letters, about a token each, instead of token ids
    seed: str

    def body(self, number: int) -> dict[str, Any]:
        fixed = {
            "model": self.model,
            "prompt": self.prompt(random.Random(f"{self.seed}:{number}")),
            "max_tokens": self.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = fixed | self.params[number % len(self.params)]
        return {name: value for name, value in body.items() if value is not None}

    def prompt(self, draw: random.Random) -> str | list[int]:
        if self.text:
            return " ".join(draw.choices(string.ascii_letters, k=self.prompt_tokens))
        return draw.choices(range(1000, 30_000), k=self.prompt_tokens)


async def ask(
    http: aiohttp.ClientSession, load: Load, number: int, sample: Sample | None = None
) -> Sample:
    """Send one request and time its tokens, in a sample that can be watched.

    Raises NoAnswer if the server says something else.
    """
    sample = sample or Sample()
    sample.sent = time.perf_counter()
    async with http.post("/v1/completions", json=load.body(number)) as response:
        if response.status != 200:
            raise NoAnswer(f"{response.url}: {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk["choices"]:
                sample.times.append(time.perf_counter())
                sample.tokens = len(sample.times)
            if usage := chunk.get("usage"):
                sample.prompt_tokens = usage["prompt_tokens"]
                sample.tokens = usage["completion_tokens"]
        if not sample.times:
            raise NoAnswer(f"{response.url}: the stream ended without a token")
    return sample


async def closed_loop(load: Load, clients: int, requests: int) -> list[Sample]:
    """Each client sends its share of the requests, one after the other."""

    async def one(share: range, http: aiohttp.ClientSession) -> list[Sample]:
        return [await ask(http, load, number) for number in share]

    async with connect(load, clients) as http:
        shares = [range(client, requests, clients) for client in range(clients)]
        answered = await asyncio.gather(*(one(share, http) for share in shares))
    return [sample for samples in answered for sample in samples]


async def open_loop(load: Load, rate: float, requests: int) -> list[Sample]:
    """Requests arrive at `rate` per second on average."""
    arrivals = random.Random(load.seed)
    async with connect(load, requests) as http:
        tasks = []
        for number in range(requests):
            tasks.append(asyncio.create_task(ask(http, load, number)))
            await asyncio.sleep(arrivals.expovariate(rate))
        return await asyncio.gather(*tasks)


def connect(load: Load, connections: int) -> aiohttp.ClientSession:
    """A client of the load's server, for that many requests at once."""
    # A connection for each request, because llama-server ends one after a stream without saying so.
    connector = aiohttp.TCPConnector(limit=connections, force_close=True)
    return aiohttp.ClientSession(load.url, connector=connector, timeout=aiohttp.ClientTimeout())


def summary(samples: list[Sample]) -> dict[str, Any]:
    """Lengths, tokens per second over the whole, and the spread of each time in milliseconds."""
    span = max(s.times[-1] for s in samples) - min(s.sent for s in samples)
    tokens = sum(s.tokens for s in samples)
    per_token = [(s.times[-1] - s.times[0]) / (s.tokens - 1) for s in samples if s.tokens > 1]
    return {
        "requests": len(samples),
        "prompt_tokens": median(s.prompt_tokens for s in samples),
        "output_tokens": median(s.tokens for s in samples),
        "tokens_per_s": round(tokens / span, 1),
        "ttft_ms": spread([s.times[0] - s.sent for s in samples]),
        "time_per_token_ms": spread(per_token),
        "gap_ms": spread([gap for s in samples for gap in s.gaps()]),
    }


def spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]

    def at(part: float) -> float:
        return round(ordered[min(int(part * len(ordered)), len(ordered) - 1)] * 1e3, 1)

    return {"p50": at(0.50), "p95": at(0.95), "p99": at(0.99)}


@contextmanager
def own_server(model: str | None, extra: list[str]) -> Iterator[str]:
    """A server of our own on a free port, ended afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), *extra]
    command += ["--model", model] if model else []
    command += ["--log-level", "warning", "--drain-delay", "0"]
    keys = ("LOGITMILL_API_KEY", "LOGITMILL_API_KEY_FILE")  # this one is open
    process = subprocess.Popen(command, env={k: v for k, v in os.environ.items() if k not in keys})
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit("the server ended before it was ready")
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def warm_up(load: Load, clients: int) -> None:
    """A short request of each client, in which whatever a server does only once is done."""
    warm = replace(load, output_tokens=min(load.output_tokens, 16), seed=f"{load.seed}:warm-up")
    asyncio.run(closed_loop(warm, clients, clients))


def add_load_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument(
        "--params",
        type=json.loads,
        default={"temperature": 0},
        help="JSON; of a list each request gets the next",
    )
    parser.add_argument("--text", action="store_true", help="prompts of letters, not token ids")
    parser.add_argument(
        "--seed",
        type=int,
        default=random.randrange(1 << 32),
        help="of the prompts; default: another each time, as servers remember prompts",
    )


def load_of(args: argparse.Namespace, url: str) -> Load:
    """What the options ask of the server at `url`, of the first model that it lists."""
    model = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
    lengths = args.prompt_tokens, args.output_tokens
    return Load(url, model, *lengths, as_list(args.params), args.text, str(args.seed))


def as_list(params: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return params if isinstance(params, list) else [params]


@contextmanager
def failing_in_a_line() -> Iterator[None]:
    """End the program with what a server says, or that it is not there, without a traceback."""
    try:
        yield
    except (NoAnswer, aiohttp.ClientError) as error:
        raise SystemExit(str(error)) from None
    except httpx.HTTPError as error:
        raise SystemExit(f"{error.request.url}: {error}") from None


@failing_in_a_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running server; default: start one")
    parser.add_argument("--model", help="what to serve, if a server is started")
    parser.add_argument("--server-args", default="", help="more arguments for that server")
    parser.add_argument("--rate", type=float, help="open loop: requests per second")
    parser.add_argument("--requests", type=int, help="default: 3 for each client")
    add_load_options(parser)
    args = parser.parse_args()
    if args.url:
        run(args, args.url)
    else:
        with own_server(args.model, args.server_args.split()) as url:
            run(args, url)


def run(args: argparse.Namespace, url: str) -> None:
    load = load_of(args, url)
    warm_up(load, max(args.clients))
    report: dict[str, Any] = {
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "params": args.params,
        "seed": args.seed,
        "cpus": os.cpu_count(),
        "model": load.model,
    }
    if args.rate:
        result = summary(asyncio.run(open_loop(load, args.rate, args.requests or 32)))
        print(f"{args.rate}/s: {result}")
        report["open_loop"] = {str(args.rate): result}
    else:
        loops = {}
        for clients in args.clients:
            fresh = replace(load, seed=f"{load.seed}:{clients}")
            samples = asyncio.run(closed_loop(fresh, clients, args.requests or 3 * clients))
            loops[str(clients)] = summary(samples)
            print(f"{clients} clients: {loops[str(clients)]}")
        report["closed_loop"] = loops
    print(json.dumps(report))


if __name__ == "__main__":
    main()
