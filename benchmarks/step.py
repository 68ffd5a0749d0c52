"""Where an engine's step goes: decoding steps of some rows in this process, without HTTP.

For each length of the prompts and each number of rows that the cache can hold: tokens per second,
the megabytes that a step must read (the weights of a quantised decoder, and the cache), the median
step, and how much of it the parts take: choosing the work, the decoder's layers, its head, the
logits pipeline with the draw, and everything else. Then how fast a prompt is read.

    python -m benchmarks.step
    python -m benchmarks.step --rows 1 8 32 --context 128 1024 4096
    python -m benchmarks.step --rows 32 --params '{"temperature": 0.8, "top_k": 50}'
    python -m benchmarks.step --engine '{"dtype": "float32", "batch_invariant": true}'
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks import models
from engine.core import EngineCore
from engine.models.cpu_decoder import CpuDecoder
from engine.prepare import ModelInfo, Output

PARTS = ("plan", "layers", "head", "sampler")
PRODUCTS = ("qkv", "out", "gate_up", "down")  # of a layer


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
    core: EngineCore,
    info: ModelInfo,
    clock: Clock,
    rows: int,
    context: int,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Median milliseconds of a step in which each of `rows` sequences gets a token."""
    names = [f"{context}:{row}" for row in range(rows)]
    for name in names:
        submit(core, info, name, context, {"max_tokens": needed(rows, context, args)} | args.params)
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


def needed(rows: int, context: int, args: argparse.Namespace) -> int:
    """Tokens of output that none uses up while the prompts of the others are read."""
    return int(args.steps) + 64 + rows * context // 256


def moved_mb(core: EngineCore, rows: int, context: int) -> float:
    """What a step must at least read: quantised weights once, and every row's keys and values."""
    model = core.model
    cache = sum(shape.numel for shape in model.kv_shapes) * model.dtype.itemsize
    weights = 0
    if isinstance(model, CpuDecoder):
        products = [getattr(one, name) for one in model.layers for name in PRODUCTS]
        weights = sum(product.num_bytes for product in [*products, model.head])
    return (weights + rows * context * cache) / 1e6


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
    parser.add_argument(
        "--context", type=int, nargs="+", default=[128], help="tokens in each prompt"
    )
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--params", type=json.loads, default={"temperature": 0})
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--engine", type=json.loads, default={}, help="options of the engine")
    parser.add_argument("--json", action="store_true", help="one line of JSON at the end")
    args = parser.parse_args()
    most = max(args.rows)
    options = {"max_num_seqs": most, "threads": args.threads, "prefix_cache": False}
    options["prefill_ratio"] = 1 << 20  # all prompts first, then only steps of one token each
    core, info = models.load(args.model, **options | args.engine)
    clock = Clock(core)
    report: dict[str, Any] = {"threads": torch.get_num_threads(), "params": args.params}
    report["engine"] = args.engine
    print(f"{report['threads']} threads, {args.params}, engine {args.engine}")
    names = ("rows", "context", "tok/s", "MB", *(f"{n} ms" for n in ("step", *PARTS, "rest")))
    print("".join(f"{name:>11}" for name in names))
    for context, rows in itertools.product(args.context, args.rows):
        if rows * (context + needed(rows, context, args)) > info.num_blocks * info.block_size:
            continue
        found = decode(core, info, clock, rows, context, args)
        report[f"rows {rows}, context {context}"] = found
        rate, moved = 1e3 * rows / found["step"], moved_mb(core, rows, context)
        print(f"{rows:>11}{context:>11}{rate:>11.1f}{moved:>11.0f}", end="")
        print("".join(f"{ms:>11.2f}" for ms in found.values()), flush=True)
    for tokens in args.prefill:
        rate = max(prefill(core, info, tokens) for _ in range(3))
        report[f"prefill {tokens}"] = rate
        print(f"a prompt of {tokens} tokens: {rate:.0f} tok/s")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
