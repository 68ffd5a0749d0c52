"""From token ids to text that may leave: whole characters, and no part of a stop string."""

import codecs
from collections.abc import Sequence as Seq

from engine.messages import Token
from engine.tokenizer import Tokenizer
from engine.types import Sequence

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


class Stops:
    """Stop strings, searched for character by character in texts that grow.

    A text's place in each string is how much of its end the string begins with (Knuth, Morris and
    Pratt, 1977): so a character costs the same however long the strings are. Texts share this.
    """

    def __init__(self, strings: Seq[str]) -> None:
        self.strings = tuple(strings)
        self._first = frozenset(string[0] for string in strings)
        # Of each string's first 1, 2, … characters, how many of the last begin it: as far as any
        # text has come.
        self._borders = [[0] for _ in strings]

    def start(self) -> list[int]:
        """The places of an empty text."""
        return [0] * len(self.strings)

    def feed(self, places: list[int], text: str) -> tuple[str, int] | None:
        """Move on by some text, in place: the string that is complete first, and where it ends.

        Of several that end at one place, the first in the list.
        """
        if self._first.isdisjoint(text) and not any(places):
            return None
        for at, character in enumerate(text, start=1):
            for index, string in enumerate(self.strings):
                place = places[index]
                while place and string[place] != character:
                    place = self._border(index, place)
                place += string[place] == character
                places[index] = place
                if place == len(string):
                    return string, at
        return None

    def _border(self, index: int, size: int) -> int:
        """How many of a string's first `size` characters' last ones it begins with, but not all."""
        string, borders = self.strings[index], self._borders[index]
        while len(borders) < size:
            border = borders[-1]
            while border and string[border] != string[len(borders)]:
                border = borders[border - 1]
            borders.append(border + (string[border] == string[len(borders)]))
        return borders[size - 1]


class TextStream:
    """The text and tokens of one sequence on their way out.

    Text that could still turn out to begin a stop string is held: the longest suffix that is a
    proper prefix of one, and no more. A token leaves with the last character of its text.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: Stops | None = None, keep_stop: bool = False
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops or _NO_STOPS
        self._places = self._stops.start()
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
        text = self._held + piece
        if not match:
            self._places = self._stops.start()
            self._release(text, "")
            return None
        found = self._stops.feed(self._places, piece)
        if found is None:
            kept = len(text) - max(self._places, default=0)
            self._release(text[:kept], text[kept:])
            return None
        stop, end = found
        end += len(self._held) - (0 if self._keep_stop else len(stop))
        self._release(text[:end], "")
        return stop

    def ahead(self) -> "Ahead":
        """Where more tokens would lead."""
        return Ahead(self._detokenizer, self._stops, self._places)

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

    def token(self, index: int) -> Token:
        """One of those."""
        return self._tokens[index][1]

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
        twin._places = self._places.copy()
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


class Ahead:
    """What tokens would do to a text that has not got them: would it stop? Nothing is changed."""

    def __init__(
        self, detokenizer: Detokenizer, stops: Stops, places: list[int], count: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._places = places
        self.count = count  # of the tokens ahead
        self.stops = False  # does the last of them complete a stop string?

    def after(self, token: Token, match: bool = True) -> "Ahead":
        """One token further; with `match` false its text cannot be part of a stop string."""
        detokenizer = self._detokenizer.fork()
        places = self._places.copy() if match else self._stops.start()
        further = Ahead(detokenizer, self._stops, places, self.count + 1)
        piece = detokenizer.feed(token.id)
        further.stops = match and self._stops.feed(places, piece) is not None
        return further


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
        # What ends a sequence may not show in its text.
        shortest = min(one.num_generated - bool(one.finish_reason) for one in sequences)
        while self._num_pushed < shortest:
            place = self._num_pushed
            if len({one.token_ids[one.prompt_len + place] for one in sequences}) > 1:
                break
            self._num_pushed += 1
            token = sequences[0].stream.token(place)
            self._stream.push(token, match=self._num_pushed > self._min_tokens)
        text, tokens = self._stream.take()
        self._text_len += len(text)
        self._num_tokens += len(tokens)
        return text, tokens

    def rest_of(self, text: str, tokens: Seq[Token]) -> tuple[str, tuple[Token, ...]]:
        """What has not left yet of a sequence's whole output."""
        return text[self._text_len :], tuple(tokens[self._num_tokens :])


_NO_STOPS = Stops(())


def _with_text(token: Token, text: str) -> Token:
    return Token(token.id, text, *token[2:])  # _replace takes nearly twice as long
