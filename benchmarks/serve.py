"""Load a server over HTTP and say how fast it streams.

Closed loop: a number of clients, each of which sends its next request when the last is answered.
Open loop (--rate): requests arrive at random (Poisson) whether or not earlier ones are done.

Prompts are random token ids from a fixed seed, end-of-sequence is ignored, so every request has the
same lengths. A warm-up is not counted. One line of JSON comes last.

    python -m benchmarks.serve --clients 1 8 32
    python -m benchmarks.serve --clients 32 --params '{"temperature": 0.8, "top_p": 0.9}'
    python -m benchmarks.serve --url http://127.0.0.1:8000 --rate 4 --requests 64
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx


@dataclass
class Sample:
    """One answered request. Times in seconds."""

    sent: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)


@dataclass
class Load:
    url: str
    model: str
    prompt_tokens: int
    output_tokens: int
    params: dict[str, object]
    seed: int

    def body(self, number: int) -> dict[str, object]:
        ids = random.Random(f"{self.seed}:{number}")
        prompt = [ids.randrange(1000, 30000) for _ in range(self.prompt_tokens)]
        fixed = {"ignore_eos": True, "stream": True, "seed": number}
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.output_tokens,
            "return_token_ids": True,
            **fixed,
            **self.params,
        }


async def ask(client: httpx.AsyncClient, load: Load, number: int) -> Sample:
    """Send one request and time its tokens."""
    sample = Sample(time.perf_counter())
    async with client.stream("POST", "/v1/completions", json=load.body(number)) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line[6:])["choices"]
            count = sum(len(choice.get("token_ids") or [0]) for choice in choices)
            now = time.perf_counter()
            if sample.tokens:
                sample.gaps.append(now - sample.last)
            else:
                sample.first = now
            sample.last = now
            sample.tokens += count
    return sample


async def closed_loop(load: Load, clients: int, requests: int) -> list[Sample]:
    """Each client sends its share of the requests, one after the other."""

    async def one(share: range, http: httpx.AsyncClient) -> list[Sample]:
        return [await ask(http, load, number) for number in share]

    async with _http(load, clients) as http:
        shares = [range(client, requests, clients) for client in range(clients)]
        answered = await asyncio.gather(*(one(share, http) for share in shares))
    return [sample for samples in answered for sample in samples]


async def open_loop(load: Load, rate: float, requests: int) -> list[Sample]:
    """Requests arrive at `rate` per second on average."""
    arrivals = random.Random(load.seed)
    async with _http(load, requests) as http:
        tasks = []
        for number in range(requests):
            tasks.append(asyncio.create_task(ask(http, load, number)))
            await asyncio.sleep(arrivals.expovariate(rate))
        return await asyncio.gather(*tasks)


def _http(load: Load, connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections)
    return httpx.AsyncClient(base_url=load.url, timeout=None, limits=limits, trust_env=False)


def summary(samples: list[Sample]) -> dict[str, object]:
    """Tokens per second over the whole, and the spread of each time in milliseconds."""
    span = max(s.last for s in samples) - min(s.sent for s in samples)
    tokens = sum(s.tokens for s in samples)
    per_token = [(s.last - s.first) / (s.tokens - 1) for s in samples if s.tokens > 1]
    return {
        "requests": len(samples),
        "tokens_per_s": round(tokens / span, 1),
        "ttft_ms": spread([s.first - s.sent for s in samples]),
        "time_per_token_ms": spread(per_token),
        "gap_ms": spread([gap for s in samples for gap in s.gaps]),
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
    process = subprocess.Popen(command, env=os.environ | {"LOGITMILL_API_KEY": ""})
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running server; default: start one")
    parser.add_argument("--model", help="what to serve, if a server is started")
    parser.add_argument("--server-args", default="", help="more arguments for that server")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rate", type=float, help="open loop: requests per second")
    parser.add_argument("--requests", type=int, help="default: 3 for each client")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--params", type=json.loads, default={"temperature": 0})
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.url:
        run(args, args.url)
    else:
        with own_server(args.model, args.server_args.split()) as url:
            run(args, url)


def run(args: argparse.Namespace, url: str) -> None:
    model = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
    load = Load(url, model, args.prompt_tokens, args.output_tokens, args.params, args.seed)
    warm = Load(url, model, args.prompt_tokens, min(args.output_tokens, 16), args.params, -1)
    asyncio.run(closed_loop(warm, max(args.clients), max(args.clients)))
    report: dict[str, object] = {
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "params": args.params,
        "cpus": os.cpu_count(),
        "model": model,
    }
    if args.rate:
        result = summary(asyncio.run(open_loop(load, args.rate, args.requests or 32)))
        print(f"{args.rate}/s: {result}")
        report["open_loop"] = {str(args.rate): result}
    else:
        loops = {}
        for clients in args.clients:
            requests = args.requests or 3 * clients
            loops[str(clients)] = summary(asyncio.run(closed_loop(load, clients, requests)))
            print(f"{clients} clients: {loops[str(clients)]}")
        report["closed_loop"] = loops
    print(json.dumps(report))


if __name__ == "__main__":
    main()
