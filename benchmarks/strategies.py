"""What each decoding strategy costs: returned tokens per second, and forward rows for each of them.

Requests run in an engine in this process, one alone and eight together, each to its end; the prompt
is part of the time, its tokens are not among the rows. The fastest of some rounds counts, all
strategies taking turns, so that other processes disturb none more than another.

    python -m benchmarks.strategies
    python -m benchmarks.strategies --requests 1 8 --tokens 64 --rounds 3 --json
"""

import argparse
import json
import random
import time
from typing import Any

import torch

from benchmarks import models
from engine.core import EngineCore
from engine.messages import Delta, Finished
from engine.prepare import ModelInfo, Output

BEAMS: dict[str, Any] = {"use_beam_search": True, "beam_width": 4, "early_stopping": "never"}
SED = {"delta_r": 0.7, "rollout_tokens": 16, "max_points": 2}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampling": {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    "n = 4": {"n": 4},
    "best_of = 4": {"best_of": 4},
    "beam search": BEAMS,
    "beam search, n = 4": BEAMS | {"n": 4},
    "gnmt with coverage": BEAMS | {"length_penalty_type": "gnmt", "coverage_penalty": 0.2},
    "diverse beams": BEAMS | {"num_beam_groups": 2, "diversity_penalty": 0.5, "n": 4},
    "stochastic beams": BEAMS | {"stochastic_beams": True, "n": 4},
    "best-first": BEAMS | {"beam_strategy": "best_first"},
    "A*": BEAMS | {"beam_strategy": "astar"},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "guidance": {"guidance_scale": 1.5, "negative_prompt": "No."},
    "contrastive decoding": {"cd_amateur": "amateur"},
    "dola": {"dola_layers": "high", "temperature": 0.0},
    "kl temperature": {"kl_bandwidth": 1.0, "kl_reference_prompt": "No."},
    "cot, 4 branches": {"cot_branches": 4},
    "self-evaluation": {"sed": SED, "temperature": 0.0},
    "8 pause tokens": {"num_pause_tokens": 8, "pause_token": 17, "temperature": 0.0},
    "8 latent thoughts": {"num_latent_thoughts": 8, "temperature": 0.0},
}


def run(
    core: EngineCore, info: ModelInfo, params: dict[str, Any], requests: int, tokens: int
) -> tuple[float, float]:
    """Tokens per second that came back, and forward rows for each."""
    for index in range(requests):
        prompt_ids = random.Random(index).choices(range(1000, 30_000), k=128)
        fixed = {"max_tokens": tokens, "min_tokens": tokens, "seed": index}
        models.submit(core, info, str(index), prompt_ids, fixed | params, Output())
    returned, rows, prompts = 0, 0, 0
    started = time.perf_counter()
    while core.has_work:
        messages, stats = core.step()
        rows += stats.num_tokens
        returned += sum(len(one.tokens) for one in messages if isinstance(one, Delta))
        ended = [one for one in messages if isinstance(one, Finished)]
        prompts += sum(one.prompt_tokens - one.cached_tokens for one in ended)
    taken_s = time.perf_counter() - started
    return returned / taken_s, (rows - prompts) / returned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--json", action="store_true", help="one line of JSON at the end")
    args = parser.parse_args()
    core, info = models.load(args.model, amateur=("amateur", args.model), prefix_cache=False)
    best: dict[tuple[str, int], tuple[float, float]] = {}
    for _ in range(args.rounds):
        for name in args.only:
            for requests in args.requests:
                rate = run(core, info, STRATEGIES[name], requests, args.tokens)
                best[name, requests] = max(best.get((name, requests), rate), rate)
    print(f"{torch.get_num_threads()} threads, 128 tokens in, {args.tokens} out")
    print(f"{'':24}" + "".join(f"{n:>4} requests  rows/token" for n in args.requests))
    for name in args.only:
        cells = (best[name, requests] for requests in args.requests)
        print(f"{name:24}" + "".join(f"{rate:7.1f} tok/s{rows:12.2f}" for rate, rows in cells))
    if args.json:
        print(json.dumps([[*key, *value] for key, value in best.items()]))


if __name__ == "__main__":
    main()
