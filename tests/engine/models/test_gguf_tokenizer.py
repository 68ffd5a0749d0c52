"""Tokenizers inside GGUF files: against the format's rules, `transformers`, and llama.cpp."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
import torch
import transformers
from tokenizers import Tokenizer as Backend

from engine.errors import ModelUnavailable
from engine.models.gguf_tokenizer import tokenizer_files
from engine.models.source import home, read_config
from engine.models.wheels import Source
from engine.tokenizer import Tokenizer
from tests.engine.models.gguf_files import tokenizer_metadata
from tests.support.engines import tiny_core
from tests.support.packed import packed_logits

# Each in a form that tokenizers have been seen to get wrong.
TEXTS = [
    "",
    " ",
    "\n",
    "a",
    " a",
    "a ",
    "  a  b   c    d",
    "Hello, world! It's we'll THEY'RE I'd don't don’t 'tis",
    "x=1;y = 22\n\treturn x+y  # comment\n\n\n",
    "def f(x: int) -> int:\n    return x ** 2\n\n\nclass A:\n        pass\n",
    '{"a": [1, 2.5e-10, null], "b": {"c": "\\u00e9"}}',
    "SELECT * FROM t WHERE a <= 0x1F AND b != '1,234,567.89';",
    "<h1 class='x'>title</h1><br/>&amp;",
    "http://example.com/a?b=c&d=e#f user@host C:\\dir\\file ~/.bashrc",
    "日本語のテキスト。こんにちは 世界",
    "Ünïcödé café e\u0301 a\u0300\u0301b zażółć gęślą jaźń",
    "😀😀 👨\u200d👩\u200d👧\u200d👦 🇫🇷 \U0001f9d1\U0001f3fd\u200d\U0001f680",
    "مرحبا بالعالم Привет, мир! γειά σου שלום नमस्ते สวัสดี",
    "\u200b\ufeff\u00a0x\u3000y\u2028z",
    "a\r\nb\rc\n\r\n\td\t\te",
    "ſ K Å ﷺ ½ ² ① Ⅷ ٣",
    "0 1 12 123 1234 12345 1.5 2024-01-31 007",
    "$%^&*()_+-={}[]|\\:\";'<>?,./ ....!!!???——…",
    "x" * 100,
    "\n" * 40,
    "\t" * 9,
    "\x01\x7f\x80\x9f",
    "<0x41> <0x0A> Ġ Ċ </s",
]
SPECIAL = [
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|im_end|><|im_end|> <|im_end",
    "<bos>x<eos> <start_of_turn>user\nhi<end_of_turn>",
    "<unk><pad> [multimodal]<unused7> <mask>",
]


def mixtures(pieces: list[str], count: int) -> Iterator[str]:
    random_state = random.Random(0)
    for _ in range(count):
        yield "".join(random_state.choices(pieces, k=random_state.randint(1, 12)))


def backend(metadata: dict[str, Any]) -> Backend:
    return Backend.from_str(tokenizer_files(metadata)["tokenizer.json"])


# -- byte-level vocabularies


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CASES = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
LLAMA3 = (
    rf"{CASES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The patterns that llama.cpp splits by, one after the other.
PATTERNS = {
    "gpt-2": [GPT2],
    "default": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
}


def split_by(patterns: list[str], text: str) -> list[str]:
    parts = [text]
    for pattern in patterns:
        parts = [piece for part in parts for piece in regex.split(f"({pattern})", part) if piece]
    return parts


@pytest.mark.parametrize("name", PATTERNS)
def test_text_is_split_as_the_name_of_the_pattern_says(name: str) -> None:
    tokenizer = backend(tokenizer_metadata() | {"tokenizer.ggml.pre": name})
    for text in [*TEXTS, *mixtures([" ", "  ", "a", "B", "1", "23", "'s", "!", "\n", "é"], 500)]:
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[slice(*span)] for _, span in pieces] == split_by(PATTERNS[name], text)


def test_llama_3_takes_whole_words_that_no_merges_lead_to() -> None:
    metadata = tokenizer_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"][:-1], "xyzzy"]
    for name, whole in (("llama-bpe", True), ("gpt-2", False)):
        more = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.pre": name}
        tokenizer = backend(metadata | more)
        assert (tokenizer.encode("xyzzy").tokens == ["xyzzy"]) is whole


def test_qwen_composes_characters_first() -> None:
    for name, composed in (("qwen2", True), ("gpt-2", False)):
        tokenizer = backend(tokenizer_metadata() | {"tokenizer.ggml.pre": name})
        assert (tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids) is composed


# -- SentencePiece's


PIECES = [
    *("▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "ca", "caca", "aa", "aaa", "bca"),
    *("▁b", "▁bc", "cab", "cc"),
]


def sentence_piece_metadata(**more: Any) -> dict[str, Any]:
    """Byte pieces, two spaces as one piece of their own, and PIECES by falling score."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "  ", *PIECES]
    scores = [0.0] * 259 + [-1000.0] + [-float(rank) for rank in range(len(PIECES))]
    types = [2, 3, 3] + [6] * 256 + [4] + [1] * len(PIECES)
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": False,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (values | more).items()}


def best_first(text: str) -> list[str]:
    """The algorithm as published: join the neighbours whose piece has the best score, repeat."""
    pieces = list(text.replace(" ", "▁"))
    while True:
        joined = ["".join(pair) for pair in pairwise(pieces)]
        ranks = [(PIECES.index(one), at) for at, one in enumerate(joined) if one in PIECES]
        if not ranks:
            break
        _, at = min(ranks)
        pieces[at : at + 2] = [joined[at]]
    out = []
    for piece in pieces:
        out += [piece] if piece in PIECES else [f"<0x{byte:02X}>" for byte in piece.encode()]
    return out


def test_the_best_scored_pair_is_joined_first() -> None:
    tokenizer = backend(sentence_piece_metadata())
    for text in mixtures(["a", "b", "c", " a", " b", "ab", "ca", "é", "\n"], 500):
        assert tokenizer.encode(text).tokens == best_first(text), text


def test_pieces_that_a_user_defined_are_found_before_all_others() -> None:
    tokenizer = backend(sentence_piece_metadata())
    assert tokenizer.encode("a   b").tokens == ["a", "  ", "▁b"]
    assert tokenizer.decode(tokenizer.encode("a   b").ids) == "a   b"


def test_a_space_is_put_in_front_where_the_file_says_so() -> None:
    tokenizer = backend(sentence_piece_metadata(add_space_prefix=True))
    assert tokenizer.encode("ab c").tokens == ["▁ab", "▁", "c"]
    assert tokenizer.decode(tokenizer.encode("ab c").ids) == "ab c"


# -- special tokens


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False])
def test_ends_are_added_as_the_file_says(kind: str, bos: bool | None, eos: bool) -> None:
    metadata = tokenizer_metadata() if kind == "gpt2" else sentence_piece_metadata()
    metadata["tokenizer.ggml.add_eos_token"] = eos
    metadata["tokenizer.ggml.add_bos_token"] = bos
    if bos is None:
        del metadata["tokenizer.ggml.add_bos_token"]
    tokenizer = backend(metadata)
    adds_bos = kind == "llama" if bos is None else bos
    inside = tokenizer.encode("a", add_special_tokens=False).ids
    assert tokenizer.encode("a").ids == [1] * adds_bos + inside + [2] * eos


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    metadata = tokenizer_metadata()
    types = metadata["tokenizer.ggml.token_type"]
    types[-1] = 4
    last = metadata["tokenizer.ggml.tokens"][-1]
    tokenizer = backend(metadata)
    ids = tokenizer.encode(f"a</s>{last}b").ids
    assert ids == [*tokenizer.encode("a").ids, 2, len(types) - 1, *tokenizer.encode("b").ids]
    assert tokenizer.decode(ids) == f"a{last}b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a</s>{last}b"


def test_a_folder_gets_the_names_and_the_chat_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    for name, content in tokenizer_files(
        tokenizer_metadata() | {"tokenizer.chat_template": template}
    ).items():
        (tmp_path / name).write_text(content)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.hf.pad_token_id) == (1, 2, 0)
    assert tokenizer.special == {0: "<pad>", 1: "<s>", 2: "</s>"}
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "[hi]"


def test_a_kind_that_is_not_known_is_refused() -> None:
    with pytest.raises(ModelUnavailable, match="tokenizers of kind 'bert' are not read"):
        tokenizer_files({"tokenizer.ggml.model": "bert"})


# -- the real models


@dataclass
class Real:
    """A served model, and what `transformers` makes of the same file."""

    folder: Path
    ours: Tokenizer
    tokenizer: Any
    model: Any


def real(name: str, folder: Path) -> Real:
    config = read_config(name)
    assert config is not None
    source = Source.model_validate(config["source"])
    files = home() / "files" / source.sha256[:16]
    with pytest.MonkeyPatch.context() as patch:
        # Opening the file takes seconds, and `transformers` does it for each of its parts.
        patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
        tokenizer = transformers.AutoTokenizer.from_pretrained(files, gguf_file=source.file)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            files, gguf_file=source.file, dtype=torch.float32
        )
    return Real(folder, Tokenizer(folder), tokenizer, model.eval())


@pytest.fixture(scope="module")
def smollm2(real_folder: Path) -> Real:
    return real("smollm2-135m-instruct", real_folder)


@pytest.fixture(scope="module")
def gemma(gemma_folder: Path) -> Real:
    return real("gemma-3-270m", gemma_folder)


def equal_logits(one: Real) -> None:
    core, _ = tiny_core(one.folder, kv_cache_memory=1 << 28)
    prompts = [one.ours.encode(text) for text in (TEXTS[9], TEXTS[14], TEXTS[7] * 3)]
    for ids, logits in zip(prompts, packed_logits(core.model, prompts, 16), strict=True):
        with torch.inference_mode():
            want = one.model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_smollm2_splits_text_as_transformers_does(smollm2: Real) -> None:
    pieces = ["the", " and", "  ", "\n", "12", "345", "é", "日本", "😀", "'s", "_", "<|im_end|>"]
    for text in [*TEXTS, *SPECIAL, *mixtures(pieces, 1000)]:
        # `transformers` does not read that this model's digits stand alone.
        parts = regex.split(r"(\p{N})", text)
        want = [token for part in parts for token in smollm2.tokenizer.encode(part)]
        assert smollm2.ours.encode(text) == want, text
        assert smollm2.ours.decode(want) == smollm2.tokenizer.decode(
            want, clean_up_tokenization_spaces=False
        )


@pytest.mark.slow
def test_smollm2_splits_digits_as_llama_cpp_does(smollm2: Real) -> None:
    for text, ids in (  # from llama.cpp's own tokenizer
        ("1 2  3", [33, 216, 34, 256, 35]),
        ("    foo  12.345", [333, 29856, 256, 33, 34, 30, 35, 36, 37]),
        ("\n\n345,", [1116, 35, 36, 37, 28]),
    ):
        assert smollm2.ours.encode(text) == ids


@pytest.mark.slow
def test_smollm2_renders_chats_as_transformers_does(smollm2: Real) -> None:
    user = {"role": "user", "content": "What is 2 + 2?"}
    system = {"role": "system", "content": "Be brief."}
    assistant = {"role": "assistant", "content": "4."}
    for messages in ([user], [system, user], [user, assistant, user]):
        for prompts in (True, False):
            want = smollm2.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompts
            )
            assert smollm2.ours.render_chat(messages, add_generation_prompt=prompts) == want


@pytest.mark.slow
def test_smollm2_gives_the_logits_that_transformers_gives(smollm2: Real) -> None:
    equal_logits(smollm2)


@pytest.mark.slow
def test_gemma_splits_text_as_transformers_does(gemma: Real) -> None:
    pieces = ["the", " and", "  ", "\n\n", "12", "é", "日本", "😀", "_", "<eos>", "<0x41>", "\t"]
    for text in [*TEXTS, *SPECIAL, *mixtures(pieces, 1000)]:
        want = gemma.tokenizer.encode(text)
        assert gemma.ours.encode(text) == want, text
        assert gemma.ours.decode(want) == gemma.tokenizer.decode(
            want, clean_up_tokenization_spaces=False
        )


@pytest.mark.slow
def test_gemma_takes_runs_of_spaces_as_llama_cpp_does(gemma: Real) -> None:
    # 31 spaces are one token; `transformers` halves longer runs instead.
    for count, ids in ((31, [167]), (40, [167, 145]), (100, [167, 167, 167, 143])):
        assert gemma.ours.encode(" " * count, add_special_tokens=False) == ids


@pytest.mark.slow
def test_gemma_gives_the_logits_that_transformers_gives(gemma: Real) -> None:
    equal_logits(gemma)
