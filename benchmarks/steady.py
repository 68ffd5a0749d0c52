"""How steadily a server streams: alone, and while it reads long prompts.

Some clients stream. For a while they are alone; then long prompts with one token of output come,
one after the other. A line each has the time between tokens, how long `GET /live` takes, and how
late the server's event loop came to its timers, where its metrics tell: an upper bound of what the
99th of a hundred and the last of all were late by. The load generator has the same cores, so all of
these are upper bounds. One line of JSON comes last.

    python -m benchmarks.steady
    python -m benchmarks.steady --clients 8 --long-prompt 4096 --prompts 1
"""

import argparse
import asyncio
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from benchmarks import serve


@dataclass
class Watch:
    """What has been seen so far. Times in seconds."""

    streams: list[serve.Sample]
    probes: list[tuple[float, float]] = field(default_factory=list)  # when, and how long
    lags: list[Counter[float]] = field(default_factory=list)  # as `_lags` says, at three times

    def between(self, begin: float, end: float) -> dict[str, Any]:
        """Milliseconds between tokens and of the probes."""
        gaps = [gap for stream in self.streams for gap in stream.gaps(begin, end)]
        probes = [took for at, took in self.probes if begin <= at < end]
        return {
            "seconds": round(end - begin, 1),
            "tokens": len(gaps),
            "gap_ms": spread(gaps),
            "live_ms": spread(probes),
        }


def spread(seconds: list[float]) -> dict[str, float]:
    return serve.spread(seconds) | {"max": round(max(seconds, default=0.0) * 1e3, 1)}


async def watched(load: serve.Load, args: argparse.Namespace, clients: int) -> dict[str, Any]:
    """What the streams of some clients were like alone, and beside long prompts."""
    watch = Watch([serve.Sample() for _ in range(clients)])
    long = replace(load, prompt_tokens=args.long_prompt, output_tokens=1, seed=f"{load.seed}:long")
    async with serve.connect(load, clients + 2) as http:
        streams = [
            asyncio.create_task(serve.ask(http, load, number, sample))
            for number, sample in enumerate(watch.streams)
        ]
        probing = asyncio.create_task(_probe(http, watch))
        try:
            deadline = time.perf_counter() + 120
            while not all(len(stream.times) > 2 for stream in watch.streams):
                await _all_going(streams)
                if time.perf_counter() > deadline:
                    raise SystemExit("not all streams have begun after two minutes")
                await asyncio.sleep(0.01)
            watch.lags.append(await _lags(http))
            alone = time.perf_counter()
            await asyncio.sleep(args.seconds)
            beside = time.perf_counter()
            watch.lags.append(await _lags(http))
            for number in range(args.prompts):
                await serve.ask(http, long, number)
            end = time.perf_counter()
            watch.lags.append(await _lags(http))
            await _all_going(streams)
        finally:
            for task in (*streams, probing):
                task.cancel()
            await asyncio.gather(*streams, probing, return_exceptions=True)
    found = {"alone": watch.between(alone, beside), "long prompts": watch.between(beside, end)}
    for one, before, after in zip(found.values(), watch.lags, watch.lags[1:], strict=False):
        one["lag_ms"] = upper_bounds(after - before)
    return found


async def _lags(http: aiohttp.ClientSession) -> Counter[float]:
    """How many timers the server's event loop has come to no later than so many milliseconds."""
    pattern = r'^logitmill:event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)$'
    async with http.get("/metrics") as response:
        found = re.findall(pattern, await response.text(), re.MULTILINE)
    return Counter({1e3 * float(bound): int(float(count)) for bound, count in found})


def upper_bounds(lags: Counter[float]) -> dict[str, float]:
    """Of the times in ms by which timers were late; nothing where there are no timers."""
    total = max(lags.values(), default=0)
    parts = {"p99": 0.99 * total, "max": float(total)} if total else {}
    return {
        name: min(bound for bound, count in lags.items() if count >= part)
        for name, part in parts.items()
    }


async def _all_going(streams: list["asyncio.Task[serve.Sample]"]) -> None:
    for stream in streams:
        if stream.done():
            await stream  # raises what went wrong
            raise SystemExit("a stream ended too early: ask for more --output-tokens")


async def _probe(http: aiohttp.ClientSession, watch: Watch) -> None:
    while True:
        begin = time.perf_counter()
        async with http.get("/live") as response:
            await response.read()
        watch.probes.append((begin, time.perf_counter() - begin))
        await asyncio.sleep(0.01)


@serve.failing_in_a_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running server; default: start one")
    parser.add_argument("--model", help="what to serve, if a server is started")
    parser.add_argument("--server-args", default="", help="more arguments for that server")
    parser.add_argument("--seconds", type=float, default=5.0, help="that the streams are alone")
    parser.add_argument("--long-prompt", type=int, default=1024, help="tokens of a long prompt")
    parser.add_argument("--prompts", type=int, default=2, help="how many long prompts")
    serve.add_load_options(parser)
    parser.set_defaults(clients=[8, 32, 64], prompt_tokens=16, output_tokens=1500)
    args = parser.parse_args()
    if args.url:
        run(args, args.url)
    else:
        with serve.own_server(args.model, args.server_args.split()) as url:
            run(args, url)


def run(args: argparse.Namespace, url: str) -> None:
    load = serve.load_of(args, url)
    serve.warm_up(load, max(args.clients))
    report = {}
    for clients in args.clients:
        fresh = replace(load, seed=f"{load.seed}:{clients}")
        found = report[str(clients)] = asyncio.run(watched(fresh, args, clients))
        for name, one in found.items():
            print(f"{clients} clients, {name}: {one}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
