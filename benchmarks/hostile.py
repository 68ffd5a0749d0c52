"""What one client's requests do to everybody else.

A neighbour streams, `GET /live` is asked every 20 ms, and attacks come one after the other:
bodies, parameters and programs chosen to take as long and as much as they can. For each a line:
what it was answered, how long that took, the longest and the 99th of a hundred gaps in the
neighbour's stream, as multiples of the longest and of the 99th of a hundred when it was alone, the
latest `/live`, and the memory that the server's processes have afterwards. One line of JSON comes
last.

    python -m benchmarks.hostile
    python -m benchmarks.hostile --only templates patterns --rounds 2
"""

import argparse
import asyncio
import io
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import serve

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
_PATIENCE_S = 120.0
_LIVE_EVERY_S = 0.02
_REST_S = 0.3
_SETTLED_S = 3.0  # until a server that has just started has nothing left to prepare


@dataclass(frozen=True)
class Target:
    """What an attack has to know of a server to go to its limits."""

    vocab_size: int
    context_len: int
    num_layers: int
    max_body_bytes: int = 4 << 20


@dataclass(frozen=True)
class Attack:
    """Requests that are sent at once."""

    name: str
    make: Callable[[Target], list[tuple[str, bytes]]]  # paths and bodies


def _asks(path: str, *bodies: dict[str, Any]) -> list[tuple[str, bytes]]:
    return [(path, json.dumps(body).encode()) for body in bodies]


def _filled(head: str, item: str, tail: str, target: Target) -> bytes:
    """As many items as a body may hold."""
    room = target.max_body_bytes - len(head) - len(tail) - len(item)
    return (head + f"{item}," * (room // (len(item) + 1)) + item + tail).encode()


def _spread(size: int) -> list[int]:
    """Different tokens, none of them special."""
    return [300 + 7 * at % 1000 for at in range(size)]


def _stop_strings() -> list[str]:
    return ["e" * 1023 + chr(0x100 + at) for at in range(64)]


def _ids(target: Target) -> list[int]:
    return list(range(target.vocab_size))


def _user(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content} for content in contents]


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
DOUBLING = (
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
_LETTERS = "abcdefghijklmnop"
TEXT = "It was the best of times, it was the worst of times, "

ATTACKS: tuple[Attack, ...] = (
    # Lists at their limits.
    Attack("long bad word", lambda _: _asks(
        COMPLETIONS, {"prompt": "a", "max_tokens": 1, "bad_words": ["word " * 2000]})),
    Attack("many bad words, n 8", lambda _: _asks(
        COMPLETIONS,
        {"prompt": "a", "n": 8, "max_tokens": 8, "bad_words": [f"w{i}x" for i in range(1024)]})),
    Attack("bad words as long as may be", lambda t: _asks(
        COMPLETIONS,
        {"prompt": "a", "max_tokens": t.context_len // 2, "bad_words": ["word " * 500] * 32})),
    Attack("bias, allowed and stop ids of all tokens, n 16", lambda t: _asks(
        COMPLETIONS,
        {"prompt": "a", "n": 16, "max_tokens": 8, "min_tokens": 8,
         "logit_bias": {str(i): 0.5 for i in _ids(t)}, "allowed_token_ids": _ids(t),
         "stop_token_ids": _ids(t)})),
    Attack("stop strings", lambda _: _asks(
        COMPLETIONS,
        {"prompt": "a", "max_tokens": 64, "stop": _stop_strings(), "ignore_eos": True})),
    Attack("no n-gram twice in a row of one letter", lambda t: _asks(
        COMPLETIONS,
        {"prompt": [300] * (t.context_len // 2), "max_tokens": 16, "no_repeat_ngram_size":
         t.context_len // 4, "dry_multiplier": 1.0, "dry_sequence_breakers": []})),
    Attack("sequence breakers", lambda _: _asks(
        COMPLETIONS,
        {"prompt": _spread(200), "dry_multiplier": 1.0,
         "dry_sequence_breakers": [a + b for a in _LETTERS for b in _LETTERS]})),
    # Long texts.
    Attack("a prompt of 1 MB", lambda _: _asks(COMPLETIONS, {"prompt": TEXT * 20_000})),
    Attack("a prompt of 4 MB", lambda t: [
        (COMPLETIONS, _filled('{"prompt": "', TEXT, '"}', t))]),
    Attack("200 prompts of 19 kB", lambda _: _asks(
        COMPLETIONS, {"prompt": [TEXT * 360] * 200, "max_tokens": 1})),
    Attack("64 prompts, each nearly the context", lambda t: _asks(
        COMPLETIONS, {"prompt": [[at + 300, *_spread(t.context_len - 300)] for at in range(64)],
                      "max_tokens": 1})),
    Attack("256 times the same prompt", lambda t: _asks(
        COMPLETIONS, {"prompt": [_spread(t.context_len // 4)] * 256, "max_tokens": 1})),
    Attack("/tokenize 4 MB", lambda t: [("/tokenize", _filled('{"prompt": "', TEXT, '"}', t))]),
    Attack("/tokenize 4 MB with strings", lambda t: [
        ("/tokenize", _filled('{"return_token_strs": true, "prompt": "', TEXT, '"}', t))]),
    Attack("/detokenize 4 MB", lambda t: [("/detokenize", _filled('{"tokens": [', "3", "]}", t))]),
    # Long bodies.
    Attack("numbers", lambda t: [(COMPLETIONS, _filled('{"prompt": [', "5", "]}", t))]),
    Attack("allowed ids without end", lambda t: [
        (COMPLETIONS, _filled('{"prompt": "a", "allowed_token_ids": [', "5", "]}", t))]),
    Attack("objects", lambda t: [(COMPLETIONS, _filled('{"prompt": "a", "x": [', "{}", "]}", t))]),
    Attack("nested lists", lambda t: [
        (COMPLETIONS, _filled('{"prompt": "a", "x": [', "[[[[[[[[]]]]]]]]", "]}", t))]),
    Attack("unknown fields", lambda t: [(COMPLETIONS, json.dumps(
        {"prompt": "a"} | {f"f{i}": 0 for i in range(t.max_body_bytes // 16)}).encode())]),
    Attack("wrong types without end", lambda t: [
        ("/detokenize", _filled('{"tokens": [', '"a"', "]}", t))]),
    Attack("100,000 parts of text", lambda t: [
        (CHAT, _filled('{"messages": [{"role": "user", "content": [',
                       '{"type": "text", "text": "a"}', "]}]}", t))]),
    Attack("100,000 messages", lambda t: [
        (CHAT, _filled('{"messages": [', '{"role": "user", "content": "a"}', "]}", t))]),
    Attack("eight of 4 MB at once", lambda t: [
        (COMPLETIONS, _filled('{"prompt": "a", "x": [', "{}", "]}", t))] * 8),
    # Answers that list much.
    Attack("logprobs 20 of a long answer", lambda t: _asks(
        COMPLETIONS,
        {"prompt": "a", "max_tokens": t.context_len // 8, "ignore_eos": True, "logprobs": 20})),
    Attack("prompt_logprobs 20 of a long prompt", lambda t: _asks(
        COMPLETIONS,
        {"prompt": _spread(t.context_len // 4), "max_tokens": 1, "prompt_logprobs": 20})),
    Attack("echo with logprobs, streamed", lambda t: _asks(
        COMPLETIONS,
        {"prompt": _spread(t.context_len // 4), "max_tokens": 1, "logprobs": 20, "echo": True,
         "stream": True})),
    Attack("explain 100 tokens, all layers", lambda t: _asks(
        "/v1/explain",
        {"prompt": [300], "continuation": _spread(min(100, t.context_len // 4)),
         "trace": {"top": 100, "layers": list(range(t.num_layers + 1))}})),
    Attack("explain with a layer 256 times", lambda _: _asks(
        "/v1/explain",
        {"prompt": _spread(100), "trace": {"top": 100, "layers": [1] * 256}})),
    Attack("trace of all layers", lambda t: _asks(
        COMPLETIONS,
        {"prompt": "a", "max_tokens": 24, "ignore_eos": True,
         "trace": {"top": 100, "layers": list(range(t.num_layers + 1))}})),
    # Searches.
    Attack("beams, all tokens stop", lambda t: _asks(
        COMPLETIONS,
        {"prompt": "a", "use_beam_search": True, "beam_width": 8, "max_tokens": 16,
         "stop_token_ids": _ids(t)})),
    Attack("beams, all tokens but some stop", lambda t: _asks(
        COMPLETIONS,
        {"prompt": "a", "use_beam_search": True, "beam_width": 8, "max_tokens": 16,
         "stop_token_ids": _ids(t)[400:], "stop": _stop_strings()})),
    Attack("64 beams", lambda _: _asks(
        COMPLETIONS,
        {"prompt": "a", "use_beam_search": True, "beam_width": 64, "max_tokens": 16})),
    Attack("best first", lambda t: _asks(
        COMPLETIONS,
        {"prompt": "a", "use_beam_search": True, "beam_width": 64, "beam_strategy": "best_first",
         "max_tokens": t.context_len // 16})),
    Attack("DoLa, all layers", lambda t: _asks(
        COMPLETIONS,
        {"prompt": "a", "max_tokens": 24, "ignore_eos": True,
         "dola_layers": list(range(t.num_layers))})),
    # Programs.
    Attack("a pattern nested 490 times", lambda _: _asks(
        COMPLETIONS,
        {"prompt": "a", "cot_branches": 2, "cot_pattern": "(" * 490 + "a" + ")" * 490})),
    Attack("a pattern that explodes", lambda _: _asks(
        COMPLETIONS,
        {"prompt": "a", "cot_branches": 2, "cot_pattern": "(?:" * 60 + "a" + "+)" * 60})),
    Attack("a pattern without end", lambda _: _asks(
        COMPLETIONS,
        {"prompt": "a", "cot_branches": 4, "max_tokens": 48, "ignore_eos": True,
         "cot_pattern": r"(?:.|.)*[\x00]"})),
    Attack("deep JSON", lambda _: [
        (COMPLETIONS, b'{"prompt": "a", "temperature": ' + b"[" * 965 + b"]" * 965 + b"}")]),
    Attack("a template without end", lambda _: _asks(
        CHAT, {"messages": _user("a"), "chat_template": ENDLESS})),
    Attack("a template that doubles a text", lambda _: _asks(
        CHAT, {"messages": _user("a"), "chat_template": DOUBLING})),
    Attack("eight templates without end", lambda _: _asks(
        CHAT, *[{"messages": _user("a"), "chat_template": ENDLESS}] * 8)),
    # What is asked for properly, and is much.
    Attack("a prompt of 2,000 tokens", lambda t: _asks(
        COMPLETIONS, {"prompt": _spread(t.context_len // 4), "max_tokens": 1})),
)  # fmt: skip


@dataclass
class Watch:
    """What others see meanwhile. Seconds."""

    streams: list[list[float]] = field(default_factory=list)  # when each token came, by stream
    lives: list[tuple[float, float]] = field(default_factory=list)  # when, and how long

    def gaps(self, begin: float, end: float) -> list[float]:
        """Between the tokens of a stream, the one that is not over yet too."""
        found: list[float] = []
        for times in self.streams:
            closed = pairwise([*times, end] if times is self.streams[-1] else times)
            found += [after - before for before, after in closed if begin <= after]
        return found

    def late(self, begin: float, end: float) -> float:
        return max((took for at, took in self.lives if begin <= at < end), default=0.0)


@dataclass(frozen=True)
class Seen:
    """What became of an attack. Seconds and bytes."""

    name: str
    statuses: tuple[int, ...]
    seconds: float
    longest_gap: float
    usual_gap: float  # the 99th of a hundred
    live: float
    resident: int


async def attacked(
    url: str,
    attacks: Sequence[Attack],
    target: Target,
    pids: Sequence[int] = (),
    patience_s: float = 60.0,
) -> tuple[Seen, list[Seen]]:
    """What a neighbour saw alone, and during each attack, whose clients leave in the end."""
    load = _neighbour(url, target)
    found: list[Seen] = []
    async with serve.connect(load, 64) as http:
        watch = Watch()
        tasks = [asyncio.create_task(_stream(http, load, watch)),
                 asyncio.create_task(_ask_live(http, watch))]  # fmt: skip
        try:
            await _until(lambda: bool(watch.streams) and len(watch.streams[-1]) > 20)
            begin = time.perf_counter()
            await asyncio.sleep(3.0)
            alone = _seen("alone", (), begin, watch, pids)
            for attack in attacks:
                requests = attack.make(target)
                await asyncio.sleep(_REST_S)  # the neighbour has waited for that
                begin = time.perf_counter()
                asked = [_ask(http, path, body, patience_s) for path, body in requests]
                statuses = tuple(await asyncio.gather(*asked))
                await asyncio.sleep(_REST_S)  # for what only becomes of it then
                found.append(_seen(attack.name, statuses, begin, watch, pids))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return alone, found


def _neighbour(url: str, target: Target) -> serve.Load:
    params = [{"temperature": 0}]
    return serve.Load(url, "", 12, target.context_len - 100, params, False, str(random.random()))


def _seen(
    name: str, statuses: tuple[int, ...], begin: float, watch: Watch, pids: Sequence[int]
) -> Seen:
    end = time.perf_counter()
    gaps = sorted(watch.gaps(begin, end))
    usual = gaps[min(int(0.99 * len(gaps)), len(gaps) - 1)] if gaps else 0.0
    longest = max(gaps, default=0.0)
    late = watch.late(begin, end)
    return Seen(name, statuses, end - begin, longest, usual, late, resident(pids))


async def _stream(http: aiohttp.ClientSession, load: serve.Load, watch: Watch) -> None:
    """One stream after the other, for as long as anybody watches."""
    for number in count():
        body = load.body(number) | {"ignore_eos": True}
        del body["model"]
        async with http.post(COMPLETIONS, json=body) as response:
            times: list[float] = []
            async for line in response.content:
                if line.startswith(b'data: {"id"'):
                    times.append(time.perf_counter())
                    if len(times) == 1:
                        watch.streams.append(times)


async def _ask_live(http: aiohttp.ClientSession, watch: Watch) -> None:
    while True:
        begin = time.perf_counter()
        async with http.get("/live") as response:
            await response.read()
        watch.lives.append((begin, time.perf_counter() - begin))
        await asyncio.sleep(_LIVE_EVERY_S)


async def _ask(http: aiohttp.ClientSession, path: str, body: bytes, patience_s: float) -> int:
    """The status, 0 if the connection ends without one, 1 if there is no end in time."""
    headers = {"Content-Type": "application/json"}
    try:
        async with (
            asyncio.timeout(patience_s),
            http.post(path, data=io.BytesIO(body), headers=headers) as got,
        ):
            async for _ in got.content.iter_chunked(1 << 20):
                pass
            return got.status
    except TimeoutError:
        return 1
    except aiohttp.ClientError:
        return 0


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.01)


def resident(pids: Sequence[int]) -> int:
    """Bytes that these processes and all their children have of memory to themselves, as Linux
    shares it out.
    """
    total = 0
    for pid in _with_children(pids):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        (line,) = [line for line in rollup.splitlines() if line.startswith("Pss:")]
        total += int(line.split()[1]) << 10
    return total


def children() -> list[int]:
    """The processes that this one has started."""
    own = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split()]


def _with_children(pids: Sequence[int]) -> Iterator[int]:
    for pid in pids:
        yield pid
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                children = [int(child) for child in path.read_text().split()]
            except OSError:
                continue
            yield from _with_children(children)


def line_of(seen: Seen, alone: Seen) -> str:
    answered = ",".join(str(status) for status in sorted(set(seen.statuses))) or "-"
    longest, usual = seen.longest_gap / alone.longest_gap, seen.usual_gap / alone.usual_gap
    return (
        f"{seen.name:48} {answered:>9} {seen.seconds:7.2f} s   "
        f"gap {1e3 * seen.longest_gap:7.1f} ms ({longest:5.1f} x), "
        f"p99 {1e3 * seen.usual_gap:6.1f} ({usual:4.1f} x)   "
        f"live {1e3 * seen.live:6.1f} ms   {seen.resident >> 20:5} MiB"
    )


@serve.failing_in_a_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="what to serve; default: the server's own")
    parser.add_argument("--server-args", default="", help="more arguments for the server")
    parser.add_argument("--only", nargs="+", help="attacks whose names hold one of these")
    parser.add_argument("--rounds", type=int, default=1, help="how often to go through the list")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds given to an attack")
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--context-len", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    target = Target(args.vocab_size, args.context_len, args.layers)
    chosen = [a for a in ATTACKS if not args.only or any(one in a.name for one in args.only)]
    extra = [*args.server_args.split(), "--trust-request-templates"]
    with serve.own_server(args.model, extra) as url:
        time.sleep(_SETTLED_S)
        pids = children()
        report = []
        for number in range(args.rounds):
            alone, found = asyncio.run(attacked(url, chosen, target, pids, args.patience))
            print(f"round {number + 1}: {line_of(alone, alone)}", flush=True)
            for seen in found:
                print(line_of(seen, alone), flush=True)
            report.append([vars(seen) for seen in (alone, *found)])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
