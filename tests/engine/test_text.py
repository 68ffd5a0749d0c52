"""Text leaves whole: no broken characters, no part of a stop string, no token before its text."""

import random
from dataclasses import dataclass, field

import pytest

from engine.messages import Token
from engine.text import Detokenizer, Stops, TextStream
from engine.tokenizer import Tokenizer

ALPHABET = ["a", "b", "c", " ", "é", "€", "😀", "👩‍🚀"]
SPECIAL = 0


@dataclass
class Pieces:
    """A tokenizer of which only the bytes of each token are known."""

    pieces: list[bytes]
    strips_first_space: bool = False
    special: dict[int, str] = field(default_factory=lambda: {SPECIAL: "<end>"})

    def bytes_of(self, token_id: int) -> bytes:
        return (
            self.special[token_id].encode() if token_id in self.special else self.pieces[token_id]
        )

    def text_of(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode(errors="replace")

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        return Detokenizer(self, skip_special_tokens)  # type: ignore[arg-type]


def cut(rng: random.Random, data: bytes) -> tuple[Pieces, list[int]]:
    """Bytes as tokens of one to four, wherever characters end."""
    pieces = [b""]
    while data:
        size = rng.randint(1, 4)
        pieces.append(data[:size])
        data = data[size:]
    return Pieces(pieces), list(range(1, len(pieces)))


def some_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(length))


def some_stops(rng: random.Random, text: str) -> tuple[str, ...]:
    """Strings that occur, nearly occur, or do not."""
    stops = []
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(max(len(text), 1))
        stop = text[at : at + rng.randint(1, 6)]
        stops.append(stop + rng.choice(["", "", "x", "a"]) if stop else "b")
    return tuple(stops)


def read(text: bytes) -> str:
    """The text of bytes that may go on."""
    return Pieces([b"", text]).detokenizer().feed(1)


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """The length of the longest end of a text that is a proper beginning of a stop string."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the stop string that is complete first begins, and which it is."""
    for end in range(len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end - len(stop), stop
    return None


@pytest.mark.parametrize("seed", range(20))
def test_what_has_left_is_always_all_that_may(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        data = some_text(rng, rng.randint(0, 14)).encode()
        if rng.random() < 0.3:
            data = bytes(rng.choice(data or b"a") for _ in data)  # hardly any characters left
        tokenizer, ids = cut(rng, data)
        stops = some_stops(rng, data.decode(errors="replace"))
        keep = rng.random() < 0.5
        stream = TextStream(tokenizer.detokenizer(), Stops(stops), keep)
        out, tokens = "", list[Token]()
        for count, token_id in enumerate(ids, start=1):
            stop = stream.push(Token(token_id, ""))
            text = read(b"".join(tokenizer.pieces[1 : count + 1]))
            found = first_stop(text, stops)
            assert (found and found[1]) == stop
            if stop is not None:
                break
            if rng.random() < 0.7:
                piece, left = stream.take()
                out += piece
                tokens += left
                assert out == text[: len(text) - held_back(text, stops)]
                check_tokens(out, tokens, tokenizer, count)
        else:
            stream.end()
        piece, left = stream.take(final=True)
        out += piece
        tokens += left

        whole = data.decode(errors="replace")
        if stop_at := first_stop(read(data), stops):
            begin, stop = stop_at
            assert out == whole[:begin] + (stop if keep else "")
        else:
            assert out == whole
            assert "".join(token.text for token in tokens) == whole
        assert [token.id for token in tokens] == ids[: len(tokens)]
        assert len(tokens) == (count if ids else 0)


def check_tokens(out: str, tokens: list[Token], tokenizer: Pieces, num_pushed: int) -> None:
    """A token has left if its last character has, also where a later token completes that one."""
    may_leave = 0
    for count in range(1, num_pushed + 1):
        through = b"".join(tokenizer.pieces[1 : count + 1])
        text = read(through)
        may_leave += len(text) + (text != through.decode(errors="replace")) <= len(out)
    assert len(tokens) == may_leave
    assert out.startswith("".join(token.text for token in tokens))


@pytest.mark.parametrize("seed", range(5))
def test_a_fork_goes_its_own_way(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        data = some_text(rng, 16).encode()
        tokenizer, ids = cut(rng, data)
        stops = some_stops(rng, data.decode())
        at = rng.randrange(len(ids))
        stream = TextStream(tokenizer.detokenizer(), Stops(stops))
        taken = ""
        for token_id in ids[:at]:
            if stream.push(Token(token_id, "")) is not None:
                break
            taken += stream.take()[0]
        else:
            twin = stream.fork()
            backwards = ids[at:][::-1]
            assert taken + finish(twin, backwards) == alone(tokenizer, stops, ids[:at] + backwards)
            assert taken + finish(stream, ids[at:]) == alone(tokenizer, stops, ids)


def finish(stream: TextStream, ids: list[int]) -> str:
    """The rest of the text with these tokens."""
    for token_id in ids:
        if stream.push(Token(token_id, "")) is not None:
            return stream.take(final=True)[0]
    stream.end()
    return stream.take(final=True)[0]


def alone(tokenizer: Pieces, stops: tuple[str, ...], ids: list[int]) -> str:
    return finish(TextStream(tokenizer.detokenizer(), Stops(stops)), ids)


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_and_its_continuation_are_one_text(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        data = some_text(rng, 8).encode()
        tokenizer, ids = cut(rng, data)
        at = rng.randint(1, len(ids))
        prompt = tokenizer.detokenizer()
        shown = "".join(prompt.feed(token_id) for token_id in ids[:at])
        detokenizer = tokenizer.detokenizer()
        detokenizer.prime(ids[:at])
        assert shown + finish(TextStream(detokenizer), ids[at:]) == data.decode()


def test_a_character_leaves_with_its_last_byte() -> None:
    tokenizer = Pieces([b"", *(bytes((byte,)) for byte in "a😀b".encode())])
    stream = TextStream(tokenizer.detokenizer())
    leaving = []
    for token_id in range(1, 7):
        stream.push(Token(token_id, ""))
        text, tokens = stream.take()
        leaving.append((text, [token.id for token in tokens], [token.text for token in tokens]))
    nothing: tuple[str, list[int], list[str]] = ("", [], [])
    assert leaving == [
        ("a", [1], ["a"]),
        *[nothing] * 3,
        ("😀", [2, 3, 4, 5], ["", "", "", "😀"]),
        ("b", [6], ["b"]),
    ]


def test_bytes_that_stay_unfinished_are_shown_at_the_end() -> None:
    tokenizer = Pieces([b"", b"a", "€".encode()[:2]])
    stream = TextStream(tokenizer.detokenizer())
    stream.push(Token(1, ""))
    stream.push(Token(2, ""))
    assert stream.take()[0] == "a"
    stream.end()
    text, tokens = stream.take(final=True)
    assert (text, [token.text for token in tokens]) == ("\ufffd", ["\ufffd"])


def test_a_token_waits_for_the_last_of_its_characters() -> None:
    tokenizer = Pieces([b"", b"one s", b"tep", b"top"])
    stream = TextStream(tokenizer.detokenizer(), Stops(("stop",)))
    stream.push(Token(1, "", -0.5))
    assert stream.take() == ("one ", ())
    stream.push(Token(2, "", -0.25))
    assert stream.take() == ("step", (Token(1, "one s", -0.5), Token(2, "tep", -0.25)))

    stopped = TextStream(tokenizer.detokenizer(), Stops(("stop",)))
    stopped.push(Token(1, ""))
    assert stopped.push(Token(3, "")) == "stop"
    text, tokens = stopped.take(final=True)
    assert (text, [token.text for token in tokens]) == ("one ", ["one s", "top"])


def test_special_tokens_show_themselves_in_logprobs_and_not_in_the_text() -> None:
    tokenizer = Pieces([b"", b"a", b"b"])
    for skip, text in ((True, "ab"), (False, "a<end>b")):
        stream = TextStream(tokenizer.detokenizer(skip), Stops(("e<e",)))
        for token_id in (1, SPECIAL, 2):
            stream.push(Token(token_id, ""))
        out, tokens = stream.take()
        assert out == text
        assert [token.text for token in tokens] == ["a", "<end>", "b"]


def test_an_unseen_special_token_leaves_a_character_whole() -> None:
    euro = "€".encode()
    tokenizer = Pieces([b"", euro[:1], euro[1:]])
    stream = TextStream(tokenizer.detokenizer())
    for token_id in (1, SPECIAL):
        stream.push(Token(token_id, ""))
        assert stream.take() == ("", ())
    stream.push(Token(2, ""))
    text, tokens = stream.take()
    assert (text, [token.id for token in tokens]) == ("€", [1, SPECIAL, 2])


def test_a_token_that_ends_the_sequence_adds_only_what_it_is_told_to() -> None:
    tokenizer = Pieces([b"", b"a", b"s"])
    for shown in ("", "<end>"):
        stream = TextStream(tokenizer.detokenizer(), Stops(("stop",)))
        stream.push(Token(1, ""))
        stream.push(Token(2, ""))
        assert stream.take()[0] == "a"
        stream.push_silent(Token(SPECIAL, "", -1.0), shown)
        text, tokens = stream.take(final=True)
        assert text == "s" + shown
        assert tokens[-1] == Token(SPECIAL, "<end>", -1.0)


def test_text_that_must_not_match_neither_stops_nor_begins_a_stop() -> None:
    tokenizer = Pieces([b"", b"st", b"op", b"stop"])
    stream = TextStream(tokenizer.detokenizer(), Stops(("stop",)))
    assert stream.push(Token(3, ""), match=False) is None
    assert stream.push(Token(1, ""), match=False) is None
    assert stream.take()[0] == "stopst"
    assert stream.push(Token(2, "")) is None
    assert stream.take()[0] == "op"
    assert stream.push(Token(3, "")) == "stop"


@pytest.mark.parametrize(("prompt", "text"), [([], "a"), ([2], " a")])
def test_a_first_space_is_left_out_only_where_the_text_begins(prompt: list[int], text: str) -> None:
    tokenizer = Pieces([b"", b" a", b"b"], strips_first_space=True)
    detokenizer = tokenizer.detokenizer()
    detokenizer.prime(prompt)
    assert detokenizer.feed(1) == text
    assert detokenizer.feed(1) == " a"


def test_a_real_tokenizer_gives_back_the_text(tokenizer: Tokenizer) -> None:
    text = "then in the end é and 😀 or €\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    for at in range(1, len(ids)):
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
        before = "".join(detokenizer.feed(token_id) for token_id in ids[:at])
        primed = Detokenizer(tokenizer, skip_special_tokens=True)
        primed.prime(ids[:at])
        assert before + finish(TextStream(primed), ids[at:]) == text
