"""Decide what each step computes, and carry out what strategies decide.

There are no phases: a sequence is a list of tokens and a count of those computed, and a step gives
each some more of its uncomputed tokens. Prefill, chunked prefill, decoding, prefix-cache hits and
recovery from preemption are this one rule at different counts.
"""

import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from engine.blocks import BlockPool, chain_hash, root_hash
from engine.growth import grow
from engine.lanes import Lanes
from engine.sampler import Sampler
from engine.strategies.base import Branch
from engine.types import BlockCopy, Chunk, Group, Plan, Sequence

_LEAST_BESIDE = 16  # prompt tokens beside running sequences, however few those are
_PLACEHOLDER = 0  # the token id of a thought, which nobody reads


class Scheduler:
    """Owns groups, sequences, blocks and lanes. Used by the engine thread only.

    Groups run in the order of priority, then arrival. If memory is short the last one that is not
    planned yet is preempted: blocks and lanes go, tokens stay, and it waits at its place in the
    queue to be admitted again, mostly from the prefix cache. `pools` has one for each model.
    """

    def __init__(
        self,
        pools: Seq[BlockPool],
        lanes: Lanes,
        sampler: Sampler,
        *,
        budget: int,
        prefix_cache: bool,
        prefill_ratio: int | None = None,
    ) -> None:
        self.pools = pools
        self.lanes = lanes
        self.sampler = sampler
        self.budget = budget
        self.prefill_ratio = prefill_ratio
        self.prefix_cache = prefix_cache
        self.waiting: list[Group] = []
        self.running: list[Group] = []
        self.cache_queries = 0
        self.cache_hits = 0
        self.num_preemptions = 0
        self._appended: tuple[list[int], list[int], list[int]] = ([], [], [])
        self._forked: dict[int, tuple[int, int]] = {}  # lane -> whose copy it is, and its seed

    @property
    def pool(self) -> BlockPool:
        """The pool of the model that is served."""
        return self.pools[0]

    # -- coming and going

    def add(self, group: Group) -> None:
        """Queue a group behind those of its priority."""
        self.waiting.append(group)
        self.waiting.sort(key=_turn)

    def abort(self, request_id: str) -> Group | None:
        """Forget a group and free what it holds; None if it is not here."""
        for group in (*self.waiting, *self.running):
            if group.request.request_id == request_id:
                self.drop(group)
                return group
        return None

    def drop(self, group: Group) -> None:
        """Take a group out, whatever its state; one that has ended is in no queue."""
        for sequence in group.sequences:
            self._free(sequence)
        group.live, group.asleep = [], []
        for queue in (self.running, self.waiting):
            if group in queue:
                queue.remove(group)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # -- planning

    def plan(self) -> Plan:
        """Choose this step's tokens, and the memory they need.

        First groups that need one token per sequence, then those catching up, then those waiting.
        """
        plan = Plan([], [])
        budget = self.budget
        preempted = self.num_preemptions
        planned: set[int] = set()
        shared = False
        behind = {id(group) for group in self.running if _catching_up(group)}
        for group in sorted(self.running, key=lambda group: id(group) in behind):
            if preempted != self.num_preemptions and group not in self.running:
                continue
            if id(group) in behind and not shared:
                budget, shared = self._beside(plan, budget), True
            chunks = self._chunks(group, budget)
            while not self._reserve(group, chunks, plan):
                victim = next(g for g in reversed(self.running) if id(g) not in planned)
                self._preempt(victim)
                if victim is group:
                    break
            else:
                planned.add(id(group))
                budget -= sum(chunk.length for chunk in chunks)
        if preempted == self.num_preemptions:
            self._admit_waiting(plan, budget if shared else self._beside(plan, budget))
        return plan

    def _beside(self, plan: Plan, budget: int) -> int:
        """What is left for prompts beside the sequences that get a token in this step."""
        if self.prefill_ratio is None or not plan.chunks:
            return budget
        return min(budget, max(_LEAST_BESIDE, self.prefill_ratio * len(plan.chunks)))

    def _admit_waiting(self, plan: Plan, budget: int) -> None:
        while self.waiting and budget > 0:
            group = self.waiting[0]
            if not self._admit(group):
                return
            chunks = self._chunks(group, budget)
            if not self._reserve(group, chunks, plan):
                self._preempt(group)
                return
            budget -= sum(chunk.length for chunk in chunks)

    def _chunks(self, group: Group, budget: int) -> list[Chunk]:
        """As many of a group's uncomputed tokens as the budget allows.

        A group moves together: the last token of each sequence is computed in the same step, or
        a strategy would see only some of its rows. If not all fit, each stops one token short.
        """
        sequences = group.to_compute
        whole = sum(sequence.num_uncomputed for sequence in sequences) <= budget
        chunks = []
        for sequence in sequences:
            limit = sequence.num_uncomputed - (not whole and len(sequences) > 1)
            length = min(limit, budget)
            if length > 0:
                chunks.append(Chunk(group, sequence, sequence.num_computed, length))
                budget -= length
        return chunks

    def _reserve(self, group: Group, chunks: list[Chunk], plan: Plan) -> bool:
        """Take the blocks the chunks write to and add them to the plan, or change nothing.

        Sleepers' blocks are only kept while nobody needs them.
        """
        writers = [chunk for chunk in chunks if not self._has_room(chunk)]
        if not self._fit(writers):
            for sequence in group.asleep:
                self._free(sequence)
                if sequence.companion is not None:
                    self._free(sequence.companion)
            if not self._fit(writers):
                return False
        for chunk in writers:
            pool, table = self.pools[chunk.sequence.model], chunk.sequence.block_table
            index = chunk.start // pool.block_size
            if index < len(table) and pool.refs[table[index]] > 1:
                shared = table[index]
                (table[index],) = pool.take(1)
                pool.release([shared])
                kept = chunk.start % pool.block_size
                plan.copies.append(BlockCopy(chunk.sequence.model, shared, table[index], kept))
            table += pool.take(pool.blocks_for(chunk.end) - len(table))
        plan.chunks.extend(chunks)
        return True

    def _has_room(self, chunk: Chunk) -> bool:
        """Does it write to blocks that its sequence has, and has for itself?"""
        pool, table = self.pools[chunk.sequence.model], chunk.sequence.block_table
        if chunk.end > len(table) * pool.block_size:
            return False
        return pool.refs[table[chunk.start // pool.block_size]] == 1

    def _fit(self, chunks: Iterable[Chunk]) -> bool:
        """Are there blocks for all of these?

        Each writer of a shared block takes a copy, but the last one, who has it then for itself.
        """
        needed = [0] * len(self.pools)
        refs: dict[tuple[int, int], int] = {}
        for chunk in chunks:
            model, table = chunk.sequence.model, chunk.sequence.block_table
            pool = self.pools[model]
            needed[model] += max(pool.blocks_for(chunk.end) - len(table), 0)
            index = chunk.start // pool.block_size
            if index < len(table):
                block = table[index]
                holders = refs.setdefault((model, block), pool.refs[block])
                needed[model] += holders > 1
                refs[model, block] = max(holders - 1, 1)
        return all(n <= pool.num_free for n, pool in zip(needed, self.pools, strict=True))

    # -- admission and preemption

    def _admit(self, group: Group) -> bool:
        """Give a waiting group lanes and what the prefix cache has of it, if it would fit."""
        sequences = group.to_compute
        taken = sum(other.strategy.width for other in self.running)
        if taken + group.strategy.width > self.lanes.num_lanes:
            return False
        for sequence in sequences:
            pool = self.pools[sequence.model]
            sequence.block_table = pool.share(self._cached(group, sequence))
        needed = [0] * len(self.pools)
        for sequence in sequences:
            blocks = self.pools[sequence.model].blocks_for(len(sequence.token_ids))
            needed[sequence.model] += blocks - len(sequence.block_table)
        if any(n > pool.num_free for n, pool in zip(needed, self.pools, strict=True)):
            for sequence in sequences:
                self._free(sequence)
            return False
        for sequence in sequences:
            size = self.pools[sequence.model].block_size
            sequence.num_computed = len(sequence.block_table) * size
        for sequence in group.live:
            self._take_lane(group, sequence)
        if not group.scheduled_s:
            group.scheduled_s = time.monotonic()
            group.cached_tokens = sequences[0].num_computed
            self.cache_queries += sequences[0].prompt_len
            self.cache_hits += group.cached_tokens
        self.waiting.remove(group)
        self.running.append(group)
        self.running.sort(key=_turn)
        return True

    def _take_lane(self, group: Group, sequence: Sequence, source: int = -1) -> None:
        """Give a sequence a lane: a copy of another, or one written from its own history."""
        lane = sequence.lane = self.lanes.take()
        if source >= 0:
            self._forked[lane] = source, sequence.seed
            return
        prompt_len = sequence.prompt_len - sequence.num_hidden
        self.lanes.write(lane, sequence.history, prompt_len, sequence.seed)
        self.sampler.admit(lane, group.request, group.strategy.wants)
        if sequence.state:
            self.lanes.restore(lane, sequence.state)

    def _leave_lane(self, sequence: Sequence) -> None:
        if sequence.lane >= 0:
            self._forked.pop(sequence.lane, None)
            self.lanes.release(sequence.lane)
            sequence.lane = -1

    def _preempt(self, group: Group) -> None:
        for sequence in group.live:
            sequence.state = self.lanes.save(sequence.lane)
        for sequence in group.sequences:
            self._free(sequence)
        self.running.remove(group)
        self.waiting.append(group)
        self.waiting.sort(key=_turn)
        group.num_preemptions += 1
        self.num_preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        self.pools[sequence.model].release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        self._leave_lane(sequence)

    # -- the prefix cache

    def _cached(self, group: Group, sequence: Sequence) -> list[int]:
        """Cached blocks of a sequence's beginning; its last token is always computed."""
        if not self.prefix_cache or group.reads_prompt:
            return []  # what is cached has no hidden states
        pool = self.pools[sequence.model]
        # What a thought becomes the input of is only known where it is computed.
        known = min(sequence.thoughts, default=len(sequence.token_ids))
        full = (min(known, len(sequence.token_ids)) - 1) // pool.block_size
        self._hash_blocks(group, sequence, full)
        return pool.find(sequence.block_hashes[:full])

    def _hash_blocks(self, group: Group, sequence: Sequence, count: int) -> None:
        size, hashes = self.pool.block_size, sequence.block_hashes
        for index in range(len(hashes), count):
            previous = hashes[-1] if hashes else root_hash(group.request.cache_salt)
            # A thought is known by its place behind the prompt, not by what stands for it.
            tokens = [
                -1 if at in sequence.thoughts else sequence.token_ids[at]
                for at in range(index * size, (index + 1) * size)
            ]
            hashes.append(chain_hash(previous, tokens))

    # -- after the forward pass

    def computed(self, plan: Plan) -> None:
        """Count the plan's tokens as computed; full blocks enter the prefix cache."""
        for chunk in plan.chunks:
            sequence, pool = chunk.sequence, self.pools[chunk.sequence.model]
            sequence.num_computed = chunk.end
            first, full = chunk.start // pool.block_size, chunk.end // pool.block_size
            if self.prefix_cache and first < full:
                self._hash_blocks(chunk.group, sequence, full)
                for index in range(first, full):
                    pool.register(sequence.block_table[index], sequence.block_hashes[index])
        for group in plan.groups:
            copies = len(group.live) > 1 and all(seq.num_generated == 0 for seq in group.live)
            if copies and not group.thinks and _complete(group):
                self._share_prompt(group.live[0], group.live[1:])

    def _share_prompt(self, first: Sequence, others: Iterable[Sequence]) -> None:
        """Copies of a prompt get the blocks of the one that was computed."""
        for sequence in others:
            self.pools[sequence.model].release(sequence.block_table)
            sequence.block_table = self.pools[first.model].share(first.block_table)
            sequence.block_hashes = first.block_hashes.copy()
            sequence.num_computed = first.num_computed
            if first.companion is not None and sequence.companion is not None:
                self._share_prompt(first.companion, [sequence.companion])

    def ready(self, plan: Plan) -> list[Group]:
        """The groups of a plan whose every live sequence has its last token computed."""
        return [group for group in plan.groups if group.live and _complete(group)]

    def think(self, group: Group, hidden: Tensor) -> None:
        """Let the last hidden state [H] be the next input, in place of a token's embedding.

        Behind the last thought come the request's `end_ids`.
        """
        thoughts = {**group.live[0].thoughts, len(group.live[0].token_ids): hidden}
        added = [_PLACEHOLDER]
        if len(thoughts) == group.request.num_thoughts:
            added += group.request.end_ids
        for sequence in group.live:
            sequence.thoughts = thoughts
            sequence.token_ids += added
            sequence.prompt_len += len(added)
            sequence.num_hidden += len(added)

    def commit(self, group: Group, branches: list[Branch]) -> None:
        """Append, fork, drop, finish, put to sleep and wake sequences as the strategy wants.

        Whatever ends or falls asleep gives its lane back before a fork takes one, so a group never
        holds more lanes than its strategy's width.
        """
        parents = [*group.live, *group.asleep]
        heirs: dict[int, list[Sequence]] = {id(parent): [] for parent in parents}
        last = {id(branch.parent): index for index, branch in enumerate(branches)}
        live: list[Sequence] = []
        asleep: list[Sequence] = []
        reseeded: list[Sequence] = []
        starts: dict[int, int] = {}  # how long each heir was before this step
        for index, branch in enumerate(branches):
            parent = branch.parent
            # A parent becomes its last branch; those before are copies of it.
            sequence = parent if last[id(parent)] == index else self._fork(parent)
            starts[id(sequence)] = len(sequence.token_ids)
            grow(group.request, sequence, branch)
            if branch.seed is not None:
                reseeded.append(sequence)
            if sequence.finish_reason is not None:
                group.finished.append(sequence)
            else:
                heirs[id(parent)].append(sequence)
                (asleep if branch.asleep else live).append(sequence)
        if len(live) > group.strategy.width:
            raise ValueError("the strategy returned more branches than its width")
        if not live and asleep:
            raise ValueError("the strategy lets every sequence sleep")
        if not live and not group.finished:
            raise ValueError("the strategy dropped every sequence")
        if live == group.live and not group.asleep and not reseeded:
            for sequence in live:  # all go on as they are
                self._note_appended(sequence, starts[id(sequence)])
            return
        awake = {id(sequence) for sequence in live}
        newcomers: list[tuple[Sequence, int]] = []  # who need a lane, and whose to copy, or -1
        for parent in parents:
            its = heirs[id(parent)]
            goes_on = len(its) == 1 and its[0] is parent and id(parent) in awake
            if not goes_on or parent.lane < 0:
                newcomers += self._hand_over(parent, its, awake)
        for sequence, source in newcomers:
            self._take_lane(group, sequence, source)
        for sequence in reseeded:
            if sequence.lane >= 0:
                self.lanes.seeds[sequence.lane] = sequence.seed
        written = {id(sequence) for sequence, source in newcomers if source < 0}
        for sequence in live:
            if id(sequence) not in written:
                self._note_appended(sequence, starts[id(sequence)])
        group.live, group.asleep = live, asleep
        if not live:
            self.running.remove(group)

    def flush(self) -> None:
        """Write what was committed since the last call to the lanes, all at once."""
        if self._forked:
            children = list(self._forked)
            parents = [parent for parent, _ in self._forked.values()]
            self.lanes.fork(parents, children)
            self.sampler.fork(parents, children)
            seeds = [seed for _, seed in self._forked.values()]
            self.lanes.seeds[children] = torch.tensor(seeds, device=self.lanes.device)
            self._forked = {}
        self.lanes.append(*self._appended)
        self._appended = ([], [], [])

    def _hand_over(
        self, parent: Sequence, heirs: list[Sequence], awake: set[int]
    ) -> list[tuple[Sequence, int]]:
        """Pass a parent's blocks and lane on to its heirs, itself among them or not.

        Returns those who still need a lane, with the lane to copy, -1 if there is none.
        """
        self._divide(parent, heirs)
        if parent.companion is not None:
            companions = [heir.companion for heir in heirs if heir.companion is not None]
            self._divide(parent.companion, companions)
        lane, parent.lane = parent.lane, -1
        waking = [heir for heir in heirs if id(heir) in awake]
        if lane < 0:
            return [(heir, -1) for heir in waking]
        if len(waking) < len(heirs):
            state = self.lanes.save(lane)
            for heir in heirs:
                heir.state = state
        if not waking:
            self.lanes.release(lane)
            return []
        keeper = parent if any(heir is parent for heir in waking) else waking[0]
        keeper.lane = lane
        return [(heir, lane) for heir in waking if heir is not keeper]

    def _divide(self, parent: Sequence, heirs: list[Sequence]) -> None:
        """All heirs get the parent's blocks; without any, they are free."""
        pool, table = self.pools[parent.model], parent.block_table
        if not any(heir is parent for heir in heirs):
            parent.block_table = []
        for heir in heirs:
            heir.block_table = table if heir is parent else pool.share(table)
        if parent.block_table is not table:
            pool.release(table)

    def _note_appended(self, sequence: Sequence, start: int) -> None:
        lanes, positions, token_ids = self._appended
        for index in range(start, len(sequence.token_ids)):
            lanes.append(sequence.lane)
            positions.append(index - sequence.num_hidden)
            token_ids.append(sequence.token_ids[index])

    def _fork(self, parent: Sequence) -> Sequence:
        companion = parent.companion
        return replace(
            parent,
            token_ids=parent.token_ids.copy(),
            block_hashes=parent.block_hashes.copy(),
            stream=parent.stream.fork(),
            companion=None if companion is None else self._fork(companion),
            scores=parent.scores.copy(),
            report=parent.report.copy(),
            block_table=[],
            lane=-1,
        )


def _complete(group: Group) -> bool:
    """Is the last token of each of its sequences computed?"""
    return all(sequence.num_uncomputed == 0 for sequence in group.to_compute)


def _turn(group: Group) -> tuple[int, float]:
    return group.request.priority, group.request.arrival_s


def _catching_up(group: Group) -> bool:
    return any(sequence.num_uncomputed > 1 for sequence in group.to_compute)
