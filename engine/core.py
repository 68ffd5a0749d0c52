"""The engine's step: plan, run, sample, commit."""

import logging
import time
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from engine import rng
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.errors import EngineError, GenerationFailed
from engine.lanes import Lanes
from engine.logits import ORDERS, STAGES
from engine.logits.pipeline import Pipeline
from engine.models.base import Model
from engine.numerics import scanned
from engine.probing import Probed, attention_signals
from engine.runner import Forwarded, Runner
from engine.sampler import NOT_A_NUMBER, Sampler, report
from engine.scheduler import Scheduler
from engine.strategies import choose
from engine.strategies.base import View
from engine.text import Detokenizer, TextStream
from engine.tokenizer import Tokenizer
from engine.trace import trace_layers
from engine.types import (
    Chunk,
    Delta,
    Failed,
    Finished,
    FinishReason,
    Group,
    Request,
    Rows,
    Sequence,
    StepStats,
    Token,
    TokenTrace,
)
from engine.vocabulary import Vocabulary

_PROMPT_ROWS_BYTES = 64 << 20  # of float32 logits projected at once for prompt logprobs
_PROMPT_ROWS = 256

Message = Delta | Finished | Failed

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
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.mode = config.logprobs_mode
        self.vocab_size = min(model.vocab_size, tokenizer.size)
        self.runner = Runner(model, num_blocks, config.block_size, device)
        vocabulary = Vocabulary(
            lambda: [tokenizer.text_of(i) for i in range(self.vocab_size)], device
        )
        self.lanes = Lanes(config.max_num_seqs, context_len, device, vocabulary)
        self.sampler = Sampler(self.lanes, Pipeline(STAGES, self.lanes, ORDERS), self.mode)
        self.scheduler = Scheduler(
            BlockPool(num_blocks, config.block_size),
            self.lanes,
            self.sampler,
            budget=config.batch_tokens(device),
            prefix_cache=config.prefix_cache,
        )

    # -- requests

    def submit(self, request: Request) -> None:
        """Queue a request. What it may hold was checked where it was prepared."""
        strategy = choose(request.params)
        live = [self._sequence(request, index) for index in range(strategy.width)]
        self.scheduler.add(Group(request, strategy, live))

    def abort(self, request_id: str) -> None:
        """Forget a request and free everything it holds; unknown ones are no error."""
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def _sequence(self, request: Request, index: int) -> Sequence:
        detokenizer = Detokenizer(self.tokenizer, request.skip_special_tokens)
        detokenizer.prime(request.prompt_ids)
        return Sequence(
            index,
            rng.derive(request.seed, index),
            list(request.prompt_ids),
            len(request.prompt_ids) - request.forced_len,
            TextStream(
                detokenizer, request.stop_strings, request.params.include_stop_str_in_output
            ),
        )

    # -- the step

    @torch.inference_mode()
    def step(self) -> tuple[list[Message], StepStats]:
        """Compute one step and say what came of it."""
        plan = self.scheduler.plan()
        assert plan.chunks, "work is waiting, but none of it can be planned"
        forwarded = self.runner.forward(plan)
        self.scheduler.computed(plan)
        messages: list[Message] = []
        for chunk in plan.chunks:
            request = chunk.group.request
            if request.prompt_logprobs is None and not request.explained:
                continue
            try:
                if request.prompt_logprobs is not None:
                    self._score_prompt(chunk, forwarded)
                if request.explained:
                    self._explain(chunk, forwarded)
            except GenerationFailed as error:
                messages.append(self._fail(chunk.group, error))
        groups = self.scheduler.ready(plan)
        scored = [group for group in groups if group.request.max_tokens == 0]
        for group in scored:
            for sequence in group.live:
                sequence.finish_reason = FinishReason.LENGTH
            group.finished = group.live.copy()
            self.scheduler.drop(group)
            messages += self._deliver(group, group.finished)
        generating = [group for group in groups if group.request.max_tokens > 0]
        gaps_s: tuple[float, ...] = ()
        if generating:
            sequences = [sequence for group in generating for sequence in group.live]
            messages += self._generate(generating, forwarded)
            gaps_s = _token_gaps(sequences)
        return messages, self.stats(plan.num_tokens, gaps_s)

    def _generate(self, groups: list[Group], forwarded: Forwarded) -> list[Message]:
        """Sample a token for every live sequence of these groups and let strategies decide."""
        members = [(group, sequence) for group in groups for sequence in group.live]
        # Copies of a prompt share the row of the one that was computed.
        computed = [s if id(s) in forwarded.last_rows else g.live[0] for g, s in members]
        rows = Rows.build(
            [sequence.lane for _, sequence in members],
            [len(sequence.token_ids) - 1 for _, sequence in members],
            self.device,
        )
        source = [forwarded.last_rows[id(sequence)] for sequence in computed]
        # What lies behind the vocabulary are rows of the embedding that no token has.
        logits = self.model.logits(forwarded.hidden[source])[:, : self.vocab_size]
        samples = self.sampler(logits, rows, self._attention(members, computed, forwarded.probed))
        messages: list[Message] = []
        offset = 0
        for group in groups:
            tokens = []
            for row in range(offset, offset + len(group.live)):
                logprob, top = samples.logprobs.get(row, (None, ()))
                sequence, position = computed[row], rows.host_positions[row]
                trace = samples.traces.get(row)
                trace = self._traced(group, trace, sequence, position, forwarded)
                tokens.append(Token(samples.token_ids[row], "", logprob, top, trace=trace))
            offset += len(group.live)
            messages += self._advance(group, tokens)
        self.scheduler.flush()
        return messages

    def _attention(
        self,
        members: Seq[tuple[Group, Sequence]],
        computed: Seq[Sequence],
        probed: Probed | None,
    ) -> Tensor | None:
        """What the rows' newest tokens attended to in the last layer, [R, 4], where it is read."""
        if probed is None:
            return None
        signals = torch.zeros(len(members), 4, device=self.device)
        for row, ((group, _), sequence) in enumerate(zip(members, computed, strict=True)):
            if group.request.params.reads_attention:
                last = len(probed.probe.queries) - 1
                position = len(sequence.token_ids) - 1
                scores = probed.scores(sequence, position, last)
                signals[row] = attention_signals(scores)
        return signals

    def _traced(
        self,
        group: Group,
        trace: TokenTrace | None,
        sequence: Sequence,
        position: int,
        forwarded: Forwarded,
    ) -> TokenTrace | None:
        """A token's trace with what the request wants to see of the layers before it."""
        wish = group.request.trace
        if trace is None or wish is None or not wish.layers or forwarded.probed is None:
            return trace
        states = forwarded.probed.states(sequence, position)
        hidden = self.model.final_norm(states[list(wish.layers)])
        logits = self.model.logits(hidden)[:, : self.vocab_size]
        return replace(trace, layers=trace_layers(logits, wish.layers, wish.top))

    def _advance(self, group: Group, tokens: list[Token]) -> list[Message]:
        try:
            if any(token.id == NOT_A_NUMBER for token in tokens):
                raise GenerationFailed("the model's logits are not numbers")
            before = len(group.finished)
            live = group.live
            branches = group.strategy.advance(live, View(tokens))
            self.scheduler.commit(group, branches)
        except Exception as error:
            log.exception("request %s failed", group.request.request_id)
            return [self._fail(group, error)]
        if not group.first_token_s:
            group.first_token_s = time.monotonic()
        if not group.strategy.streams:
            return self._deliver(group, []) if not group.live else []
        ended = group.finished[before:]
        return self._deliver(group, (group.live if group.request.stream else []) + ended)

    def _fail(self, group: Group, error: Exception) -> Failed:
        pool = self.scheduler.pool
        held = {block for sequence in group.live for block in sequence.block_table}
        self.scheduler.drop(group)
        unshared = [block for block in sorted(held) if pool.refs[block] == 0]
        pool.discard(unshared)
        self.runner.scrub(unshared)
        if not isinstance(error, EngineError):
            error = GenerationFailed("generation failed unexpectedly")
        return Failed(group.request.request_id, error)

    # -- what leaves

    def _deliver(self, group: Group, sequences: Seq[Sequence]) -> list[Message]:
        messages: list[Message] = []
        if not group.live and not group.strategy.streams:
            ranked = group.strategy.rank(group.finished)
            messages += [self._delta(group, seq, index) for index, seq in enumerate(ranked)]
        else:
            deltas = [self._delta(group, sequence, sequence.index) for sequence in sequences]
            messages += [d for d in deltas if d.text or d.tokens or d.finish_reason]
        if not group.live:
            request, forced = group.request, group.request.forced_len
            messages.append(
                Finished(
                    request.request_id,
                    prompt_tokens=len(request.prompt_ids),
                    cached_tokens=group.cached_tokens,
                    completion_tokens=sum(seq.num_generated - forced for seq in group.finished),
                    longest_tokens=max(seq.num_generated - forced for seq in group.finished),
                    finish_reasons=tuple(
                        seq.finish_reason for seq in group.finished if seq.finish_reason
                    ),
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
        return Delta(
            group.request.request_id,
            index,
            text,
            tokens,
            tuple(group.prompt),
            sequence.finish_reason,
            sequence.stop_reason,
            tuple(sorted(group.explained.items())) if final else (),
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
        size = min(_PROMPT_ROWS, max(_PROMPT_ROWS_BYTES // (4 * self.model.vocab_size), 1))
        # After a preemption the beginning is computed again, but already scored.
        start = max(chunk.start, len(group.prompt) - 1)
        end = min(chunk.end, len(request.prompt_ids) - 1)
        for first in range(start, end, size):
            last = min(first + size, end)
            offset = forwarded.first_rows[id(chunk.sequence)] - chunk.start
            logits = self.model.logits(forwarded.hidden[offset + first : offset + last])
            logits, top, _ = scanned(logits[:, : self.vocab_size])
            if bool(top.isnan().any()):
                raise GenerationFailed("the model's logits are not numbers")
            ids = torch.tensor(request.prompt_ids[first + 1 : last + 1], device=self.device)
            own, tops = report(logits, ids, request.prompt_logprobs or 0, self.mode.normalised)
            ranks = (logits > logits.gather(1, ids.unsqueeze(1))).sum(1) + 1
            columns = zip(ids.tolist(), own, tops, ranks.tolist(), strict=True)
            group.prompt += [Token(i, "", logprob, top, rank) for i, logprob, top, rank in columns]

    # -- explanations

    def _explain(self, chunk: Chunk, forwarded: Forwarded) -> None:
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
            rows = Rows.build([sequence.lane], [position - 1], self.device)
            row = forwarded.hidden[offset + position - 1].unsqueeze(0)
            logits = self.model.logits(row)[:, : self.vocab_size]
            attention = None
            if request.params.reads_attention and forwarded.probed is not None:
                last = len(forwarded.probed.probe.queries) - 1
                scores = forwarded.probed.scores(sequence, position - 1, last)
                attention = attention_signals(scores).unsqueeze(0)
            forced = position < len(request.prompt_ids)
            token_id = request.prompt_ids[position] if forced else None
            samples = self.sampler(logits, rows, attention, token_id)
            if samples.token_ids[0] == NOT_A_NUMBER:
                raise GenerationFailed("the model's logits are not numbers")
            if wanted:
                trace = samples.traces.get(0)
                trace = self._traced(group, trace, sequence, position - 1, forwarded)
                group.explained[position] = Token(samples.token_ids[0], "", trace=trace)


def _token_gaps(sequences: list[Sequence]) -> tuple[float, ...]:
    """Seconds since each sequence's last token before this step's, where there was one."""
    now = time.monotonic()
    gaps = tuple(now - sequence.last_token_s for sequence in sequences if sequence.last_token_s)
    for sequence in sequences:
        sequence.last_token_s = now
    return gaps
