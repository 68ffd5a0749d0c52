"""What must hold of an engine after every step."""

from collections import Counter

import torch

from engine.blocks import chain_hash, root_hash
from engine.core import EngineCore
from engine.types import Plan, Sequence
from tests.support.scripted import ScriptedModel


def check(core: EngineCore) -> None:
    """Blocks, lanes and the prefix cache are accounted for, and hold what they should."""
    scheduler, lanes = core.scheduler, core.lanes
    running = [sequence for group in scheduler.running for sequence in group.sequences]
    waiting = [sequence for group in scheduler.waiting for sequence in group.sequences]
    for sequence in waiting:
        assert (sequence.lane, sequence.num_computed, sequence.block_table) == (-1, 0, [])
    for group in scheduler.running:
        assert 0 < len(group.live) <= group.strategy.width
    for model in range(len(scheduler.pools)):
        _check_blocks(core, model, [one for one in running if one.model == model])
    live = [sequence for group in scheduler.running for sequence in group.live]
    held = [sequence.lane for sequence in live]
    assert sorted(held + lanes.free) == list(range(lanes.num_lanes))
    assert [one.lane for one in running if one not in live] == [-1] * (len(running) - len(live))
    for sequence in live:
        history = lanes.tokens[sequence.lane, : sequence.position + 1].tolist()
        assert history == sequence.history
    if isinstance(core.model, ScriptedModel):
        _check_cache(core, running)


def check_plan(core: EngineCore, plan: Plan) -> None:
    """A plan keeps to the budget, and the sequences of a group reach their ends together."""
    assert 0 < plan.num_tokens <= core.scheduler.budget
    planned = [chunk.sequence for chunk in plan.chunks]
    assert len({id(sequence) for sequence in planned}) == len(planned)
    chunks = {id(chunk.sequence): chunk for chunk in plan.chunks}
    for group in core.scheduler.running:
        ends = [
            id(sequence) in chunks and chunks[id(sequence)].end == len(sequence.token_ids)
            for sequence in group.to_compute
        ]
        assert all(ends) or not any(ends)


def _check_blocks(core: EngineCore, model: int, running: list[Sequence]) -> None:
    pool = core.scheduler.pools[model]
    uses = Counter(block for sequence in running for block in sequence.block_table)
    assert pool.refs == [uses[block] for block in range(pool.num_blocks)]
    assert sorted(pool.free) == [block for block in range(pool.num_blocks) if not uses[block]]
    named = {key: block for block, key in enumerate(pool.hashes) if key is not None}
    assert named == pool.by_hash
    for sequence in running:
        assert len(sequence.block_table) == pool.blocks_for(sequence.num_computed)
        # One that it shares may go on with another's tokens behind its own.
        full = sequence.block_table[: sequence.num_computed // pool.block_size]
        for block, key in zip(full, sequence.block_hashes, strict=False):
            assert pool.hashes[block] in (None, key)
    for group in (*core.scheduler.running, *core.scheduler.waiting):
        for sequence in group.sequences:
            key = root_hash(group.request.cache_salt)
            ids = [-1 if i in sequence.thoughts else t for i, t in enumerate(sequence.token_ids)]
            for index, known in enumerate(sequence.block_hashes):
                first = index * pool.block_size
                key = chain_hash(key, ids[first : first + pool.block_size])
                assert known == key


def _check_cache(core: EngineCore, running: list[Sequence]) -> None:
    """A scripted model's keys are the tokens and their positions."""
    keys = core.runners[0].cache[0].keys[:, 0, :, :2]
    for sequence in running:
        stored = keys[sequence.block_table].flatten(0, 1)[: sequence.num_computed]
        tokens = torch.tensor(sequence.token_ids[: sequence.num_computed])
        assert torch.equal(stored[:, 0].long(), tokens)
        assert torch.equal(stored[:, 1].long(), torch.arange(len(tokens)))
