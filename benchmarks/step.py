"""Where an engine's step goes: decoding steps of some rows in this process, without HTTP.

For each number of rows the median step in milliseconds, and how much of it the parts take: choosing
the work, the decoder's layers, its head, the logits pipeline with the draw, and everything else.
Then how fast a prompt is read.

    python -m benchmarks.step
    python -m benchmarks.step --rows 32 --context 1024 --params '{"temperature": 0.8, "top_k": 50}'
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks import models
from engine.core import EngineCore
from engine.prepare import ModelInfo, Output

PARTS = ("plan", "layers", "head", "sampler")


class Clock:
    """Seconds that a step's parts have taken since they were last asked for."""

    def __init__(self, core: EngineCore) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        scheduler, model = core.scheduler, core.model
        for name, owner, method in (
            ("plan", scheduler, "plan"),
            ("layers", core.runners[0], "forward"),
            ("head", model, "logits"),
            ("sampler", core, "sampler"),
        ):
            setattr(owner, method, self._timed(name, getattr(owner, method)))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[name] += time.perf_counter() - begin

        return timed

    def take(self) -> dict[str, float]:
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return taken


def decode(
    core: EngineCore, info: ModelInfo, clock: Clock, rows: int, args: argparse.Namespace
) -> dict[str, float]:
    """Median milliseconds of a step in which each of `rows` sequences gets a token."""
    names = [str(row) for row in range(rows)]
    for name in names:
        submit(core, info, name, args.context, {"max_tokens": args.steps + 64} | args.params)
    while core.scheduler.waiting or core.step()[1].num_tokens > rows:
        core.step()
    steps = []
    clock.take()
    for _ in range(args.steps):
        begin = time.perf_counter()
        core.step()
        whole = time.perf_counter() - begin
        parts = clock.take()
        steps.append({"step": whole} | parts | {"rest": whole - sum(parts.values())})
    models.stop(core, names)
    return {name: 1e3 * median(step[name] for step in steps) for name in steps[0]}


def prefill(core: EngineCore, info: ModelInfo, tokens: int) -> float:
    """Tokens per second at which one prompt is read."""
    submit(core, info, f"prompt {tokens}", tokens, {"max_tokens": 1})
    begin = time.perf_counter()
    while core.has_work:
        core.step()
    return tokens / (time.perf_counter() - begin)


def submit(
    core: EngineCore, info: ModelInfo, name: str, tokens: int, params: dict[str, Any]
) -> None:
    """Give the engine a prompt of random tokens, of which no two have a prefix in common."""
    prompt = random.Random(name).choices(range(1000, 30_000), k=tokens)
    models.submit(core, info, name, prompt, {"seed": 0} | params, Output(stream=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--context", type=int, default=128, help="tokens in each prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--params", type=json.loads, default={"temperature": 0})
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--json", action="store_true", help="one line of JSON at the end")
    args = parser.parse_args()
    most = max(args.rows)
    core, info = models.load(
        args.model, max_num_seqs=most, threads=args.threads, prefix_cache=False
    )
    clock = Clock(core)
    report: dict[str, Any] = {"threads": torch.get_num_threads(), "params": args.params}
    print(f"{report['threads']} threads, {args.context} tokens of context, {args.params}")
    print(
        f"{'rows':>6}{'tok/s':>9}" + "".join(f"{n:>9}" for n in ("step", *PARTS, "rest")) + "  ms"
    )
    for rows in args.rows:
        found = decode(core, info, clock, rows, args)
        report[f"rows {rows}"] = found
        rate = 1e3 * rows / found["step"]
        print(f"{rows:>6}{rate:>9.1f}" + "".join(f"{ms:>9.2f}" for ms in found.values()))
    for tokens in args.prefill:
        rate = max(prefill(core, info, tokens) for _ in range(3))
        report[f"prefill {tokens}"] = rate
        print(f"a prompt of {tokens} tokens: {rate:.0f} tok/s")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
