"""How a sequence grows by a token, and what ends it."""

from engine.messages import NO_VALID_TOKEN, FinishReason, Request, Token
from engine.strategies.base import Branch
from engine.types import Sequence


def grow(request: Request, sequence: Sequence, branch: Branch) -> None:
    """Append a branch's tokens to a sequence, which may end by one of them."""
    if branch.settle and sequence.pending:
        _settle(request, sequence)
    for token in branch.tokens:
        if sequence.finish_reason is not None:
            break
        if token.id != NO_VALID_TOKEN:
            sequence.token_ids.append(token.id)
            if sequence.companion is not None:
                sequence.companion.token_ids.append(token.id)
        sequence.pending = [*sequence.pending, token]
        if not branch.draft:
            _settle(request, sequence)
    if branch.score is not None:
        sequence.score = branch.score
        sequence.scores.append(branch.score)
    if branch.memory is not None:
        sequence.memory = branch.memory
    if branch.seed is not None:
        sequence.seed = branch.seed


def ends(request: Request, sequence: Sequence, token: Token) -> bool:
    """Would the sequence, with what is pending, end by this token?"""
    count = sequence.num_generated + 1
    if token.id in request.ends or token.id == NO_VALID_TOKEN or count >= request.max_tokens:
        return True
    if not request.stop_strings:
        return False
    ahead = sequence.ahead or sequence.stream.ahead()
    before = count - 1 - len(sequence.pending)  # tokens that are in the text already
    while ahead.count < len(sequence.pending):
        late = before + ahead.count >= request.params.min_tokens
        ahead = ahead.after(sequence.pending[ahead.count], match=late)
    sequence.ahead = ahead
    return ahead.after(token, match=count > request.params.min_tokens).stops


def _settle(request: Request, sequence: Sequence) -> None:
    """Let the pending tokens count, until one of them ends the sequence."""
    count = sequence.num_generated - sum(one.id != NO_VALID_TOKEN for one in sequence.pending)
    for token in sequence.pending:
        count += token.id != NO_VALID_TOKEN
        _count(request, sequence, token, count)
        if sequence.finish_reason is not None:
            del sequence.token_ids[sequence.prompt_len + count :]
            break
    sequence.pending, sequence.ahead = [], None


def _count(request: Request, sequence: Sequence, token: Token, count: int) -> None:
    """Let the `count`-th output token be seen, and find out whether it is the last.

    In this order: end of sequence, stop tokens, stop strings, length; "stop" wins over "length".
    """
    if token.id == NO_VALID_TOKEN:
        sequence.stream.end()
        _finish(sequence, FinishReason.STOP, "no_valid_token")
        return
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
        late = count > request.params.min_tokens
        stop = sequence.stream.push(token, match=late)
        if stop is not None:
            _finish(sequence, FinishReason.STOP, stop)
        elif count >= request.max_tokens:
            sequence.stream.end()
            _finish(sequence, FinishReason.LENGTH, None)


def _finish(sequence: Sequence, reason: FinishReason, stop_reason: int | str | None) -> None:
    sequence.finish_reason = reason
    sequence.stop_reason = stop_reason
