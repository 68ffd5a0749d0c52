"""Engines for tests, and ways to run requests through them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.load import load_engine
from engine.messages import Delta, Failed, Finished, Request
from engine.params import SamplingParams
from engine.prepare import ModelInfo, Output, prepare
from engine.tokenizer import Tokenizer
from engine.types import Plan
from server.answers import merge
from tests.support import tiny
from tests.support.invariants import check_plan

EOS = 2


def scripted_core(
    model: Any,
    tokenizer: Tokenizer,
    *,
    num_blocks: int = 64,
    context_len: int | None = None,
    **config: Any,
) -> EngineCore:
    """An engine around a scripted model; options of `EngineConfig` as keywords."""
    settings = {"block_size": 4, "max_num_seqs": 16} | config
    return EngineCore(
        model,
        tokenizer,
        EngineConfig.model_validate(settings),
        num_blocks=num_blocks,
        context_len=context_len or model.context_len,
        device="cpu",
    )


def tiny_core(
    folder: Path, amateur: tuple[str, Path] | None = None, **config: Any
) -> tuple[EngineCore, ModelInfo]:
    """An engine around a model's folder, float32, with the named amateur if there is one."""
    settings = {"dtype": "float32", "block_size": 4, "max_num_seqs": 16, "kv_cache_memory": 1 << 22}
    return load_engine(EngineConfig.model_validate(settings | config), folder, amateur)


def info(core: EngineCore, **changes: Any) -> ModelInfo:
    """What the front end would know of an engine."""
    pool = core.scheduler.pool
    known: dict[str, Any] = {
        "vocab_size": core.vocab_size,
        "context_len": core.lanes.tokens.shape[1],
        "num_lanes": core.lanes.num_lanes,
        "num_blocks": pool.num_blocks,
        "block_size": pool.block_size,
        "eos_token_ids": frozenset({EOS}),
        "dtype": "float32",
        "device": "cpu",
        "model_type": "scripted",
        "identity": "test",
        "num_layers": len(core.model.kv_shapes),
        "has_lens": core.model.has_lens,
    }
    return ModelInfo(**(known | changes))


def request(
    core: EngineCore, prompt_ids: Iterable[int], request_id: str = "r", **options: Any
) -> Request:
    """A prepared request. Options are sampling parameters, fields of `Output`, or of `prepare`.

    `known` is what the front end knows besides.
    """
    known = options.pop("known", {})
    output = {name: options.pop(name) for name in list(options) if name in Output.__annotations__}
    rest = {name: options.pop(name) for name in ("priority", "cache_salt") if name in options}
    given = {"max_tokens": 8, "temperature": 0.0} | options
    return prepare(
        list(prompt_ids),
        SamplingParams.model_validate(given),
        Output(**output),
        info(core, **known),
        core.tokenizer,
        request_id=request_id,
        **rest,
    )


@dataclass
class Results:
    """What came of requests."""

    choices: dict[tuple[str, int], Delta] = field(default_factory=dict)  # merged
    deltas: list[Delta] = field(default_factory=list)  # as they came
    finished: dict[str, Finished] = field(default_factory=dict)
    failed: dict[str, Failed] = field(default_factory=dict)

    def ids(self, request_id: str = "r", index: int = 0) -> list[int]:
        return [token.id for token in self.choices[request_id, index].tokens]

    def text(self, request_id: str = "r", index: int = 0) -> str:
        return self.choices[request_id, index].text

    def merge(self) -> "Results":
        """Put the deltas of each choice together."""
        parts: dict[tuple[str, int], list[Delta]] = {}
        for delta in self.deltas:
            parts.setdefault((delta.request_id, delta.index), []).append(delta)
        self.choices = {key: merge(deltas) for key, deltas in parts.items()}
        return self


def run(core: EngineCore, *requests: Request, max_steps: int = 5000) -> Results:
    """Submit all requests and step until nothing is left to do."""
    for one in requests:
        core.submit(one)
    return drain(core, max_steps)


def drain(core: EngineCore, max_steps: int = 5000) -> Results:
    """Step until nothing is left to do."""
    results = Results()
    for _ in range(max_steps):
        if not core.has_work:
            break
        collect(results, core.step()[0])
    assert not core.has_work, "the engine did not finish"
    return results.merge()


def collect(results: Results, messages: Iterable[Any]) -> None:
    """Sort messages by kind."""
    for message in messages:
        match message:
            case Delta():
                results.deltas.append(message)
            case Finished():
                results.finished[message.request_id] = message
            case Failed():
                results.failed[message.request_id] = message


def record_plans(core: EngineCore) -> list[Plan]:
    """The plans of all steps to come, checked as they are made."""
    plans: list[Plan] = []
    forward = core.runners[0].forward

    def recording(plan: Plan) -> Any:
        check_plan(core, plan)
        plans.append(plan)
        return forward(plan)

    core.runners[0].forward = recording
    return plans


def assert_all_free(core: EngineCore) -> None:
    """Every block and lane has been given back."""
    for pool in core.scheduler.pools:
        assert pool.num_free == pool.num_blocks
        assert all(count == 0 for count in pool.refs)
    lanes = core.lanes
    assert sorted(lanes.free) == list(range(lanes.num_lanes))


def tiny_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the tiny models."""
    tiny.tokenizer().save_pretrained(folder)
    return Tokenizer(folder)
