"""What each token is in bytes, for the kinds of tokenizers there are."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import InvalidRequest, ModelUnavailable
from engine.text import Detokenizer
from engine.tokenizer import Tokenizer
from tests.support import tiny

TEXTS = [
    "then in the end",
    "  two spaces, a\ttab\nand lines\n\n",
    "é and é, € and 😀",
    " begins with a space",
    "",
]
REAL_TEXTS = [
    *TEXTS,
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # comment\n",
    "日本語とひらがな、漢字。한국어 עברית العربية ไทย",
    "👩‍🚀👨‍👩‍👧‍👦 🇩🇪 ﬁ ½ ½ \u200d\ufeff\u2028 naïve Åse",
    "The quick brown fox jumps over the lazy dog. " * 20,
    "".join(chr(code) for code in range(0x20, 0x250)),
]


def joined(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of all tokens' bytes."""
    return b"".join(tokenizer.bytes_of(token_id) for token_id in ids).decode()


def one_by_one(tokenizer: Tokenizer, ids: list[int], skip: bool = False) -> str:
    """The text as it comes out of the detokenizer."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return "".join(detokenizer.feed(token_id) for token_id in ids) + detokenizer.flush()


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Words behind "▁", bytes for what is in no word: the way of SentencePiece, as in Llama 2."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for token in ("▁", "a", "b", "t", "h", "e", "n", "▁▁", "th", "▁a", "▁th", "▁the", "en", "é"):
        vocab[token] = len(vocab)
    merges = [("▁", "▁"), ("t", "h"), ("▁", "a"), ("▁", "th"), ("▁th", "e"), ("e", "n")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    folder = tmp_path_factory.mktemp("fallback")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return Tokenizer(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_byte_level_tokens_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert joined(tokenizer, ids) == one_by_one(tokenizer, ids) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_byte_fallback_tokens_are_the_text(fallback: Tokenizer, text: str) -> None:
    ids = fallback.encode(text, add_special_tokens=False)
    # The space put before the first word is no part of the text.
    assert joined(fallback, ids) == " " + text if text else joined(fallback, ids) == ""
    assert one_by_one(fallback, ids) == fallback.decode(ids) == text


def test_single_bytes_are_single_bytes(tokenizer: Tokenizer, fallback: Tokenizer) -> None:
    for byte in range(256):
        assert fallback.bytes_of(3 + byte) == bytes((byte,))
    euro = tokenizer.encode("€")
    assert [tokenizer.bytes_of(token_id) for token_id in euro] == [b"\xe2", b"\x82", b"\xac"]
    assert [tokenizer.text_of(token_id) for token_id in euro] == ["\ufffd"] * 3


def test_words_keep_the_space_before_them(fallback: Tokenizer) -> None:
    ids = fallback.encode("then a the", add_special_tokens=False)
    assert [fallback.text_of(token_id) for token_id in ids] == [" the", "n", " a", " the"]
    assert fallback.strips_first_space


def test_byte_level_text_may_begin_with_a_space(tokenizer: Tokenizer) -> None:
    assert not tokenizer.strips_first_space


def test_special_tokens_are_their_own_text(tokenizer: Tokenizer, fallback: Tokenizer) -> None:
    assert tokenizer.special == {0: "<pad>", 1: "<s>", 2: "</s>"}
    assert fallback.special == {0: "<unk>", 1: "<s>", 2: "</s>"}
    ids = [1, *fallback.encode("a then", add_special_tokens=False), 2]
    assert one_by_one(fallback, ids, skip=True) == fallback.decode(ids, skip_special_tokens=True)
    assert fallback.bytes_of(2) == b"</s>"


def test_ids_without_a_token_are_empty(tokenizer: Tokenizer) -> None:
    assert tokenizer.size == tiny.VOCAB
    assert tokenizer.bytes_of(tiny.VOCAB + 7) == b""


def test_a_begin_token_is_put_first_only_where_the_tokenizer_does(
    tokenizer: Tokenizer, fallback: Tokenizer
) -> None:
    assert fallback.adds_bos
    assert fallback.encode("a")[0] == fallback.bos_id == 1
    assert fallback.encode("a", add_special_tokens=False)[0] != 1
    assert not tokenizer.adds_bos
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_no_encoding_has_fewer_tokens_than_the_least(fallback: Tokenizer) -> None:
    for text in (*REAL_TEXTS, " " * 500, "the" * 500, "\x06" * 500):
        assert fallback.least_tokens(text) <= len(fallback.encode(text, add_special_tokens=False))
    assert fallback.least_tokens("the " * 1000) > 500


def test_where_text_can_vanish_no_least_is_known(tokenizer: Tokenizer) -> None:
    """The tiny tokenizer has no token for most bytes: of a million of them nothing is left."""
    assert tokenizer.encode("\u0416" * 1000) == []
    assert tokenizer.least_tokens("\u0416" * 1000) == 0


def test_a_tokenizer_pickles(tokenizer: Tokenizer, fallback: Tokenizer) -> None:
    for one in (tokenizer, fallback):
        again = pickle.loads(pickle.dumps(one))
        for text in TEXTS:
            ids = one.encode(text)
            assert again.encode(text) == ids
            assert [again.bytes_of(i) for i in ids] == [one.bytes_of(i) for i in ids]
        assert (again.special, again.size, again.bos_id) == (one.special, one.size, one.bos_id)
        assert again.hf.chat_template == one.hf.chat_template


def test_padding_and_truncation_asked_for_in_the_file_are_off(tmp_path: Path) -> None:
    wrapped = tiny.tokenizer()
    wrapped.backend_tokenizer.enable_truncation(4)
    wrapped.backend_tokenizer.enable_padding(length=64, pad_id=0)
    wrapped.save_pretrained(tmp_path)
    assert '"truncation": null' not in (tmp_path / "tokenizer.json").read_text()
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("then in the end")) == "then in the end"


def test_a_decoder_that_does_neither_is_asked_what_a_token_adds(tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "a": 1, "un": 2, "##want": 3, "##ed": 4, "b": 5}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]"
    ).save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert [tokenizer.bytes_of(token_id) for token_id in (3, 4, 5)] == [b"want", b"ed", b" b"]


def test_a_folder_without_a_tokenizer_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable) as raised:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


# -- what needs no `transformers`


def of_transformers(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def test_a_plain_tokenizer_is_the_one_of_transformers(tmp_path: Path) -> None:
    tiny.save(tiny.hf_model("llama"), tmp_path)
    tokenizer, want = Tokenizer(tmp_path), of_transformers(tmp_path)
    assert not tokenizer.has_hf
    assert tokenizer.vocabulary == want.get_vocab()
    for text in (*TEXTS, "a</s>b<pad><unused100>"):
        assert tokenizer.encode(text) == want.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (want.bos_token_id, want.eos_token_id)
    assert type(tokenizer.hf) is type(want)
    assert tokenizer.hf.special_tokens_map == want.special_tokens_map
    assert tokenizer.hf.chat_template == want.chat_template
    assert tokenizer.has_hf


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"add_eos_token": True}),
        ("tokenizer_config.json", {"unk_token": "<new>"}),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "x"}]}),
        ("special_tokens_map.json", {"eos_token": "<s>"}),
        ("config.json", {"model_type": "qwen2"}),
    ],
    ids=str,
)
def test_whatever_else_the_files_ask_for_is_done(
    file: str, changes: dict[str, object], tmp_path: Path
) -> None:
    """By `transformers`: some add tokens, and some classes make the tokenizer anew."""
    tiny.save(tiny.hf_model("llama"), tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    before = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps(before | changes))
    tokenizer, want = Tokenizer(tmp_path), of_transformers(tmp_path)
    assert tokenizer.has_hf
    assert tokenizer.encode("in the end, é") == want.encode("in the end, é")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (want.bos_token_id, want.eos_token_id)
    assert tokenizer.hf.chat_template == want.chat_template


# -- chat templates


MESSAGES = [{"role": "user", "content": "in the end"}]


def test_messages_become_a_prompt(tokenizer: Tokenizer) -> None:
    assert tokenizer.render_chat(MESSAGES, add_generation_prompt=True) == (
        "user: in the end\nassistant: "
    )
    template = "{{ greeting }}{{ messages[0]['content'] }}"
    text = tokenizer.render_chat(MESSAGES, {"greeting": "hi "}, chat_template=template)
    assert text == "hi in the end"


@pytest.mark.parametrize(
    ("template", "variables", "param"),
    [
        ("{{ raise_exception('not so') }}", {}, "chat_template"),
        ("{{ messages[7]['content'].x }}", {}, "chat_template"),
        ("{% broken", {}, "chat_template"),
        ("x", {"tokenize": True}, "chat_template_kwargs.tokenize"),
        ("x", {"conversation": []}, "chat_template_kwargs.conversation"),
    ],
)
def test_a_template_that_refuses_is_the_requests_fault(
    tokenizer: Tokenizer, template: str, variables: dict[str, object], param: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        tokenizer.render_chat(MESSAGES, variables, chat_template=template)
    assert raised.value.param == param


def test_a_model_without_a_template_says_where_to_go(fallback: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        fallback.render_chat(MESSAGES)


# -- real ones


@pytest.mark.slow
def test_the_default_model_renders_chats_as_transformers_does(real_folder: Path) -> None:
    tokenizer, want = Tokenizer(real_folder), of_transformers(real_folder)
    assert not tokenizer.has_hf
    for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
        text = tokenizer.render_chat(MESSAGES, **options)
        assert text == want.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert tokenizer.encode(text) == want.encode(text)


@pytest.fixture(scope="module", params=["real_folder", "gemma_folder"])
def real(request: pytest.FixtureRequest) -> Tokenizer:
    """A byte-level tokenizer and one with byte fallback."""
    return Tokenizer(request.getfixturevalue(request.param))


@pytest.mark.slow
@pytest.mark.parametrize("text", REAL_TEXTS, ids=range(len(REAL_TEXTS)))
def test_the_bytes_of_real_tokens_are_the_text(real: Tokenizer, text: str) -> None:
    ids = real.encode(text, add_special_tokens=False)
    assert joined(real, ids) == one_by_one(real, ids) == real.decode(ids) == text


@pytest.mark.slow
def test_no_encoding_by_the_real_tokenizer_has_fewer_tokens_than_the_least(real: Tokenizer) -> None:
    rng = random.Random(1)
    longest = sorted(real.vocabulary, key=len)[-50:]
    texts = [*REAL_TEXTS, "".join(chr(code) for code in range(128)) * 5, "\x06" * 1000]
    texts += ["".join(real.text_of(real.vocabulary[token]) for token in longest)]
    texts += ["".join(chr(rng.randrange(0xD800)) for _ in range(300)) for _ in range(50)]
    for text in texts:
        assert real.least_tokens(text) <= len(real.encode(text, add_special_tokens=False))
    assert real.least_tokens("word " * 1_000_000) > 50_000


def test_every_real_token_has_the_bytes_that_it_adds_to_a_text(real: Tokenizer) -> None:
    anchor = real.encode("x", add_special_tokens=False)[-1]
    before = len(real.decode([anchor]))
    for token_id in range(0, real.size, 7):
        assert real.text_of(token_id) == real.decode([anchor, token_id])[before:]
