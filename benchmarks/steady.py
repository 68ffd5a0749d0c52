"""How steadily a server streams: alone, and while it reads long prompts.

Some clients stream. For a while they are alone; then long prompts with one token of output come,
one after the other. All the while another client asks for one token behind a short prompt, and
again a little after its answer. A line each has the time between tokens, how long `GET /live` and
the first token behind a short prompt take, and how late the server's event loop came to its timers,
where its metrics tell: an upper bound of what the 99th of a hundred and the last of all were late
by. The load generator has the same cores, so all of these are upper bounds. One line of JSON comes
last.

    python -m benchmarks.steady
    python -m benchmarks.steady --clients 8 --long-prompt 4096 --prompts 1
"""

import argparse
import asyncio
import itertools
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from benchmarks import serve

_PAUSE_S = 0.1  # between short prompts


@dataclass
class Watch:
    """What has been seen so far. Times in seconds."""

    streams: list[serve.Sample]
    probes: list[tuple[float, float]] = field(default_factory=list)  # when, and how long
    shorts: list[serve.Sample] = field(default_factory=list)  # requests with short prompts
    lags: list[Counter[float]] = field(default_factory=list)  # as `_lags` says, at three times

    def between(self, begin: float, end: float) -> dict[str, Any]:
        """Milliseconds between tokens, of the probes, and until short prompts have a token."""
        gaps = [gap for stream in self.streams for gap in stream.gaps(begin, end)]
        probes = [took for at, took in self.probes if begin <= at < end]
        shorts = [one.times[0] - one.sent for one in self.shorts if begin <= one.sent < end]
        return {
            "seconds": round(end - begin, 1),
            "tokens": len(gaps),
            "gap_ms": spread(gaps),
            "live_ms": spread(probes),
            "short_ttft_ms": spread(shorts),
        }


def spread(seconds: list[float]) -> dict[str, float]:
    return serve.spread(seconds) | {"max": round(max(seconds, default=0.0) * 1e3, 1)}


async def watched(load: serve.Load, args: argparse.Namespace, clients: int) -> dict[str, Any]:
    """What the streams of some clients were like alone, and beside long prompts."""
    watch = Watch([serve.Sample() for _ in range(clients)])
    one_token = replace(load, output_tokens=1)
    long = replace(one_token, prompt_tokens=args.long_prompt, seed=f"{load.seed}:long")
    short = replace(one_token, prompt_tokens=args.short_prompt, seed=f"{load.seed}:short")
    over = asyncio.Event()
    async with serve.connect(load, clients + 3) as http:
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
            asking = asyncio.create_task(_ask_short(http, short, watch, over))
            watch.lags.append(await _lags(http))
            alone = time.perf_counter()
            await asyncio.sleep(args.seconds)
            beside = time.perf_counter()
            watch.lags.append(await _lags(http))
            for number in range(args.prompts):
                await serve.ask(http, long, number)
            end = time.perf_counter()
            watch.lags.append(await _lags(http))
            over.set()
            await asking
            await _all_going(streams)
        finally:
            over.set()
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


async def _ask_short(
    http: aiohttp.ClientSession, load: serve.Load, watch: Watch, over: asyncio.Event
) -> None:
    """Ask one request after the other, and have the last one answered."""
    for number in itertools.count():
        watch.shorts.append(await serve.ask(http, load, number))
        try:
            async with asyncio.timeout(_PAUSE_S):
                await over.wait()
                return
        except TimeoutError:
            pass


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
    parser.add_argument("--short-prompt", type=int, default=12, help="tokens of a short prompt")
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
