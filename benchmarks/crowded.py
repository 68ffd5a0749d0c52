"""How much of a machine's time a server makes use of beside other busy processes.

A server is loaded as by `benchmarks.serve`, alone and beside busy loops of the usual priority. Its
fair share is threads / (threads + loops) of all cores, at most all that its threads can use; the
figure to look at is tokens a second, as a part of those alone, by that share. Counts of loops take
turns, in rounds, so that whatever else changes on the machine changes all of them. One line of JSON
comes last.

    python -m benchmarks.crowded
    python -m benchmarks.crowded --model gemma-3-270m --loops 0 1 4 --clients 1 8
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks import serve

_SETTLED_S = 0.5  # until the system has spread what has just begun to run


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that never rest."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(_SETTLED_S if count else 0.0)
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


def fair_share(threads: int, loops: int, cores: int) -> float:
    """The part of what threads could use of the cores alone that is theirs beside some loops."""
    alone = min(threads, cores)
    return min(cores * threads / (threads + loops), alone) / alone


@serve.failing_in_a_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="what to serve")
    parser.add_argument("--server-args", default="", help="more arguments for the server")
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, help="in a round; default: one for each client")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="the server's; for the share")
    serve.add_load_options(parser)
    parser.set_defaults(prompt_tokens=32, output_tokens=64)
    args = parser.parse_args()
    if 0 not in args.loops:
        parser.error("--loops must hold 0, which the others are compared with")
    with serve.own_server(args.model, args.server_args.split()) as url:
        found = measure(args, serve.load_of(args, url))
    print(json.dumps(report(found, args.threads, cores)))


def measure(args: argparse.Namespace, load: serve.Load) -> dict[tuple[int, int], list[float]]:
    """Tokens a second of each round, by the numbers of clients and loops."""
    serve.warm_up(load, max(args.clients))
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for number in range(args.rounds):
        for loops in args.loops[:: 1 if number % 2 else -1]:
            with busy(loops):
                for clients in args.clients:
                    one = replace(load, seed=f"{load.seed}:{number}:{loops}:{clients}")
                    samples = asyncio.run(serve.closed_loop(one, clients, args.requests or clients))
                    found[clients, loops].append(serve.summary(samples)["tokens_per_s"])
    return found


def report(
    found: dict[tuple[int, int], list[float]], threads: int, cores: int
) -> list[dict[str, Any]]:
    """A row for each number of clients and loops, printed as it is made."""
    rows = []
    for (clients, loops), rates in sorted(found.items()):
        part = median(rates) / median(found[clients, 0])
        share = fair_share(threads, loops, cores)
        rows.append(
            {
                "clients": clients,
                "loops": loops,
                "tokens_per_s": median(rates),
                "spread": [min(rates), max(rates)],
                "of_alone": round(part, 3),
                "fair_share": round(share, 3),
                "of_fair_share": round(part / share, 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
