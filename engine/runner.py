"""Turn a plan into tensors, run the model, hold the KV cache. The only code that knows of CUDA."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import machine
from engine.attention import Attention, choose_attention
from engine.attention.torch_paged import LayerCache, Span
from engine.config import EngineConfig, shown_size
from engine.errors import ModelUnavailable
from engine.kernels import native
from engine.machine import Room
from engine.memory import Backing
from engine.models.base import ForwardInput, Model, Probe
from engine.numerics import integers
from engine.probing import Probed
from engine.types import BlockCopy, Chunk, Plan


def choose_device(name: str) -> str:
    """ "auto" as a device that is here. Raises ModelUnavailable if a named one is not."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if cuda else "cpu"
    if name.startswith("cuda") and not cuda:
        raise ModelUnavailable(f"device {name} was asked for, but torch finds no CUDA device")
    return name


_BACKED_BYTES = 1 << 30  # of a cache, while there is nothing else to do


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What a step computed: hidden states [T, H], and where in them each sequence's begin and end.

    The rows go by the id() of the sequence. `probed` is what requests wanted to see besides.
    """

    hidden: Tensor
    first_rows: dict[int, int]
    last_rows: dict[int, int]
    probed: Probed | None = None


class Runner:
    """Owns the KV cache of the model's layers and runs steps."""

    def __init__(
        self,
        model: Model,
        num_blocks: int,
        block_size: int,
        device: str,
        index: int = 0,
        batch_invariant: bool = False,
    ) -> None:
        self.model = model
        self.index = index  # among the engine's models
        self.device = device
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.attention: Attention = choose_attention(block_size, device, batch_invariant)
        self.cache = [
            LayerCache(
                _zeros((num_blocks, shape.heads, block_size, shape.key_dim), model.dtype, device),
                _zeros((num_blocks, shape.heads, block_size, shape.value_dim), model.dtype, device),
            )
            for shape in model.kv_shapes
        ]
        tensors = [tensor for layer in self.cache for tensor in (layer.keys, layer.values)]
        self._backing = Backing(tensors if device == "cpu" else [])

    def back_cache(self) -> bool:
        """Have a little more of the cache in memory before it is needed; False if that is done.

        Up to the cache's first GiB: what has never been used costs nobody memory.
        """
        return self._backing.nbytes < _BACKED_BYTES and self._backing.more()

    def forward(self, plan: Plan) -> Forwarded | None:
        """Compute the plan's tokens for this model; None if there are none."""
        copies = [copy for copy in plan.copies if copy.model == self.index]
        if copies:
            self._copy_blocks(copies)
        chunks = [chunk for chunk in plan.chunks if chunk.sequence.model == self.index]
        if not chunks:
            return None
        last_block = max(chunk.sequence.block_table[-1] for chunk in chunks)
        self._backing.keep_ahead((last_block + 1) / self.num_blocks)
        # Single tokens first, by context length, so that attention can batch them.
        chunks.sort(key=lambda chunk: (chunk.length > 1, chunk.end))
        first_rows = _first_rows(chunks)
        last_rows = {id(c.sequence): first_rows[id(c.sequence)] + c.length - 1 for c in chunks}
        probed = self._probed(chunks, last_rows)
        inputs = ForwardInput(
            self._tensor(
                [i for chunk in chunks for i in chunk.sequence.token_ids[chunk.start : chunk.end]]
            ),
            self._tensor([i for chunk in chunks for i in range(chunk.start, chunk.end)]),
            self.attention.plan(
                [Span(chunk.start, chunk.length, chunk.sequence.block_table) for chunk in chunks]
            ),
            None if probed is None else probed.probe,
            *self._thoughts(chunks, first_rows),
            _read(chunks, first_rows, last_rows) if probed is None else None,
        )
        hidden = self.model.forward(inputs, self.cache, self.attention)
        return Forwarded(hidden, first_rows, last_rows, probed)

    def probe(self, block: int) -> None:
        """Compute a token in a block that nobody has. Raises whatever the model raises."""
        ids = self._tensor([0])
        plan = self.attention.plan([Span(0, 1, [block])])
        hidden = self.model.forward(ForwardInput(ids, ids, plan), self.cache, self.attention)
        self.model.logits(hidden)
        self.scrub([block])

    def _thoughts(
        self, chunks: list[Chunk], first_rows: dict[int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The tokens whose inputs are not embeddings [m], and these inputs [m, H]."""
        rows: list[int] = []
        inputs: list[Tensor] = []
        for chunk in chunks:
            for position, thought in chunk.sequence.thoughts.items():
                if chunk.start <= position < chunk.end:
                    rows.append(first_rows[id(chunk.sequence)] + position - chunk.start)
                    inputs.append(thought)
        return (self._tensor(rows), torch.stack(inputs)) if rows else (None, None)

    def _probed(self, chunks: list[Chunk], last_rows: dict[int, int]) -> Probed | None:
        """A probe of the tokens that requests want to see: the newest, or those explained."""
        rows: list[int] = []
        places: dict[tuple[int, int], int] = {}
        for chunk in chunks:
            if not chunk.group.probes or self.index:
                continue
            request, sequence = chunk.group.request, chunk.sequence
            wanted = [position - 1 for position in request.explained]
            if wanted and request.params.reads_layers:
                # A filter with feedback looks at all output tokens before the last one too.
                wanted = sorted({*wanted, *range(sequence.prompt_len - 1, wanted[-1])})
            if chunk.end == len(sequence.token_ids) and not wanted:
                wanted = [chunk.end - 1]
            for position in wanted:
                if chunk.start <= position < chunk.end:
                    places[id(sequence), position] = len(rows)
                    rows.append(last_rows[id(sequence)] - (chunk.end - 1 - position))
        return Probed(Probe(self._tensor(rows)), self.cache, places) if rows else None

    def scrub(self, blocks: list[int]) -> None:
        """Forget what blocks hold: a NaN in them would spread through masked padding."""
        for layer in self.cache:
            layer.keys[blocks] = 0
            layer.values[blocks] = 0

    def _copy_blocks(self, copies: list[BlockCopy]) -> None:
        tensors = [tensor for layer in self.cache for tensor in (layer.keys, layer.values)]
        if native.LIBRARY is not None and self.device == "cpu":
            numbers = [(copy.source, copy.target, copy.num_tokens) for copy in copies]
            native.LIBRARY.copy_blocks(tensors, torch.tensor(numbers))
            return
        sources = self._tensor([copy.source for copy in copies])
        targets = self._tensor([copy.target for copy in copies])
        for tensor in tensors:
            tensor[targets] = tensor[sources]

    def _tensor(self, values: list[int]) -> Tensor:
        return integers(values, self.device)


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How many KV-cache blocks each model gets, and what it is that allows no more."""

    num_blocks: int
    bound: str


def count_blocks(models: Seq[Model], config: EngineConfig, device: str) -> CacheSize:
    """How many KV-cache blocks of each model fit into the memory the configuration grants.

    Never more than all lanes at full length could use. Raises ModelUnavailable if not even one
    sequence of a single block fits, or if there is less memory than is granted.
    """
    token_bytes = sum(
        shape.numel * model.dtype.itemsize for model in models for shape in model.kv_shapes
    )
    block_bytes = token_bytes * config.block_size
    room = free_memory(device)
    granted, bound = config.kv_cache_memory, "--kv-cache-memory"
    if granted is None:
        granted = int(room.free * config.kv_cache_fraction)
        of = f"{shown_size(room.free)} that {room.bound} leaves"
        bound = f"{config.kv_cache_fraction:.0%} of the {of}"
    longest = models[0].context_len
    context_len = min(config.max_model_len or longest, longest)
    useful = config.max_num_seqs * -(-context_len // config.block_size)
    num_blocks = granted // block_bytes
    if num_blocks < 1:
        raise ModelUnavailable(
            f"the KV cache has {granted} bytes ({bound}) and one block of {config.block_size} "
            f"tokens needs {block_bytes}; raise --kv-cache-memory or lower --block-size"
        )
    if num_blocks >= useful:
        num_blocks, bound = useful, f"all that --max-num-seqs {config.max_num_seqs} can use"
    room.require(num_blocks * block_bytes, "the KV cache (--kv-cache-memory)")
    return CacheSize(num_blocks, bound)


def free_memory(device: str) -> Room:
    """What can still be allocated on a device."""
    if device == "cpu":
        return machine.free_memory()
    return Room(int(torch.cuda.mem_get_info(device)[0]), f"the memory of {device}")


def _first_rows(chunks: list[Chunk]) -> dict[int, int]:
    rows: dict[int, int] = {}
    row = 0
    for chunk in chunks:
        rows[id(chunk.sequence)] = row
        row += chunk.length
    return rows


def _read(
    chunks: list[Chunk], first_rows: dict[int, int], last_rows: dict[int, int]
) -> Tensor | None:
    """The tokens whose hidden states somebody looks at [n], on the CPU; None if each is one."""
    if chunks[-1].length == 1:  # single tokens come first
        return None
    rows: list[int] = []
    for chunk in chunks:
        last = last_rows[id(chunk.sequence)]
        first = first_rows[id(chunk.sequence)] if chunk.group.reads_prompt else last
        rows += range(first, last + 1)
    return integers(rows)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeroed pages, which cost nothing until they are written.
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
