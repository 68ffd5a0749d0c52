"""Time the logits pipeline: each stage with all rows using it, and all of them in one batch.

A case is a sampler as an engine has it, with its lanes, that goes through one step after the other:
logits in, a token for each row out, appended to the rows' histories; so what stages keep up from
step to step is part of their time. Steps of all cases take turns over four sets of logits; of each
set the fastest step counts, which other processes have disturbed least, and the mean of the four is
printed in milliseconds: what the pipeline took, and in parentheses the whole call with the draw.
Stages that change logits are timed on greedy rows, filters on sampled ones at temperature 1.

Logits are random, but shaped like a model's: Student's t with 15 degrees of freedom, times 2.4 to
3.4 from row to row. That gives the entropies (.3 to 5.3 nats, median 2.8) and the mass outside the
likeliest 256 tokens (.001 to .19, median .03) that SmolLM2-135M-Instruct has on its own texts.

The last line is a real engine with 32 sequences: a step with one of them traced against one with
none, in turn.

    python -m benchmarks.logits
    python -m benchmarks.logits --rows 32 --vocabulary 49152 --json
    python -m benchmarks.logits --kernels off --model ''
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import models
from engine.config import LogprobsMode
from engine.kernels.native import CHOICES
from engine.lanes import Lanes
from engine.logits import ORDERS, STAGES
from engine.logits.pipeline import Pipeline
from engine.memory import keep_freed_memory
from engine.messages import Request, TraceWish
from engine.params import SamplingParams
from engine.prepare import Output
from engine.sampler import Sampler
from engine.types import Beside, Rows
from engine.vocabulary import Vocabulary

PROMPT, OUTPUT = 256, 128  # tokens in each history at first
SETS = 4  # of logits
EOS, NEWLINE = 2, 3
GREEDY = {"temperature": 0.0}

# Each method and the parameters that ask for it. Those that change logits are timed without a draw.
CHANGES: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {10: 1.0, 20: -1.0, 30: -100.0}},
    "repetition": {"repetition_penalty": 1.2},
    "frequency, presence": {"frequency_penalty": 0.5, "presence_penalty": 0.2},
    "penalty window": {"repetition_penalty": 1.5, "penalty_last_n": 100},
    "dry": {"dry_multiplier": 0.8},
    "eos_length": {"eos_length_penalty": 4.0},
    "exponential decay": {"exponential_decay_length_penalty": [10, 1.01]},
    "allowed_token_ids": {"allowed_token_ids": list(range(100, 200))},
    "min_tokens": {"min_tokens": 1000},
    "bad_words": {"bad_words": ["some words"]},
    "no_repeat_ngram": {"no_repeat_ngram_size": 3},
}
FILTERS: dict[str, dict[str, Any]] = {
    "edt": {"edt_theta": 0.1},
    "adapt_temperature": {"adapt_temperature": [0.8, 0.4]},
    "dynatemp": {"temperature": 0.8, "dynatemp_range": 0.5},
    "top_n_sigma": {"top_n_sigma": 1.0},
    "min_p": {"min_p": 0.05},
    "top_k": {"top_k": 50},
    "typical_p": {"typical_p": 0.9},
    "tfs": {"tfs": 0.95},
    "top_a": {"top_a": 0.2},
    "top_h": {"top_h": 0.4},
    "top_p": {"top_p": 0.9},
    "epsilon": {"epsilon_cutoff": 0.0006},
    "eta": {"eta_cutoff": 0.0006},
    "mirostat 1": {"mirostat": 1},
    "mirostat 2": {"mirostat": 2},
    "xtc": {"xtc_probability": 0.5},
    "entropix": {"entropix": {}},
}
# These see other logits beside a row's own: of a companion, or of earlier layers.
BESIDE: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 1.5},
    "contrastive decoding": {"cd_amateur": "a smaller model"},
    "dola": {"dola_layers": "low"},
    "kl temperature": {"kl_bandwidth": 0.5, "kl_reference_prompt": "some text"},
    "normalise": {"use_beam_search": True, "sampler_order": "hf"},
}
EARLY = 9  # layers that "low" means for SmolLM2-135M
CHAINS: dict[str, dict[str, Any]] = {
    "top_k 50, top_p .9 at .8": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
}


class Case:
    """A sampler whose rows have these parameters, one set each."""

    def __init__(self, params: list[dict[str, Any]], vocab_size: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        count = len(params)
        self.rows = list(range(count))
        self.vocab_size = vocab_size
        self.position = PROMPT + OUTPUT - 1
        self.lanes = Lanes(count, PROMPT + OUTPUT + steps, vocabulary=_vocabulary(vocab_size))
        self.pipeline = Pipeline(STAGES, self.lanes, ORDERS)
        self.sampler = Sampler(self.lanes, self.pipeline, LogprobsMode.RAW_LOGPROBS)
        self.inside_s = 0.0
        self.beside = _beside(params, vocab_size)
        for lane, given in enumerate(params):
            # Some tokens are frequent, as in any text, so that some n-grams come again.
            ranks = torch.rand(PROMPT + OUTPUT, generator=generator) ** 3 * 500
            tokens = ranks.long().add(100).tolist()
            request = _request(given, tokens[:PROMPT], lane)
            self.lanes.write(self.lanes.take(), tokens, PROMPT, lane)
            self.sampler.admit(lane, request)
        for name in ("transform", "filter", "observe"):
            setattr(self.pipeline, name, self._clocked(getattr(self.pipeline, name)))

    def step(self, logits: Tensor) -> tuple[float, float]:
        """Seconds inside the pipeline, and in all."""
        logits = logits.clone()  # the sampler may write into what a model gives it
        self.inside_s = 0.0
        begin = time.perf_counter()
        positions = [self.position] * len(self.rows)
        rows = replace(Rows.build(self.rows, positions, "cpu"), beside=self.beside)
        chosen = self.sampler(logits, rows).token_ids
        self.lanes.append(self.rows, [self.position + 1] * len(self.rows), chosen)
        self.position += 1
        return self.inside_s, time.perf_counter() - begin

    def _clocked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.inside_s += time.perf_counter() - begin

        return clocked


class Timing:
    """Of one line of the table: seconds inside the pipeline and in all, by set of logits."""

    def __init__(self) -> None:
        self.inside: list[list[float]] = [[] for _ in range(SETS)]
        self.whole: list[list[float]] = [[] for _ in range(SETS)]

    def report(self) -> dict[str, float]:
        found = {"pipeline_ms": _fastest(self.inside), "step_ms": _fastest(self.whole)}
        return {name: value for name, value in found.items() if value is not None}


def _fastest(sets: list[list[float]]) -> float | None:
    if not all(sets):
        return None
    return round(1e3 * sum(min(seconds) for seconds in sets) / len(sets), 3)


def _beside(params: list[dict[str, Any]], vocab_size: int) -> Beside | None:
    """The other logits that some rows see."""
    seeing = [
        row
        for row, given in enumerate(params)
        if any(one.items() <= given.items() for one in BESIDE.values())
    ]
    layered = [row for row in seeing if "dola_layers" in params[row]]
    if not seeing:
        return None
    places, early_places = torch.full((2, len(params)), -1)
    places[seeing], early_places[layered] = torch.arange(len(seeing)), torch.arange(len(layered))
    early = like_a_models(len(layered) * EARLY, vocab_size, SETS).unflatten(0, (-1, EARLY))
    return Beside(
        companions=like_a_models(len(seeing), vocab_size, SETS + 1),
        companion_of=places,
        early=early if layered else None,
        early_of=early_places if layered else None,
        early_count=torch.full((len(layered),), EARLY) if layered else None,
    )


def _request(params: dict[str, Any], prompt: list[int], seed: int) -> Request:
    checked = SamplingParams.model_validate(params)
    return Request(
        request_id=str(seed),
        prompt_ids=tuple(prompt),
        params=checked,
        max_tokens=1 << 20,
        seed=seed,
        eos_token_ids=frozenset({EOS}),
        bad_word_ids=((101, 102), (103,)) if checked.bad_words else (),
        dry_breaker_ids=tuple((NEWLINE,) for _ in checked.dry_sequence_breakers),
        clarify_token=5,
    )


def _vocabulary(size: int) -> Vocabulary:
    special = {0: "<s>", EOS: "</s>", NEWLINE: "\n", 4: "  ", 5: " ..."}
    return Vocabulary(lambda: [special.get(token_id, "word") for token_id in range(size)])


def like_a_models(rows: int, vocab_size: int, seed: int) -> Tensor:
    """Logits [R, V] with about the entropies of a small language model's."""
    generator = torch.Generator().manual_seed(seed)
    degrees = torch.full((rows, vocab_size), 7.5)
    spread = torch._standard_gamma(degrees, generator=generator).div_(7.5).sqrt_()
    noise = torch.randn(rows, vocab_size, generator=generator) / spread
    return noise * (2.4 + torch.rand(rows, 1, generator=generator))


def dealt(count: int) -> list[dict[str, Any]]:
    """All methods, one to each row; where rows are few, several to each if they go together."""
    hands: list[dict[str, Any]] = [{} for _ in range(count)]
    methods = [*BESIDE.values(), *FILTERS.values(), *CHANGES.values()]
    for index, method in enumerate(methods * -(-count // len(methods))):
        for hand in [*hands[index % count :], *hands[: index % count]]:
            if _together(hand, method) and (index < len(methods) or not hand):
                hand |= method
                break
    return hands


def _together(hand: dict[str, Any], method: dict[str, Any]) -> bool:
    if hand.keys() & method.keys():
        return False
    try:
        SamplingParams.model_validate(hand | method)
    except ValueError:
        return False
    return True


def pipelines(rows: int, vocab_size: int, repetitions: int) -> dict[str, Timing]:
    """The table's lines, by name."""
    steps = SETS * (repetitions + 1)
    params = {
        "greedy": [GREEDY] * rows,
        "plain sampling": [{"temperature": 0.8}] * rows,
        **{name: [GREEDY | given] * rows for name, given in CHANGES.items()},
        **{name: [given] * rows for name, given in (FILTERS | CHAINS | BESIDE).items()},
        "each row another": dealt(rows),
    }
    cases = {name: Case(given, vocab_size, steps) for name, given in params.items()}
    unused = {type(s) for case in cases.values() for s in case.pipeline.stages}
    for case in cases.values():
        for lane in case.rows:
            unused -= {type(s) for part in case.pipeline.stages_of(lane) for s in part}
    if unused:
        print(f"not timed: {', '.join(sorted(stage.__name__ for stage in unused))}")
    calls: dict[str, Callable[[Tensor], Any]] = {
        "one softmax": lambda logits: logits.softmax(1),
        "one full sort": lambda logits: logits.sort(1, descending=True),
        "topk(50)": lambda logits: logits.topk(50),
    }
    timings = {name: Timing() for name in (*calls, *cases)}
    sets = [like_a_models(rows, vocab_size, seed) for seed in range(SETS)]
    for step in range(SETS * (repetitions + 1)):
        logits = sets[step % SETS]
        if step == SETS:  # that was the warm-up
            timings = {name: Timing() for name in timings}
        for name, call in calls.items():
            begin = time.perf_counter()
            call(logits)
            timings[name].whole[step % SETS].append(time.perf_counter() - begin)
        for name, case in cases.items():
            inside, whole = case.step(logits)
            timings[name].inside[step % SETS].append(inside)
            timings[name].whole[step % SETS].append(whole)
    return timings


def traced_step(model: str, rows: int, steps: int, threads: int | None) -> dict[str, float]:
    """A real engine's step with one traced row and with none, in turn."""
    core, info = models.load(model, max_num_seqs=rows, threads=threads, prefill_ratio=1 << 20)
    names = [str(row) for row in range(rows)]
    for row, name in enumerate(names):
        prompt = torch.randint(1000, 30000, (PROMPT // 2,), generator=_generator(row)).tolist()
        params = {"max_tokens": 2 * steps + 20, "temperature": 0.8, "top_p": 0.9, "seed": row}
        trace = TraceWish() if row == 0 else None
        models.submit(core, info, name, prompt, params, Output(stream=True, trace=trace))
    while core.scheduler.waiting or core.step()[1].num_tokens > rows:
        core.step()
    wish = core.sampler.traced.copy()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for step in range(2 * steps):
        traced = step % 2 == 0
        core.sampler.traced[:] = wish if traced else 0
        begin = time.perf_counter()
        core.step()
        seconds[traced].append(time.perf_counter() - begin)
    for name in names:
        core.abort(name)
    ratio = median(a / b for a, b in zip(seconds[True], seconds[False], strict=True))
    return {
        "rows": rows,
        "none_ms": _ms(seconds[False]),
        "one_traced_ms": _ms(seconds[True]),
        "ratio": round(ratio, 3),
    }


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ms(seconds: list[float]) -> float:
    return round(median(seconds) * 1e3, 3)


def table(vocab_size: int, columns: dict[int, dict[str, Timing]]) -> None:
    """Print the timings of one vocabulary, a column for each number of rows."""
    head = f"V = {vocab_size}, ms"
    print(f"\n{head:<26}" + "".join(f"{f'R = {rows}':>18}" for rows in columns))
    for name in next(iter(columns.values())):
        cells = []
        for timings in columns.values():
            found = timings[name].report()
            whole = found["step_ms"]
            inside = found.get("pipeline_ms")
            cell = f"{whole:.2f}" if inside is None else f"{inside:.2f} ({whole:.2f})"
            cells.append(f"{cell:>18}")
        print(f"{name:<26}" + "".join(cells))


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print what the arguments ask for."""
    keep_freed_memory()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"threads": torch.get_num_threads(), "kernels": args.kernels}
    print(f"{torch.get_num_threads()} threads, kernels: {args.kernels}")
    found: dict[str, dict[str, Any]] = {}
    for vocab_size in args.vocabulary:
        columns = {rows: pipelines(rows, vocab_size, args.repetitions) for rows in args.rows}
        table(vocab_size, columns)
        found[str(vocab_size)] = {
            str(rows): {name: timing.report() for name, timing in timings.items()}
            for rows, timings in columns.items()
        }
    report["ms"] = found
    if args.model:
        report["traced"] = traced_step(args.model, 32, args.traced_steps, args.threads)
        print(
            "\na step of {rows} rows in the engine: {none_ms:.2f} ms, with one of them traced "
            "{one_traced_ms:.2f} ms, ratio {ratio:.3f}".format(**report["traced"])
        )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49152, 128256])
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--kernels", choices=CHOICES, default="auto", help="our CPU kernels")
    parser.add_argument("--repetitions", type=int, default=8, help="of each set of logits")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="'': no engine's step")
    parser.add_argument("--traced-steps", type=int, default=60, help="steps of each kind")
    parser.add_argument("--json", action="store_true", help="also as one line of JSON")
    parser.add_argument(
        "--methods", action="store_true", help="only print each method's parameters, as JSON"
    )
    args = parser.parse_args()
    if args.methods:
        # For requests of no fewer tokens.
        greedy = [
            GREEDY | given for given in (CHANGES | {"min_tokens": {"min_tokens": 16}}).values()
        ]
        print(json.dumps([{"temperature": 1.0} | given for given in FILTERS.values()] + greedy))
        return
    if os.environ.get("LOGITMILL_KERNELS", "auto") != args.kernels:
        # They are chosen when the engine is imported.
        command = [sys.executable, "-m", "benchmarks.logits", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"LOGITMILL_KERNELS": args.kernels})
    report = run(args)
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
