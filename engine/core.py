"""The engine's step: plan, run, sample, commit."""

import logging
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine import rng
from engine.beside import Member, Surroundings
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.errors import EngineError, GenerationFailed
from engine.growth import ends
from engine.lanes import Lanes
from engine.logits import ORDERS, STAGES
from engine.logits.pipeline import Pipeline
from engine.memory import give_back, resident_bytes
from engine.messages import (
    NO_VALID_TOKEN,
    NOT_A_NUMBER,
    Delta,
    Failed,
    Finished,
    FinishReason,
    LayerTrace,
    Listed,
    Probability,
    Request,
    StepStats,
    Token,
)
from engine.models.base import Model
from engine.numerics import bounded, integers, known_finite, scan
from engine.runner import Forwarded, Runner
from engine.sampler import Sampler, Samples, report
from engine.scheduler import Scheduler
from engine.strategies import choose
from engine.strategies.base import Ranked, View
from engine.text import Detokenizer, Settled, Stops, TextStream
from engine.tokenizer import Tokenizer
from engine.trace import likeliest
from engine.types import Chunk, Group, Plan, Rows, Sequence
from engine.vocabulary import Vocabulary

_MOST_BYTES = 64 << 20  # of float32 logits projected at once for prompt logprobs and traces
_MOST_ROWS = 256
# After so many tokens for each hidden unit, attention to them takes as long as a layer's products:
# of a layer of 12 H² weights 24 H² operations a token, of attention to c tokens 4 H c.
_DEEP = 6
_USUAL_BYTES = 64 << 20  # by which what steps and answers take goes up and down

Message = Delta | Finished | Failed
_NO_CANDIDATES = Ranked([], [], [], lambda _: Token(NO_VALID_TOKEN, ""))

log = logging.getLogger(__name__)


class EngineCore:
    """All mutable engine state, and one step at a time. Used by one thread only."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        num_blocks: int,
        context_len: int,
        device: str,
        amateur: Model | None = None,
    ) -> None:
        """Put an engine around a model, and the amateur of contrastive decoding if there is one.

        Each has `num_blocks` of cache.
        """
        self.model = model
        self.models = [model] if amateur is None else [model, amateur]
        self.tokenizer = tokenizer
        self.device = device
        self.mode = config.logprobs_mode
        self._settled_bytes = 0  # what the process took after memory was last given back
        self._rows_at_once = min(_MOST_ROWS, max(_MOST_BYTES // (4 * model.vocab_size), 1))
        self.vocab_size = min(model.vocab_size, tokenizer.size)
        self.runners = [
            Runner(one, num_blocks, config.block_size, device, index, config.batch_invariant)
            for index, one in enumerate(self.models)
        ]
        vocabulary = Vocabulary(
            lambda: [tokenizer.text_of(i) for i in range(self.vocab_size)], device
        )
        self.lanes = Lanes(config.max_num_seqs, context_len, device, vocabulary)
        self.sampler = Sampler(self.lanes, Pipeline(STAGES, self.lanes, ORDERS), self.mode)
        self.scheduler = Scheduler(
            [BlockPool(num_blocks, config.block_size) for _ in self.models],
            self.lanes,
            self.sampler,
            budget=config.batch_tokens(device),
            prefix_cache=config.prefix_cache,
            prefill_ratio=config.prompt_tokens_beside(device),
            deep=_DEEP * model.hidden_size,
        )

    # -- requests

    def submit(self, request: Request) -> None:
        """Queue a request. What it may hold was checked where it was prepared."""
        strategy = choose(request)
        stops = Stops(request.stop_strings)
        live = [self._sequence(request, index, stops) for index in range(strategy.copies)]
        group = Group(request, strategy, live)
        if request.stream and strategy.settles:
            group.settled = Settled(live[0].stream, request.params.min_tokens)
        self.scheduler.add(group)

    def abort(self, request_id: str) -> None:
        """Forget a request and free everything it holds; unknown ones are no error."""
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def idle(self) -> bool:
        """Use a moment without work to prepare for more; False if nothing is left to prepare.

        Last, memory that unusual requests have taken is given back.
        """
        if any(runner.back_cache() for runner in self.runners):
            return True
        if self.lanes.vocabulary.load():
            return True
        if resident_bytes() > self._settled_bytes + _USUAL_BYTES:
            give_back()
            self._settled_bytes = resident_bytes()
        return False

    def _sequence(self, request: Request, index: int, stops: Stops) -> Sequence:
        detokenizer = Detokenizer(self.tokenizer, request.skip_special_tokens)
        detokenizer.prime(request.prompt_ids)
        stream = TextStream(detokenizer, stops, request.params.include_stop_str_in_output)
        seed = rng.derive(request.seed, index)
        companion = None
        if request.companion_ids:
            ids = list(request.companion_ids)
            model = 1 if request.params.cd_amateur is not None else 0
            companion = Sequence(index, seed, ids, len(ids), stream, model=model)
        # If there are thoughts to think, what follows them is appended after the last one.
        hidden = [*request.hidden_ids, *(() if request.num_thoughts else request.end_ids)]
        ids = [*request.prompt_ids, *hidden]
        return Sequence(
            index,
            seed,
            ids,
            len(ids) - request.forced_len,
            stream,
            num_hidden=len(hidden),
            companion=companion,
        )

    # -- the step

    @torch.inference_mode()
    def step(self) -> tuple[list[Message], StepStats]:
        """Compute one step and say what came of it.

        Whatever is raised on the way ends the requests it belongs to. Raises only if the model
        cannot compute at all any more.
        """
        plan = self.scheduler.plan()
        assert plan.chunks or plan.failed, "work is waiting, but none of it can be planned"
        messages: list[Message] = [self._fail(group, error) for group, error in plan.failed]
        gaps_s: tuple[float, ...] = ()
        if plan.chunks:
            computed, gaps_s = self._compute(plan)
            messages += computed
        return messages, self.stats(plan.num_tokens, gaps_s)

    def _compute(self, plan: Plan) -> tuple[list[Message], tuple[float, ...]]:
        """What comes of a plan, and the time since the token before, of sequences that get one."""
        try:
            forwarded = [runner.forward(plan) for runner in self.runners]
        except Exception as error:
            log.exception("the forward pass failed")
            return self._fail_all(plan.groups, error), ()
        around = Surroundings(self.models, forwarded, self.vocab_size, self.device)
        self.scheduler.computed(plan)
        messages = self._look_at_prompts(plan, forwarded[0], around)
        ready: list[Group] = []
        for group in self.scheduler.ready(plan):
            if group.thinks:
                assert forwarded[0] is not None
                row = forwarded[0].last_rows[id(group.live[0])]
                self.scheduler.think(group, forwarded[0].hidden[row].clone())
            elif group.request.max_tokens == 0:
                messages += self._end_scored(group)
            else:
                ready.append(group)
        gaps_s = _token_gaps([sequence for group in ready for sequence in group.live])
        if ready:
            assert forwarded[0] is not None
            messages += self._generate(ready, forwarded[0], around)
        return messages, gaps_s

    def _end_scored(self, group: Group) -> list[Message]:
        """A group that was only to be scored or explained is done."""
        try:
            for sequence in group.live:
                sequence.finish_reason = FinishReason.LENGTH
            group.finished = group.live.copy()
            self.scheduler.drop(group)
            return self._deliver(group, group.finished)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this group's alone
            return [self._fail(group, error)]

    def _fail_all(self, groups: Seq[Group], error: Exception) -> list[Message]:
        """After the model has failed in a step: its groups end, and others go on if it still works.

        Raises what a token that nobody asked for raises, computed to find that out.
        """
        messages: list[Message] = [self._fail(group, error) for group in groups]
        for runner, pool in zip(self.runners, self.scheduler.pools, strict=True):
            if pool.num_free:
                blocks = pool.take(1)
                runner.probe(*blocks)
                pool.release(blocks)
        return messages

    def _look_at_prompts(
        self, plan: Plan, forwarded: Forwarded | None, around: Surroundings
    ) -> list[Message]:
        """Keep what requests want to know of their prompts from this step's hidden states."""
        messages: list[Message] = []
        for chunk in plan.chunks:
            group, request = chunk.group, chunk.group.request
            # A group that has failed on the way has no sequences any more.
            if forwarded is None or chunk.sequence not in group.live[:1]:
                continue
            try:
                if request.prompt_logprobs is not None:
                    self._score_prompt(chunk, forwarded)
                if request.explained:
                    self._explain(chunk, forwarded, around)
                if group.strategy.wants.hidden and chunk.start < chunk.sequence.prompt_len:
                    first = forwarded.first_rows[id(chunk.sequence)]
                    count = min(chunk.end, chunk.sequence.prompt_len) - chunk.start
                    group.strategy.remember(chunk.start, forwarded.hidden[first : first + count])
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this group's alone
                messages.append(self._fail(group, error))
        return messages

    def _generate(
        self, groups: list[Group], forwarded: Forwarded, around: Surroundings
    ) -> list[Message]:
        """Sample a token for every live sequence of these groups and let strategies decide."""
        views, messages = self._sampled(groups, forwarded, around)
        for group, view in views:
            messages += self._advance(group, view)
        messages += [self._fail(group, error) for group, error in self.scheduler.flush()]
        return messages

    def _sampled(
        self, groups: list[Group], forwarded: Forwarded, around: Surroundings
    ) -> tuple[list[tuple[Group, View]], list[Message]]:
        """What each group's strategy sees, and the failures of those that nothing can be shown.

        All rows are sampled together. If that raises, group by group, so that only the group at
        fault ends; the others' lanes are written anew, as after a preemption.
        """
        states = self.lanes.states()
        try:
            return self._views(groups, forwarded, around), []
        except Exception:
            log.exception("the rows of a step cannot be sampled together")
        views: list[tuple[Group, View]] = []
        failed: list[Message] = []
        for group in groups:
            try:
                self.scheduler.readmit(group, states)
                views += self._views([group], forwarded, around)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this group's alone
                failed.append(self._fail(group, error))
        return views, failed + (self._fail_all([], Exception()) if failed else [])

    def _views(
        self, groups: list[Group], forwarded: Forwarded, around: Surroundings
    ) -> list[tuple[Group, View]]:
        """Sample the rows of some groups in one pass."""
        members = [
            Member(group, sequence, computed, len(computed.token_ids) - 1)
            for group in groups
            for sequence in group.live
            for computed in [sequence if id(sequence) in forwarded.last_rows else group.live[0]]
        ]
        rows = Rows.build(
            [one.sequence.lane for one in members],
            [one.sequence.position for one in members],
            self.device,
        )
        last = [forwarded.last_rows[id(one.computed)] for one in members]
        hidden = forwarded.hidden.index_select(0, integers(last, self.device))
        # What lies behind the vocabulary are rows of the embedding that no token has.
        raw = self.model.logits(hidden)[:, : self.vocab_size]
        if (beside := around.of(members)) is not None:
            rows = replace(rows, beside=beside)
        samples = self.sampler(raw, rows)
        lenses = self._lenses(members, forwarded)
        tokens = [self._token(samples, row, lenses.get(row, ())) for row in range(len(members))]
        tops = [self._ranked(samples, row, lenses.get(row, ())) for row in range(len(members))]
        views: list[tuple[Group, View]] = []
        offset = 0
        for group in groups:
            its = slice(offset, offset + len(group.live))
            offset = its.stop
            wants = group.strategy.wants
            view = View(
                tokens[its],
                tops[its],
                raw[its] if wants.logits else None,
                samples.logits[its] if wants.logits and samples.logits is not None else None,
                hidden[its] if wants.hidden else None,
                [around.coverage(one) for one in members[its]] if wants.coverage else [],
                partial(ends, group.request),
            )
            views.append((group, view))
        return views

    def _token(self, samples: Samples, row: int, lens: tuple[LayerTrace, ...]) -> Token:
        logprob, top = samples.logprobs.get(row, (None, ()))
        token = Token(samples.token_ids[row], "", logprob, top, trace=samples.traces.get(row))
        return _through(token, lens) if lens else token

    def _ranked(self, samples: Samples, row: int, lens: tuple[LayerTrace, ...]) -> Ranked:
        """A row's candidates, whose tokens are seen through the lens, too."""
        ranked = samples.tops.get(row, _NO_CANDIDATES)
        if not lens:
            return ranked
        return ranked.with_tokens(lambda place: _through(ranked.token(place), lens))

    def _lenses(
        self, members: Seq[Member], forwarded: Forwarded
    ) -> dict[int, tuple[LayerTrace, ...]]:
        """What earlier layers alone would say next, of those whose traces are to hold it."""
        wishes = {
            row: one.request.trace
            for row, one in enumerate(members)
            if one.request.trace is not None and one.request.trace.layers
        }
        if not wishes or forwarded.probed is None:
            return {}
        states = [
            forwarded.probed.states(members[row].computed, members[row].position)[list(wish.layers)]
            for row, wish in wishes.items()
        ]
        top = max(wish.top for wish in wishes.values())
        seen = iter(self._through_lens(torch.cat(states), top))
        return {
            row: tuple(LayerTrace(layer, next(seen)[: wish.top]) for layer in wish.layers)
            for row, wish in wishes.items()
        }

    def _through_lens(self, states: Tensor, top: int) -> Iterator[Listed[Probability]]:
        """The likeliest tokens of states of layers [n, H], some at a time."""
        for some in states.split(self._rows_at_once):
            logits = self.model.logits(self.model.final_norm(some))[:, : self.vocab_size]
            yield from likeliest(logits, top)

    def _advance(self, group: Group, view: View) -> list[Message]:
        try:
            if any(token.id == NOT_A_NUMBER for token in view.tokens):
                raise GenerationFailed("the model's logits are not numbers")
            before = len(group.finished)
            branches = group.strategy.advance(group.live, view)
            self.scheduler.commit(group, branches)
            if not group.first_token_s:
                group.first_token_s = time.monotonic()
            if group.strategy.streams:
                ended = group.finished[before:]
                return self._deliver(group, (group.live if group.request.stream else []) + ended)
            return self._settle(group) if group.live else self._deliver(group, [])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this group's alone
            return [self._fail(group, error)]

    def _fail(self, group: Group, error: Exception) -> Failed:
        """End a group and free what it holds; what it computed is not to be trusted."""
        request_id = group.request.request_id
        if isinstance(error, EngineError):
            log.info("request %s failed: %s", request_id, error)
        else:
            log.error("request %s failed", request_id, exc_info=error)
        held: list[set[int]] = [set() for _ in self.runners]
        for sequence in group.sequences:
            held[sequence.model].update(sequence.block_table)
        self.scheduler.drop(group)
        for blocks, pool, runner in zip(held, self.scheduler.pools, self.runners, strict=True):
            unshared = [block for block in sorted(blocks) if pool.refs[block] == 0]
            pool.discard(unshared)
            runner.scrub(unshared)
        if not isinstance(error, EngineError):
            error = GenerationFailed("generation failed unexpectedly")
        return Failed(group.request.request_id, error)

    # -- what leaves

    def _settle(self, group: Group) -> list[Message]:
        """What all sequences of a group that will be told of have in common by now.

        While there are fewer than choices, some of those may never come to be.
        """
        request, sequences = group.request, [*group.live, *group.finished]
        if group.settled is None or len(sequences) < request.params.n:
            return []
        text, tokens = group.settled.take(sequences)
        if not text and not tokens:
            return []
        return [
            Delta(request.request_id, index, text, tokens, tuple(group.prompt))
            for index in range(request.params.n)
        ]

    def _deliver(self, group: Group, sequences: Seq[Sequence]) -> list[Message]:
        messages: list[Message] = []
        if not group.live:
            ranked = group.strategy.rank(group.finished)
            if not group.strategy.streams:
                messages += [self._delta(group, seq, index) for index, seq in enumerate(ranked)]
        if group.strategy.streams:
            # Drafts of a choice have the same news, of what is settled.
            deltas: dict[int, Delta] = {}
            for sequence in sequences:
                deltas.setdefault(sequence.index, self._delta(group, sequence, sequence.index))
            messages += [d for d in deltas.values() if d.text or d.tokens or d.finish_reason]
        if not group.live:
            request, forced = group.request, group.request.forced_len
            # Of best_of all are counted, of any other strategy's what is returned.
            counted = group.finished if request.params.best_of_several else ranked
            messages.append(
                Finished(
                    request.request_id,
                    prompt_tokens=request.num_prompt,
                    cached_tokens=group.cached_tokens,
                    completion_tokens=sum(seq.num_generated - forced for seq in counted),
                    longest_tokens=max(seq.num_generated - forced for seq in counted),
                    finish_reasons=tuple(seq.finish_reason for seq in counted if seq.finish_reason),
                    arrival_s=request.arrival_s,
                    scheduled_s=group.scheduled_s,
                    first_token_s=group.first_token_s,
                    finished_s=time.monotonic(),
                    num_preemptions=group.num_preemptions,
                )
            )
        return messages

    def _delta(self, group: Group, sequence: Sequence, index: int) -> Delta:
        final = sequence.finish_reason is not None
        text, tokens = sequence.stream.take(final=final)
        if group.settled is not None:
            text, tokens = group.settled.rest_of(text, tokens)
        return Delta(
            group.request.request_id,
            index,
            text,
            tokens,
            tuple(group.prompt),
            sequence.finish_reason,
            sequence.stop_reason,
            tuple(sorted(group.explained.items())) if final else (),
            sequence.report if final else {},
        )

    def stats(self, num_tokens: int = 0, gaps_s: tuple[float, ...] = ()) -> StepStats:
        """How full the engine is."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        return StepStats(
            num_running=sum(len(group.live) for group in scheduler.running),
            num_waiting=sum(len(group.live) for group in scheduler.waiting),
            kv_usage=1.0 - pool.num_free / pool.num_blocks,
            num_tokens=num_tokens,
            cache_queries=scheduler.cache_queries,
            cache_hits=scheduler.cache_hits,
            num_preemptions=scheduler.num_preemptions,
            token_gaps_s=gaps_s,
        )

    # -- prompt logprobs

    def _score_prompt(self, chunk: Chunk, forwarded: Forwarded) -> None:
        """Logprobs of the prompt tokens that a chunk's hidden states predict.

        Projected some rows at a time, so the memory does not grow with the prompt. Raises
        GenerationFailed.
        """
        group, request = chunk.group, chunk.group.request
        if not group.prompt:
            group.prompt.append(Token(request.prompt_ids[0], ""))
        size = self._rows_at_once
        # After a preemption the beginning is computed again, but already scored.
        start = max(chunk.start, len(group.prompt) - 1)
        end = min(chunk.end, len(request.prompt_ids) - 1)
        for first in range(start, end, size):
            last = min(first + size, end)
            offset = forwarded.first_rows[id(chunk.sequence)] - chunk.start
            logits = self.model.logits(forwarded.hidden[offset + first : offset + last])
            logits = logits[:, : self.vocab_size]
            top, _ = scan(logits)
            logits = logits if known_finite(top) else bounded(logits)
            if bool(top.isnan().any()):
                raise GenerationFailed("the model's logits are not numbers")
            ids = torch.tensor(request.prompt_ids[first + 1 : last + 1], device=self.device)
            own, tops = report(logits, ids, request.prompt_logprobs or 0, self.mode.normalised)
            ranks = (logits > logits.gather(1, ids.unsqueeze(1))).sum(1) + 1
            columns = zip(ids.tolist(), own, tops, ranks.tolist(), strict=True)
            group.prompt += [Token(i, "", logprob, top, rank) for i, logprob, top, rank in columns]

    # -- explanations

    def _explain(self, chunk: Chunk, forwarded: Forwarded, around: Surroundings) -> None:
        """Trace the tokens that a chunk's hidden states predict, where the request asks for it.

        A filter with feedback must have seen every output token before. Raises GenerationFailed.
        """
        group, sequence, request = chunk.group, chunk.sequence, chunk.group.request
        offset = forwarded.first_rows[id(sequence)] - chunk.start
        first = sequence.prompt_len if self.sampler.observes(sequence.lane) else chunk.end + 1
        for position in range(chunk.start + 1, min(chunk.end, request.explained[-1]) + 1):
            wanted = position in request.explained
            if position in group.explained or not (wanted or position >= first):
                continue
            member = Member(group, sequence, sequence, position - 1)
            rows = Rows.build([sequence.lane], [position - 1], self.device)
            row = forwarded.hidden[offset + position - 1].unsqueeze(0)
            logits = self.model.logits(row)[:, : self.vocab_size]
            forced = position < len(request.prompt_ids)
            token_id = request.prompt_ids[position] if forced else None
            rows = replace(rows, beside=around.of([member]))
            samples = self.sampler(logits, rows, token_id)
            if samples.token_ids[0] == NOT_A_NUMBER:
                raise GenerationFailed("the model's logits are not numbers")
            if wanted:
                lens = self._lenses([member], forwarded).get(0, ())
                group.explained[position] = self._token(samples, 0, lens)


def _through(token: Token, lens: tuple[LayerTrace, ...]) -> Token:
    """The token, its trace with what the lens has seen."""
    if token.trace is None:
        return token
    return token._replace(trace=replace(token.trace, layers=lens))


def _token_gaps(sequences: list[Sequence]) -> tuple[float, ...]:
    """Seconds since each sequence's last token before this step's, where there was one."""
    now = time.monotonic()
    gaps = tuple(now - sequence.last_token_s for sequence in sequences if sequence.last_token_s)
    for sequence in sequences:
        sequence.last_token_s = now
    return gaps
