"""A plan becomes tensors, copies and rows; the cache is as large as the memory granted."""

import ctypes
import mmap
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine import machine, runner
from engine.attention.torch_paged import Span
from engine.config import EngineConfig
from engine.errors import ModelUnavailable
from engine.machine import Room
from engine.memory import Backing
from engine.models.base import KVShape
from engine.runner import CacheSize, Runner, choose_device, count_blocks, free_memory
from engine.strategies.sampling import Sampling
from engine.text import Detokenizer, TextStream
from engine.tokenizer import Tokenizer
from engine.types import BlockCopy, Chunk, Group, Plan, Sequence
from tests.support.engines import request, scripted_core
from tests.support.scripted import ScriptedModel


class Recorder(ScriptedModel):
    """Keeps what it was asked to compute."""

    def forward(self, inputs: Any, cache: Any, attention: Any) -> torch.Tensor:
        self.inputs = inputs
        return super().forward(inputs, cache, attention)


def chunk(tokenizer: Tokenizer, start: int, length: int, blocks: list[int]) -> Chunk:
    """Some tokens of a sequence whose tokens are 10 × the first block + the position."""
    ids = [10 * blocks[0] + position for position in range(start + length)]
    stream = TextStream(Detokenizer(tokenizer, skip_special_tokens=True))
    sequence = Sequence(0, 0, ids, len(ids), stream, num_computed=start, block_table=blocks)
    one = request(scripted_core(ScriptedModel(), tokenizer), ids)
    return Chunk(Group(one, Sampling(1, 1), [sequence]), sequence, start, length)


def test_single_tokens_come_first_and_rows_are_found_by_sequence(tokenizer: Tokenizer) -> None:
    model = Recorder()
    chunks = [
        chunk(tokenizer, 0, 3, [4]),
        chunk(tokenizer, 7, 1, [1, 2]),
        chunk(tokenizer, 4, 2, [5, 6]),
        chunk(tokenizer, 2, 1, [3]),
    ]
    forwarded = Runner(model, 8, 4, "cpu").forward(Plan(chunks, []))
    hidden, first_rows = forwarded.hidden, forwarded.first_rows

    assert model.inputs.token_ids.tolist() == [32, 17, 40, 41, 42, 54, 55]
    assert model.inputs.positions.tolist() == [2, 7, 0, 1, 2, 4, 5]
    assert [first_rows[id(one.sequence)] for one in chunks] == [2, 1, 5, 0]
    assert hidden[:, 0].tolist() == model.inputs.token_ids.tolist()


def test_a_prompt_is_read_at_its_end_unless_its_request_wants_more(tokenizer: Tokenizer) -> None:
    model = Recorder()
    chunks = [chunk(tokenizer, 0, 3, [4]), chunk(tokenizer, 7, 1, [1, 2])]
    runner = Runner(model, 8, 4, "cpu")
    runner.forward(Plan(chunks, []))
    assert model.inputs.read.tolist() == [0, 3]
    group = chunks[0].group
    group.request = replace(group.request, prompt_logprobs=0)
    runner.forward(Plan(chunks, []))
    assert model.inputs.read.tolist() == [0, 1, 2, 3]
    runner.forward(Plan(chunks[1:], []))
    assert model.inputs.read is None


def num_resident(tensor: torch.Tensor) -> int:
    """How many of the pages that lie within a tensor are in memory."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = max(tensor.nbytes // mmap.PAGESIZE - 1, 0) * mmap.PAGESIZE
    pages = (ctypes.c_ubyte * (length // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(length), pages) == 0
    return sum(page & 1 for page in pages)


def test_the_caches_memory_is_there_before_it_is_needed_and_as_it_was(tokenizer: Tokenizer) -> None:
    one = Runner(Recorder(), 1 << 16, 16, "cpu")
    keys, values = one.cache[0].keys, one.cache[0].values
    one.forward(Plan([chunk(tokenizer, 0, 6, [5, 2])], []))
    written = keys[:8].clone()
    while one.back_cache():
        pass
    for tensor in (keys, values):
        assert num_resident(tensor) == tensor.nbytes // mmap.PAGESIZE - 1
    assert torch.equal(keys[:8], written)
    assert not keys[8:].any()


def test_a_busy_engine_stays_ahead_of_what_is_used() -> None:
    """By 2 MiB of each tensor, a part a step; after a step of many tokens by as much as it used."""
    part, page = 2 << 20, mmap.PAGESIZE
    # Straight from the system, whatever the allocator keeps.
    tensors = [torch.frombuffer(mmap.mmap(-1, 16 * part), dtype=torch.uint8) for _ in range(3)]
    backing = Backing(tensors)

    def are_backed(count: int) -> bool:
        """Are the first `count` parts of all tensors there, and those behind the next not?"""
        begun = [num_resident(tensor[: count * part]) for tensor in tensors]
        behind = [num_resident(tensor[(count + 1) * part :]) for tensor in tensors]
        return min(begun) >= count * part // page - 2 and max(behind) <= 2 * (2 << 20) // page

    assert are_backed(0)
    for _ in range(12):
        backing.keep_ahead(0.5 / 16)  # half of the first part is in use
    assert are_backed(2)
    backing.keep_ahead(6.5 / 16)
    for _ in range(12):
        backing.keep_ahead(6.5 / 16)
    assert are_backed(8)
    while backing.more():
        pass
    assert are_backed(16)
    backing.keep_ahead(1.0)
    assert backing.nbytes == 3 * 16 * part


def test_keys_are_written_where_the_block_table_says(tokenizer: Tokenizer) -> None:
    one = Runner(Recorder(), 8, 4, "cpu")
    one.forward(Plan([chunk(tokenizer, 0, 6, [5, 2])], []))
    keys = one.cache[0].keys[:, 0, :, 0]
    assert keys[5].tolist() == [50, 51, 52, 53]
    assert keys[2].tolist() == [54, 55, 0, 0]
    assert keys[[0, 1, 3, 4, 6, 7]].count_nonzero() == 0


def test_blocks_are_copied_before_the_model_runs(tokenizer: Tokenizer) -> None:
    one = Runner(Recorder(), 8, 4, "cpu")
    one.forward(Plan([chunk(tokenizer, 0, 6, [5, 2])], []))
    fork = chunk(tokenizer, 6, 1, [5, 3])
    one.forward(Plan([fork], [BlockCopy(0, 2, 3, 2), BlockCopy(1, 1, 5, 4), BlockCopy(0, 5, 7, 4)]))
    for cache in (one.cache[0].keys, one.cache[0].values):
        assert cache[3, 0, :, 0].tolist() == [54, 55, 56, 0]
        assert cache[2, 0, :, 0].tolist() == [54, 55, 0, 0]
        assert torch.equal(cache[7], cache[5])


def test_scrubbed_blocks_are_zero(tokenizer: Tokenizer) -> None:
    one = Runner(Recorder(), 8, 4, "cpu")
    one.forward(Plan([chunk(tokenizer, 0, 6, [5, 2])], []))
    one.scrub([2])
    assert one.cache[0].keys[2].count_nonzero() == one.cache[0].values[2].count_nonzero() == 0
    assert one.cache[0].keys[5].count_nonzero() > 0


class TwoLayers(ScriptedModel):
    """Layers of different shapes: 2 x (16 + 8) and 1 x (4 + 4) numbers per token."""

    kv_shapes = (KVShape(2, 16, 8), KVShape(1, 4, 4))  # type: ignore[assignment]


TOKEN_BYTES = (48 + 8) * 4


def test_every_layer_has_a_cache_of_its_shape() -> None:
    first, second = Runner(TwoLayers(), 5, 4, "cpu").cache
    assert (first.keys.shape, first.values.shape) == ((5, 2, 4, 16), (5, 2, 4, 8))
    assert (second.keys.shape, second.values.shape) == ((5, 1, 4, 4), (5, 1, 4, 4))
    assert first.keys.dtype == torch.float32
    assert first.keys.count_nonzero() == 0


@pytest.mark.parametrize(
    ("settings", "blocks", "bound"),
    [
        ({"kv_cache_memory": 10 * 4 * TOKEN_BYTES}, 10, "--kv-cache-memory"),
        ({"kv_cache_memory": 11 * 4 * TOKEN_BYTES - 1}, 10, "--kv-cache-memory"),
        # One full context of 256.
        ({"kv_cache_memory": "1TB", "max_num_seqs": 1}, 64, "all that --max-num-seqs 1 can use"),
        (
            {"kv_cache_memory": "1TB", "max_num_seqs": 2, "max_model_len": 10},
            2 * 3,
            "all that --max-num-seqs 2 can use",
        ),
        (
            {"kv_cache_memory": "1TB", "max_num_seqs": 1, "max_model_len": 9999},
            64,
            "all that --max-num-seqs 1 can use",
        ),
        (
            {"kv_cache_fraction": 0.5, "max_num_seqs": 64},
            50,
            "50% of the 87.5 KiB that the box leaves",
        ),
        (
            {"kv_cache_fraction": 0.25, "max_num_seqs": 64},
            25,
            "25% of the 87.5 KiB that the box leaves",
        ),
    ],
)
def test_the_cache_is_as_large_as_granted_and_no_larger_than_useful(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], blocks: int, bound: str
) -> None:
    free = Room(100 * 4 * TOKEN_BYTES, "the box")
    monkeypatch.setattr(runner, "free_memory", lambda _device: free)
    config = EngineConfig.model_validate({"block_size": 4} | settings)
    assert count_blocks([TwoLayers()], config, "cpu") == CacheSize(blocks, bound)


def test_memory_for_less_than_a_block_is_an_error() -> None:
    config = EngineConfig(block_size=4, kv_cache_memory=4 * TOKEN_BYTES - 1)
    with pytest.raises(ModelUnavailable, match=r"--kv-cache-memory.*--block-size"):
        count_blocks([TwoLayers()], config, "cpu")


@pytest.mark.parametrize("memory", ["400GiB", 101 * 4 * TOKEN_BYTES])
def test_more_memory_than_there_is_is_an_error_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch, memory: str | int
) -> None:
    free = Room(100 * 4 * TOKEN_BYTES, "the box")
    monkeypatch.setattr(runner, "free_memory", lambda _device: free)
    config = EngineConfig.model_validate({"block_size": 4, "kv_cache_memory": memory})
    with pytest.raises(ModelUnavailable) as caught:
        count_blocks([TwoLayers()], config, "cpu")
    assert re.fullmatch(
        r"the KV cache \(--kv-cache-memory\) takes (88\.4 KiB|14\.0 MiB) of memory, and the box "
        r"leaves 87\.5 KiB",
        str(caught.value),
    )


def test_free_memory_of_the_cpu_is_what_the_machine_and_its_limits_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: Room(5, "the box"))
    assert free_memory("cpu") == Room(5, "the box")


@pytest.mark.parametrize(
    ("name", "available", "device"),
    [
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        ("cpu", True, "cpu"),
        ("cuda:1", True, "cuda:1"),
    ],
)
def test_auto_takes_what_is_there(
    monkeypatch: pytest.MonkeyPatch, name: str, available: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device(name) == device


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelUnavailable, match="cuda:0"):
        choose_device("cuda:0")


def test_block_tables_longer_than_the_context_are_not_read(tokenizer: Tokenizer) -> None:
    one = Runner(Recorder(), 8, 4, "cpu")
    span = Span(0, 4, [5, 2, 3])
    assert span.context_len == 4
    one.forward(Plan([chunk(tokenizer, 0, 4, [5, 2, 3])], []))
    assert one.cache[0].keys[[2, 3]].count_nonzero() == 0
