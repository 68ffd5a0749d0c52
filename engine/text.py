"""From token ids to text that may leave: whole characters, and no part of a stop string."""

import codecs
from collections.abc import Sequence as Seq

from engine.tokenizer import Tokenizer
from engine.types import Sequence, Token

_MAX_CHARACTER_BYTES = 4


class Detokenizer:
    """Decodes one token at a time.

    Bytes of an unfinished character are kept until it is complete; U+FFFD stands only for bytes
    that cannot become a character. The texts of all tokens joined are the text of all their bytes.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True

    def prime(self, prompt_ids: Seq[int]) -> None:
        """Continue after a prompt, which may end inside a character."""
        for token_id in prompt_ids[-2 * _MAX_CHARACTER_BYTES :]:
            self.feed(token_id)
        self._at_start = not prompt_ids

    def feed(self, token_id: int) -> str:
        """What the token adds to the text."""
        if self.skip_special_tokens and token_id in self.tokenizer.special:
            return ""
        data = self.tokenizer.bytes_of(token_id)
        if self._at_start and self.tokenizer.strips_first_space:
            data = data.removeprefix(b" ")
        self._at_start = False
        return self._utf8.decode(data)

    @property
    def inside_character(self) -> bool:
        return bool(self._utf8.getstate()[0])

    def flush(self) -> str:
        """The end of the text: U+FFFD if it stops inside a character."""
        return self._utf8.decode(b"", final=True)

    def fork(self) -> "Detokenizer":
        twin = Detokenizer(self.tokenizer, self.skip_special_tokens)
        twin._utf8.setstate(self._utf8.getstate())
        twin._at_start = self._at_start
        return twin


class TextStream:
    """The text and tokens of one sequence on their way out.

    Text that could still turn out to begin a stop string is held: the longest suffix that is a
    proper prefix of one, and no more. A token leaves with the last character of its text.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: tuple[str, ...] = (), keep_stop: bool = False
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._keep_stop = keep_stop
        self._ready: list[str] = []
        self._held = ""
        self._tokens: list[tuple[int, Token]] = []  # with the text length needed to leave
        self._pushed_len = 0
        self._ready_len = 0

    def push(self, token: Token, match: bool = True) -> str | None:
        """Add a token, whose text is filled in here; returns the stop string it completes.

        With `match` false the token's text cannot be part of a stop string.
        """
        piece = self._detokenizer.feed(token.id)
        own = self._detokenizer.tokenizer.special.get(token.id, piece)
        self._pushed_len += len(piece)
        # Inside a character the token waits for the next one, whose text will hold it.
        leaves_at = self._pushed_len + self._detokenizer.inside_character
        self._tokens.append((leaves_at, _with_text(token, own)))
        if not match:
            self._release(self._held + piece, "")
            return None
        held = self._held + piece
        if not self._stops:
            self._release(held, "")
            return None
        stop = self._first_stop(held)
        if stop is None:
            keep = self._could_begin_stop(held)
            self._release(held[: len(held) - keep], held[len(held) - keep :])
            return None
        end = held.find(stop) + (len(stop) if self._keep_stop else 0)
        self._release(held[:end], "")
        return stop

    def push_silent(self, token: Token, text: str = "") -> None:
        """Add a token that ends the sequence; of it only `text` is seen."""
        self.end()
        own = self._detokenizer.tokenizer.text_of(token.id)
        self._tokens.append((self._pushed_len, _with_text(token, own)))
        self._release(text, "")

    def end(self) -> None:
        """Nothing follows: let go of what was held."""
        rest = self._detokenizer.flush()
        if rest and self._tokens:
            leaves_at, token = self._tokens[-1]
            self._tokens[-1] = (leaves_at, _with_text(token, token.text + rest))
        self._release(self._held + rest, "")

    def take(self, final: bool = False) -> tuple[str, tuple[Token, ...]]:
        """The text and tokens that may leave now; with `final`, all tokens."""
        text = "".join(self._ready)
        self._ready.clear()
        count = len(self._tokens)
        if not final:
            count = sum(1 for leaves_at, _ in self._tokens if leaves_at <= self._ready_len)
        tokens = tuple(token for _, token in self._tokens[:count])
        del self._tokens[:count]
        return text, tokens

    @property
    def tokens(self) -> list[Token]:
        """All that have not been taken."""
        return [token for _, token in self._tokens]

    @property
    def text(self) -> str:
        """All that may leave and has not been taken."""
        return "".join(self._ready)

    @property
    def ends(self) -> list[int]:
        """Where in the whole text each token ends; a character belongs to its first one."""
        return [leaves_at for leaves_at, _ in self._tokens]

    def fork(self) -> "TextStream":
        twin = TextStream(self._detokenizer.fork(), self._stops, self._keep_stop)
        twin._ready = self._ready.copy()
        twin._held = self._held
        twin._tokens = self._tokens.copy()
        twin._pushed_len = self._pushed_len
        twin._ready_len = self._ready_len
        return twin

    def _release(self, text: str, held: str) -> None:
        if text:
            self._ready.append(text)
            self._ready_len += len(text)
        self._held = held

    def _first_stop(self, text: str) -> str | None:
        """The stop string that is complete first; of several, the first in the list."""
        found = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        return min(found, key=lambda match: match[0])[1] if found else None

    def _could_begin_stop(self, text: str) -> int:
        longest = max(map(len, self._stops)) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0


class Settled:
    """What all sequences of a group begin with, on its way out before they end."""

    def __init__(self, stream: TextStream, min_tokens: int) -> None:
        """`stream` is one of a sequence without output."""
        self._stream = stream.fork()
        self._min_tokens = min_tokens
        self._num_pushed = 0
        self._text_len = 0
        self._num_tokens = 0

    def take(self, sequences: Seq[Sequence]) -> tuple[str, tuple[Token, ...]]:
        """What may leave now that was not common, or not complete, before."""
        first = sequences[0].tokens
        # What ends a sequence may not show in its text.
        outputs = [one.output[:-1] if one.finish_reason else one.output for one in sequences]
        while self._num_pushed < min(map(len, outputs)):
            ids = {output[self._num_pushed] for output in outputs}
            if len(ids) > 1:
                break
            self._num_pushed += 1
            token = first[self._num_pushed - 1]
            self._stream.push(token, match=self._num_pushed > self._min_tokens)
        text, tokens = self._stream.take()
        self._text_len += len(text)
        self._num_tokens += len(tokens)
        return text, tokens

    def rest_of(self, text: str, tokens: Seq[Token]) -> tuple[str, tuple[Token, ...]]:
        """What has not left yet of a sequence's whole output."""
        return text[self._text_len :], tuple(tokens[self._num_tokens :])


def _with_text(token: Token, text: str) -> Token:
    return Token(token.id, text, *token[2:])  # _replace takes nearly twice as long
