"""Decide what each step computes, and carry out what strategies decide.

There are no phases: a sequence is a list of tokens and a count of those computed, and a step gives
each some more of its uncomputed tokens. Prefill, chunked prefill, decoding, prefix-cache hits and
recovery from preemption are this one rule at different counts.
"""

import time
from collections.abc import Iterable
from dataclasses import replace

from engine.blocks import BlockPool, chain_hash, root_hash
from engine.lanes import Lanes
from engine.sampler import NO_VALID_TOKEN, Sampler
from engine.strategies.base import Branch
from engine.types import Chunk, FinishReason, Group, Plan, Request, Sequence, Token


class Scheduler:
    """Owns groups, sequences, blocks and lanes. Used by the engine thread only.

    Groups run in the order of priority, then arrival. If memory is short the last one that is not
    planned yet is preempted: blocks and lanes go, tokens stay, and it waits at its place in the
    queue to be admitted again, mostly from the prefix cache.
    """

    def __init__(
        self,
        pool: BlockPool,
        lanes: Lanes,
        sampler: Sampler,
        *,
        budget: int,
        prefix_cache: bool,
    ) -> None:
        self.pool = pool
        self.lanes = lanes
        self.sampler = sampler
        self.budget = budget
        self.prefix_cache = prefix_cache
        self.waiting: list[Group] = []
        self.running: list[Group] = []
        self.cache_queries = 0
        self.cache_hits = 0
        self.num_preemptions = 0
        self._appended: tuple[list[int], list[int], list[int]] = ([], [], [])

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
        """Take a group out, whatever its state."""
        for sequence in group.live:
            self._free(sequence)
        group.live = []
        (self.running if group in self.running else self.waiting).remove(group)

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
        for group in sorted(self.running, key=_catching_up):
            if group not in self.running:
                continue
            chunks = self._chunks(group, budget)
            while not self._reserve(chunks, plan):
                victim = next(g for g in reversed(self.running) if id(g) not in planned)
                self._preempt(victim)
                if victim is group:
                    break
            else:
                planned.add(id(group))
                budget -= sum(chunk.length for chunk in chunks)
        if preempted == self.num_preemptions:
            self._admit_waiting(plan, budget)
        return plan

    def _admit_waiting(self, plan: Plan, budget: int) -> None:
        while self.waiting and budget > 0:
            group = self.waiting[0]
            if not self._admit(group):
                return
            chunks = self._chunks(group, budget)
            if not self._reserve(chunks, plan):
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

    def _reserve(self, chunks: list[Chunk], plan: Plan) -> bool:
        """Take the blocks the chunks write to and add them to the plan, or change nothing."""
        if self._blocks_needed(chunks) > self.pool.num_free:
            return False
        for chunk in chunks:
            table = chunk.sequence.block_table
            index = chunk.start // self.pool.block_size
            if index < len(table) and self.pool.refs[table[index]] > 1:
                shared = table[index]
                (table[index],) = self.pool.take(1)
                self.pool.release([shared])
                plan.copies.append((shared, table[index]))
            table += self.pool.take(self.pool.blocks_for(chunk.end) - len(table))
        plan.chunks.extend(chunks)
        return True

    def _blocks_needed(self, chunks: Iterable[Chunk]) -> int:
        """New blocks, counting the copy each writer of a shared block but the last one takes."""
        needed = 0
        refs: dict[int, int] = {}
        for chunk in chunks:
            table = chunk.sequence.block_table
            needed += max(self.pool.blocks_for(chunk.end) - len(table), 0)
            index = chunk.start // self.pool.block_size
            if index < len(table):
                block = table[index]
                holders = refs.setdefault(block, self.pool.refs[block])
                needed += holders > 1
                refs[block] = max(holders - 1, 1)
        return needed

    # -- admission and preemption

    def _admit(self, group: Group) -> bool:
        """Give a waiting group lanes and what the prefix cache has of it, if it would fit."""
        sequences = group.to_compute
        taken = sum(other.strategy.width for other in self.running)
        if taken + group.strategy.width > self.lanes.num_lanes:
            return False
        cached = {id(sequence): self._cached(group, sequence) for sequence in sequences}
        for sequence in sequences:
            sequence.block_table = self.pool.share(cached[id(sequence)])
        needed = sum(
            self.pool.blocks_for(len(sequence.token_ids)) - len(sequence.block_table)
            for sequence in sequences
        )
        if needed > self.pool.num_free:
            for sequence in sequences:
                self.pool.release(sequence.block_table)
                sequence.block_table = []
            return False
        for sequence in sequences:
            sequence.num_computed = len(sequence.block_table) * self.pool.block_size
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

    def _take_lane(self, group: Group, sequence: Sequence) -> None:
        lane = sequence.lane = self.lanes.take()
        self.lanes.write(lane, sequence.token_ids, sequence.prompt_len, sequence.seed)
        self.sampler.admit(lane, group.request)
        if sequence.state:
            self.lanes.restore(lane, sequence.state)

    def _preempt(self, group: Group) -> None:
        for sequence in group.live:
            sequence.state = self.lanes.save(sequence.lane)
            self._free(sequence)
        self.running.remove(group)
        self.waiting.append(group)
        self.waiting.sort(key=_turn)
        group.num_preemptions += 1
        self.num_preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        if sequence.lane >= 0:
            self.lanes.release(sequence.lane)
            sequence.lane = -1

    # -- the prefix cache

    def _cached(self, group: Group, sequence: Sequence) -> list[int]:
        """Cached blocks of a sequence's beginning; its last token is always computed."""
        request = group.request
        if not self.prefix_cache or request.prompt_logprobs is not None or request.explained:
            return []  # what is cached has no hidden states to look at
        full = (len(sequence.token_ids) - 1) // self.pool.block_size
        self._hash_blocks(group, sequence, full)
        return self.pool.find(sequence.block_hashes[:full])

    def _hash_blocks(self, group: Group, sequence: Sequence, count: int) -> None:
        size, hashes = self.pool.block_size, sequence.block_hashes
        for index in range(len(hashes), count):
            previous = hashes[-1] if hashes else root_hash(group.request.cache_salt)
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            hashes.append(chain_hash(previous, tokens))

    # -- after the forward pass

    def computed(self, plan: Plan) -> None:
        """Count the plan's tokens as computed; full blocks enter the prefix cache."""
        size = self.pool.block_size
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.end
            if self.prefix_cache:
                self._hash_blocks(chunk.group, sequence, chunk.end // size)
                for index in range(chunk.start // size, chunk.end // size):
                    self.pool.register(sequence.block_table[index], sequence.block_hashes[index])
            if sequence.num_uncomputed == 0 and sequence.num_generated == 0:
                self._share_prompt(chunk.group, sequence)

    def _share_prompt(self, group: Group, first: Sequence) -> None:
        """Copies of a prompt get the blocks of the one that was computed."""
        for sequence in group.live:
            if sequence is not first and sequence.num_computed == 0:
                sequence.block_table = self.pool.share(first.block_table)
                sequence.block_hashes = first.block_hashes.copy()
                sequence.num_computed = first.num_computed

    def ready(self, plan: Plan) -> list[Group]:
        """The groups of a plan whose every live sequence has its last token computed."""
        groups = {id(chunk.group): chunk.group for chunk in plan.chunks}
        return [
            group
            for group in groups.values()
            if group.live and all(sequence.num_uncomputed == 0 for sequence in group.live)
        ]

    def commit(self, group: Group, branches: list[Branch]) -> None:
        """Append, fork, drop and finish sequences as the strategy wants.

        Whatever ends gives its lane back before a fork takes one, so a group never holds more
        lanes than its strategy's width.
        """
        heirs: dict[int, list[Sequence]] = {id(parent): [] for parent in group.live}
        last = {id(branch.parent): index for index, branch in enumerate(branches)}
        live: list[tuple[Sequence, int]] = []  # with the length before this step
        for index, branch in enumerate(branches):
            parent = branch.parent
            family = heirs[id(parent)]
            # A parent becomes its last branch; those before are copies of it.
            sequence = parent if last[id(parent)] == index else self._fork(parent)
            start = len(sequence.token_ids)
            for token in branch.tokens:
                _append(group.request, sequence, token)
                if sequence.finish_reason is not None:
                    group.finished.append(sequence)
                    break
            else:
                family.append(sequence)
                live.append((sequence, start))
        if len(live) > group.strategy.width:
            raise ValueError("the strategy returned more branches than its width")
        if not live and not group.finished:
            raise ValueError("the strategy dropped every sequence")
        for parent in group.live:
            self._leave(parent, heirs[id(parent)])
        for family in heirs.values():
            self._share_place(family)
        for sequence, start in live:
            self._note_appended(sequence, start)
        group.live = [sequence for sequence, _ in live]
        if not live:
            self.running.remove(group)

    def flush(self) -> None:
        """Write the tokens committed since the last call to the lanes, all at once."""
        self.lanes.append(*self._appended)
        self._appended = ([], [], [])

    def _leave(self, parent: Sequence, family: list[Sequence]) -> None:
        """Let go of the lane and blocks of a parent that does not go on; an heir takes them."""
        if parent in family:
            return
        if family:
            family[0].lane, family[0].block_table = parent.lane, parent.block_table
            parent.lane, parent.block_table = -1, []
        self._free(parent)

    def _share_place(self, family: list[Sequence]) -> None:
        """Give forks a lane and a block table like those of the one that has them."""
        if len(family) < 2:
            return
        source = next(sequence for sequence in family if sequence.lane >= 0)
        for sequence in family:
            if sequence is not source:
                sequence.block_table = self.pool.share(source.block_table)
                sequence.lane = self.lanes.take()
                self.lanes.fork(source.lane, sequence.lane)
                self.sampler.fork(source.lane, sequence.lane)

    def _note_appended(self, sequence: Sequence, start: int) -> None:
        lanes, positions, token_ids = self._appended
        for position in range(start, len(sequence.token_ids)):
            lanes.append(sequence.lane)
            positions.append(position)
            token_ids.append(sequence.token_ids[position])

    def _fork(self, parent: Sequence) -> Sequence:
        return replace(
            parent,
            token_ids=parent.token_ids.copy(),
            block_hashes=parent.block_hashes.copy(),
            stream=parent.stream.fork(),
            block_table=[],
            lane=-1,
        )


def _append(request: Request, sequence: Sequence, token: Token) -> None:
    """Add a token and see whether it ends the sequence.

    In this order: end of sequence, stop tokens, stop strings, length; "stop" wins over "length".
    """
    if token.id == NO_VALID_TOKEN:
        sequence.stream.end()
        _finish(sequence, FinishReason.STOP, "no_valid_token")
        return
    sequence.token_ids.append(token.id)
    sequence.cumulative_logprob += token.logprob or 0.0
    stop_reason = request.stop_tokens.get(token.id)
    if token.id in request.eos_token_ids and not request.params.ignore_eos:
        sequence.stream.push_silent(token)
        _finish(sequence, FinishReason.STOP, None)
    elif stop_reason is not None:
        kept = request.params.include_stop_str_in_output and isinstance(stop_reason, str)
        sequence.stream.push_silent(token, str(stop_reason) if kept else "")
        _finish(sequence, FinishReason.STOP, stop_reason)
    else:
        late = sequence.num_generated > request.params.min_tokens
        stop = sequence.stream.push(token, match=late)
        if stop is not None:
            _finish(sequence, FinishReason.STOP, stop)
        elif sequence.num_generated >= request.max_tokens:
            sequence.stream.end()
            _finish(sequence, FinishReason.LENGTH, None)


def _finish(sequence: Sequence, reason: FinishReason, stop_reason: int | str | None) -> None:
    sequence.finish_reason = reason
    sequence.stop_reason = stop_reason


def _turn(group: Group) -> tuple[int, float]:
    return group.request.priority, group.request.arrival_s


def _catching_up(group: Group) -> bool:
    return any(sequence.num_uncomputed > 1 for sequence in group.to_compute)
