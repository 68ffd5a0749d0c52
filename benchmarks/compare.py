"""Load several servers and say how fast each streams, beside the first.

For each number of clients every server has its turn in each round, with the closed loop of
`benchmarks.serve`. The order moves on by one from round to round, so what else the machine does
meets all servers alike. In a round all get the same prompts, except that a server named twice (with
other parameters, say) never gets a prompt that it may remember; nor does any in another round.

A line for each server has the median over the rounds, and the least and the most, of its tokens
per second and of their ratio to the first server's in the same round; then the milliseconds to the
first token and for each token after it, and the tokens in and out of a request as the server counts
them: where these differ, the rest is no comparison. Servers that take no token ids, or have another
vocabulary than the first, need --text: prompts of single letters, about a token each. One line of
JSON comes last.

    python -m benchmarks.compare ours=http://127.0.0.1:8000 llama=http://127.0.0.1:8080
    python -m benchmarks.compare ours=http://127.0.0.1:8000 llama=http://127.0.0.1:8080 \\
        --clients 1 8 32 --rounds 3 --params '{"temperature": 0.8, "top_k": 50}' \\
        --params-for llama='{"cache_prompt": false}'
    python -m benchmarks.compare greedy=http://127.0.0.1:8000 mixed=http://127.0.0.1:8000 \\
        --params-for mixed="$(python -m benchmarks.logits --methods)"
"""

import argparse
import asyncio
import itertools
import json
import os
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from benchmarks import serve


def take_turns(
    loads: dict[str, serve.Load], clients: int, requests: int, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """The summary of each server's turn in each round."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in loads}
    order = deque(loads)
    for number in range(rounds):
        for name in order:
            load = replace(loads[name], seed=f"{loads[name].seed}:{clients}:{number}")
            samples = asyncio.run(serve.closed_loop(load, clients, requests))
            turns[name].append(serve.summary(samples))
        order.rotate(-1)
    return turns


def beside(turns: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    """What a server did over all rounds, and next to the first server."""
    rates = [turn["tokens_per_s"] for turn in turns]
    return {
        "tokens_per_s": spread(rates),
        "ratio": spread(
            rate / turn["tokens_per_s"] for rate, turn in zip(rates, first, strict=True)
        ),
        "ttft_ms": median(turn["ttft_ms"]["p50"] for turn in turns),
        "time_per_token_ms": median(turn["time_per_token_ms"]["p50"] for turn in turns),
        "prompt_tokens": median(turn["prompt_tokens"] for turn in turns),
        "output_tokens": median(turn["output_tokens"] for turn in turns),
        "rounds": turns,
    }


def spread(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    found = {"median": median(ordered), "min": ordered[0], "max": ordered[-1]}
    return {name: round(value, 3) for name, value in found.items()}


def line(clients: int, name: str, found: dict[str, Any]) -> str:
    rate, ratio = found["tokens_per_s"], found["ratio"]
    return (
        f"{clients:>7}  {name:16}"
        f"{rate['median']:>9.1f}{rate['min']:>9.1f} –{rate['max']:>7.1f}"
        f"{ratio['median']:>8.3f}{ratio['min']:>8.3f} –{ratio['max']:>6.3f}"
        f"{found['ttft_ms']:>10.1f}{found['time_per_token_ms']:>10.2f}"
        f"{found['prompt_tokens']:>7.0f}{found['output_tokens']:>6.0f}"
    )


HEAD = (
    f"{'clients':>7}  {'server':16}{'tok/s':>9}{'min – max':>18}{'ratio':>8}{'min – max':>16}"
    f"{'first ms':>10}{'token ms':>10}{'in':>7}{'out':>6}"
)


def named(text: str) -> tuple[str, str]:
    """NAME=ANYTHING."""
    name, found, rest = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} has no =")
    return name, rest


@serve.failing_in_a_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("servers", type=named, nargs="+", metavar="NAME=URL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, help="in a round; default: 3 for each client")
    parser.add_argument(
        "--params-for",
        type=named,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="more parameters for one server; null leaves out what is otherwise sent",
    )
    serve.add_load_options(parser)
    args = parser.parse_args()
    own = {name: json.loads(params) for name, params in args.params_for}
    if unknown := own.keys() - dict(args.servers).keys():
        parser.error(f"--params-for names no server: {', '.join(sorted(unknown))}")

    loads: dict[str, serve.Load] = {}
    for name, url in args.servers:
        load = serve.load_of(args, url)
        times_before = sum(other.url == url for other in loads.values())
        more = serve.as_list(own.get(name, {}))
        params = [one | other for one, other in itertools.product(load.params, more)]
        loads[name] = replace(load, params=params, seed=f"{load.seed}:{times_before}")
        serve.warm_up(loads[name], max(args.clients))
    loops: dict[str, dict[str, Any]] = {}
    print(HEAD)
    for clients in args.clients:
        turns = take_turns(loads, clients, args.requests or 3 * clients, args.rounds)
        first, *_ = turns.values()
        loops[str(clients)] = {name: beside(turns[name], first) for name in loads}
        for name, found in loops[str(clients)].items():
            print(line(clients, name, found), flush=True)
    servers = {name: asdict(load) for name, load in loads.items()}
    print(json.dumps({"cpus": os.cpu_count(), "servers": servers, "closed_loop": loops}))


if __name__ == "__main__":
    main()
