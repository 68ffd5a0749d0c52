"""Decide what each step computes, and carry out what strategies decide.

There are no phases: a sequence is a list of tokens and a count of those computed, and a step gives
each some more of its uncomputed tokens. Prefill, chunked prefill, decoding, prefix-cache hits and
recovery from preemption are this one rule at different counts.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from engine.blocks import BlockPool, chain_hash, root_hash
from engine.growth import grow
from engine.lanes import Lanes
from engine.sampler import Sampler
from engine.strategies.base import Branch
from engine.types import BlockCopy, Chunk, Group, Plan, Sequence, with_companions

log = logging.getLogger(__name__)

_LEAST_BESIDE = 16  # prompt tokens beside running sequences, however few those are
_WORTH_WAITING = 64  # tokens that two prompts have in common from where they are
_MOST_ADMITTED = 32_768  # tokens of prompts that are looked up, hashed and written in a step
_PLACEHOLDER = 0  # the token id of a thought, which nobody reads


class _Fork(NamedTuple):
    """A lane to become a copy of its parent's, with a seed of its own."""

    group: Group
    parent: int
    seed: int


class Scheduler:
    """Owns groups, sequences, blocks and lanes. Used by the engine thread only.

    Groups run in the order of priority, then arrival. If memory is short the last one is preempted:
    blocks and lanes go, tokens stay, and it waits at its place in the queue to be admitted again,
    mostly from the prefix cache. `pools` has one for each model.
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
        deep: int = 1 << 62,
    ) -> None:
        """Beside running sequences a step has `prefill_ratio` prompt tokens for each.

        Those behind more than `deep` tokens cost more to compute, so there are fewer.
        """
        self.pools = pools
        self.lanes = lanes
        self.sampler = sampler
        self.budget = budget
        self.prefill_ratio = prefill_ratio
        self.deep = deep
        self.prefix_cache = prefix_cache
        self.waiting: list[Group] = []
        self.running: list[Group] = []
        self.cache_queries = 0
        self.cache_hits = 0
        self.num_preemptions = 0
        self._appended: tuple[list[int], list[int], list[int]] = ([], [], [])
        self._forked: dict[int, _Fork] = {}  # by the lane that is a copy

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
        group.live, group.asleep = [], {}
        for queue in (self.running, self.waiting):
            if group in queue:
                queue.remove(group)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # -- planning

    def plan(self) -> Plan:
        """Choose this step's tokens, and the memory they need.

        First groups that need one token per sequence, then prompts, running or waiting.
        """
        plan = Plan([], [])
        preempted = self.num_preemptions
        behind = [group for group in self.running if _catching_up(group)]
        late = {id(group) for group in behind}
        budget = self.budget
        for group in self.running.copy():
            if id(group) not in late:
                budget -= self._place(group, budget, plan)
        if self.prefill_ratio is not None and plan.chunks:
            budget = min(budget, self._beside(len(plan.chunks), behind))
        # Where somebody has just given way, nobody comes who would need the same memory.
        waiting = self.waiting.copy() if preempted == self.num_preemptions else []
        self._plan_prompts(plan, budget, behind, waiting)
        for group, error in self.flush():
            self._fail(plan, group, error)
        return plan

    def _beside(self, num_running: int, behind: list[Group]) -> int:
        """How many prompt tokens a step has beside running sequences, so that those go on soon."""
        assert self.prefill_ratio is not None
        most = max(_LEAST_BESIDE, self.prefill_ratio * num_running)
        deepest = max((group.live[0].num_computed for group in behind), default=0)
        return max(int(most / max((1 + deepest / self.deep) / 2, 1.0)), 1)

    def _plan_prompts(
        self, plan: Plan, budget: int, running: list[Group], waiting: list[Group]
    ) -> None:
        """Divide the budget among the prompts of the best priority, what is left among the next."""
        begun: set[bytes] = set()
        for priority in sorted({group.request.priority for group in (*running, *waiting)}):
            if budget <= 0:
                return
            prompts = [
                group
                for group in running
                if group.request.priority == priority and not _gave_way(group)
            ]
            queued = [group for group in waiting if group.request.priority == priority]
            if queued and not self._admit_some(prompts, queued, budget, plan):
                waiting = []
            prompts.sort(key=_turn)
            ahead = [group for group in prompts if not self._follows(group, begun)]
            needs = [_need(group) for group in ahead]
            for group, share in zip(ahead, shares(needs, budget), strict=True):
                if share:
                    budget -= self._place(group, share, plan)

    def _admit_some(
        self, prompts: list[Group], queued: list[Group], budget: int, plan: Plan
    ) -> bool:
        """Admit waiting groups to the prompts being computed: the oldest of all, then the shortest.

        Only as many as the budget can move on each. False if one does not fit: until it does,
        nobody overtakes it.
        """
        order = sorted(queued, key=lambda group: len(group.live[0].token_ids))
        if not prompts or _turn(queued[0]) < _turn(prompts[0]):
            order = [queued[0], *order]
        most = 1 + max(budget // 4, 1)
        num_tokens = 0
        for group in dict.fromkeys(order):
            if len(prompts) >= most or num_tokens > _MOST_ADMITTED:
                return True
            try:
                if not self._admit(group):
                    return False
            except Exception as error:
                log.exception("request %s cannot be admitted", group.request.request_id)
                self._fail(plan, group, error)
                continue
            num_tokens += len(group.live[0].token_ids)
            prompts.append(group)
        return True

    def _fail(self, plan: Plan, group: Group, error: Exception) -> None:
        """A group that cannot be planned is dropped; nothing of it has been computed yet."""
        _take_out(plan, group)
        self.drop(group)
        plan.failed.append((group, error))

    def _place(self, group: Group, budget: int, plan: Plan) -> int:
        """Put some of a group's tokens into the plan; what they cost.

        If memory is short, the last in turn gives way, planned or not; it may be the group itself.
        """
        if _gave_way(group):
            return 0
        chunks = self._chunks(group, budget)
        while not self._reserve(chunks, plan):
            victim = self.running[-1]
            _take_out(plan, victim)
            self._preempt(victim)
            if victim is group:
                return 0
        return sum(group.cost(chunk.length, chunk.start) for chunk in chunks)

    def _chunks(self, group: Group, budget: int) -> list[Chunk]:
        """As many of a group's uncomputed tokens as the budget allows.

        A group moves together: the last token of each sequence is computed in the same step, or
        a strategy would see only some of its rows. If not all fit, each stops one token short.
        """
        sequences = group.to_compute
        lengths = [_left(group, sequence) for sequence in sequences]
        if len(sequences) == 1:
            lengths = [group.affordable(sequences[0].num_computed, lengths[0], budget)]
        short = len(sequences) > 1 and sum(lengths) > budget
        chunks = []
        for sequence, left in zip(sequences, lengths, strict=True):
            length = min(left - short, budget)
            if length > 0:
                chunks.append(Chunk(group, sequence, sequence.num_computed, length))
                budget -= length
        return chunks

    def _reserve(self, chunks: list[Chunk], plan: Plan) -> bool:
        """Take the blocks the chunks write to and add them to the plan, or change nothing."""
        writers = [chunk for chunk in chunks if not self._has_room(chunk)]
        if not self._fit(writers):
            self._free_sleepers()
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
        return self._have(needed)

    # -- admission and preemption

    def _admit(self, group: Group) -> bool:
        """Give a waiting group lanes and what the prefix cache has of it, if it would fit.

        Beside what running groups still need for the tokens they have.
        """
        taken = sum(other.strategy.width for other in self.running)
        if taken + group.strategy.width > self.lanes.num_lanes:
            return False
        first = group.to_compute
        for sequence in first:
            pool = self.pools[sequence.model]
            sequence.block_table = pool.share(self._cached(group, sequence))
        needed = self._missing(group)
        for other in self.running:
            if _catching_up(other):
                needed = [n + more for n, more in zip(needed, self._missing(other), strict=True)]
        if not self._have(needed):
            self._free_sleepers()
        if not self._have(needed):
            for sequence in first:
                self._free(sequence)
            return False
        for sequence in first:
            size = self.pools[sequence.model].block_size
            sequence.num_computed = len(sequence.block_table) * size
        if not group.scheduled_s:
            group.scheduled_s = time.monotonic()
            group.cached_tokens = first[0].num_computed
            self.cache_queries += first[0].prompt_len
            self.cache_hits += group.cached_tokens
        self._share_prompt(group)
        self.waiting.remove(group)
        self.running.append(group)
        self.running.sort(key=_turn)
        source = -1
        for sequence in group.live:
            self._take_lane(group, sequence, source)
            if sequence.num_generated == 0:  # all others are copies of it
                source = group.live[0].lane
        return True

    def _have(self, needed: list[int]) -> bool:
        """Are so many blocks of each pool free?"""
        return all(n <= pool.num_free for n, pool in zip(needed, self.pools, strict=True))

    def _free_sleepers(self) -> None:
        """Take back what sleepers hold: it is only kept while nobody needs it."""
        for group in self.running:
            for sequence in with_companions(list(group.asleep)):
                self._free(sequence)

    def _missing(self, group: Group) -> list[int]:
        """How many blocks of each pool a group still needs for the tokens it has."""
        needed = [0] * len(self.pools)
        computed = {id(sequence) for sequence in group.to_compute}
        for sequence in with_companions(group.live):
            pool = self.pools[sequence.model]
            held = len(sequence.block_table)
            if id(sequence) not in computed:  # the first one's prompt will be its own
                held = sequence.prompt_len // pool.block_size
            needed[sequence.model] += max(pool.blocks_for(len(sequence.token_ids)) - held, 0)
        return needed

    def _take_lane(self, group: Group, sequence: Sequence, source: int = -1) -> None:
        """Give a sequence a lane: a copy of another, or one written from its own history."""
        lane = sequence.lane = self.lanes.take()
        if source >= 0:
            self._forked[lane] = _Fork(group, source, sequence.seed)
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

    def _follows(self, group: Group, begun: set[bytes]) -> bool:
        """Are the blocks that a prompt needs next being computed for another one in this step?

        If they are worth it, it waits, and finds them in the cache. What the cache has got since is
        taken first.
        """
        sequence = group.live[0]
        if not self.prefix_cache or sequence.num_generated or group.thinks:
            return False
        pool = self.pools[sequence.model]
        index = sequence.num_computed // pool.block_size
        full = (len(sequence.token_ids) - 1) // pool.block_size
        self._hash_blocks(group, sequence, full)
        if not group.reads_prompt and (found := pool.find(sequence.block_hashes[index:full])):
            pool.share(found)
            pool.release(sequence.block_table[index:])
            sequence.block_table[index:] = found
            index += len(found)
            gained = index * pool.block_size - sequence.num_computed
            sequence.num_computed += gained
            group.cached_tokens += gained
            self.cache_hits += gained
        index += pool.blocks_for(_WORTH_WAITING)
        if index > full:
            return False
        key = sequence.block_hashes[index - 1]
        follows = key in begun and not group.reads_prompt
        begun.add(key)
        return follows

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
            self._share_prompt(group)

    def _share_prompt(self, group: Group) -> None:
        """Once the first of several sequences has computed their prompt, all have it."""
        first, last = group.live[0], group.live[-1]
        if last is first or last.num_computed >= last.prompt_len:
            return
        prompts = with_companions([first])
        if group.thinks or any(one.num_computed < one.prompt_len for one in prompts):
            return
        for sequence in group.live[1:]:
            self._share(group, first, sequence)
            if first.companion is not None and sequence.companion is not None:
                self._share(group, first.companion, sequence.companion)

    def _share(self, group: Group, first: Sequence, other: Sequence) -> None:
        """Give a sequence another's prompt, and what the prefix cache has behind it."""
        pool = self.pools[other.model]
        pool.release(other.block_table)
        cached = self._cached(group, other) if other.num_generated else []
        other.num_computed = len(cached) * pool.block_size
        if other.num_computed < other.prompt_len:
            cached = first.block_table[: pool.blocks_for(other.prompt_len)]
            other.num_computed = other.prompt_len
        other.block_table = pool.share(cached)
        if not other.block_hashes:
            other.block_hashes = first.block_hashes[: other.prompt_len // pool.block_size]

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
        parents = list(dict.fromkeys([*group.live, *(branch.parent for branch in branches)]))
        if any(parent not in group.asleep for parent in parents[len(group.live) :]):
            raise ValueError("the strategy returned a branch of a sequence that is not the group's")
        heirs: dict[int, list[Sequence]] = {id(parent): [] for parent in parents}
        last = {id(branch.parent): index for index, branch in enumerate(branches)}
        live: list[Sequence] = []
        asleep: list[Sequence] = []
        reseeded: list[Sequence] = []
        starts: dict[int, int] = {}  # how long each heir was before this step
        for index, branch in enumerate(branches):
            parent = branch.parent
            if branch.dropped:
                continue
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
        if live == parents and not reseeded:
            for sequence in live:  # all go on as they are
                self._note_appended(sequence, starts[id(sequence)])
            return
        # Should a lane fail, whoever holds something by then is found in the group, to be freed.
        group.live = list(dict.fromkeys((*parents, *live, *asleep)))
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
        for parent in parents:
            group.asleep.pop(parent, None)
        group.asleep.update(dict.fromkeys(asleep))
        group.live = live
        if not live:
            self.drop(group)

    def flush(self) -> list[tuple[Group, Exception]]:
        """Write what was committed since the last call to the lanes, all at once.

        Returns the groups whose lanes could not be forked; nothing of others is lost.
        """
        forked, self._forked = self._forked, {}
        failed: list[tuple[Group, Exception]] = []
        try:
            self._fork_lanes(forked)
        except Exception:
            log.exception("lanes cannot be forked")
            # Forking twice does no harm: so it is found out whose lanes they are.
            for group in dict.fromkeys(fork.group for fork in forked.values()):
                its = {lane: fork for lane, fork in forked.items() if fork.group is group}
                try:
                    self._fork_lanes(its)
                except Exception as error:
                    log.exception("request %s cannot be forked", group.request.request_id)
                    failed.append((group, error))
        self.lanes.append(*self._appended)
        self._appended = ([], [], [])
        return failed

    def _fork_lanes(self, forks: Mapping[int, "_Fork"]) -> None:
        if not forks:
            return
        children = list(forks)
        parents = [fork.parent for fork in forks.values()]
        self.lanes.fork(parents, children)
        self.sampler.fork(parents, children)
        seeds = [fork.seed for fork in forks.values()]
        self.lanes.seeds[children] = torch.tensor(seeds, device=self.lanes.device)

    def readmit(self, group: Group, states: Seq[Tensor]) -> None:
        """Write a running group's lanes anew; the states of stages are as `Lanes.states` gave them.

        For when a stage has failed half way through: nobody knows then what it has done.
        """
        for sequence in group.live:
            prompt_len = sequence.prompt_len - sequence.num_hidden
            self.lanes.write(sequence.lane, sequence.history, prompt_len, sequence.seed)
            self.sampler.admit(sequence.lane, group.request, group.strategy.wants)
            self.lanes.restore(sequence.lane, [float(state[sequence.lane]) for state in states])

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


def shares(needs: Seq[int], budget: int) -> list[int]:
    """How many tokens of a step each prompt gets, of those that need so many, the oldest first.

    The oldest gets half the budget at least, as far as it needs it, so that none waits forever. If
    the rest is enough, all others get a token, so that each moves on. What is left goes to the
    shortest first, so that a newcomer need not wait for a long prompt to end.
    """
    given = [0] * len(needs)

    def give(index: int, most: int) -> int:
        more = min(most, needs[index] - given[index])
        given[index] += more
        return more

    if needs:
        budget -= give(0, budget - budget // 2)
    if budget >= len(needs) - 1:
        budget -= sum(give(index, 1) for index in range(1, len(needs)))
    for index in sorted(range(len(needs)), key=lambda index: needs[index]):
        budget -= give(index, budget)
    return given


def _need(group: Group) -> int:
    """What a group's uncomputed tokens will cost."""
    return sum(group.cost(_left(group, one), one.num_computed) for one in group.to_compute)


def _left(group: Group, sequence: Sequence) -> int:
    """How many tokens of a sequence can be computed now: while others wait for it, its prompt's."""
    if group.shares_prompt and sequence.num_generated:
        return max(sequence.prompt_len - sequence.num_computed, 0)
    return sequence.num_uncomputed


def _take_out(plan: Plan, group: Group) -> None:
    """Take a group's chunks out of a plan, and the copies of blocks it would have written to."""
    if all(chunk.group is not group for chunk in plan.chunks):
        return
    plan.chunks[:] = [chunk for chunk in plan.chunks if chunk.group is not group]
    blocks = {
        (sequence.model, block) for sequence in group.sequences for block in sequence.block_table
    }
    plan.copies[:] = [copy for copy in plan.copies if (copy.model, copy.target) not in blocks]


def _complete(group: Group) -> bool:
    """Is the last token of each of its sequences computed?"""
    return all(sequence.num_uncomputed == 0 for sequence in group.to_compute)


def _turn(group: Group) -> tuple[int, float]:
    return group.request.priority, group.request.arrival_s


def _gave_way(group: Group) -> bool:
    """Has a group of those that were running been preempted in this step?"""
    return group.live[0].lane < 0


def _catching_up(group: Group) -> bool:
    return any(sequence.num_uncomputed > 1 for sequence in group.to_compute)
