"""The tokenizer inside a GGUF file, as `tokenizers` files."""

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from engine.errors import ModelUnavailable

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types of the format

# The splitting patterns published with the Llama 3 and Qwen 2 tokenizers.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_BYTES_ONLY = {"add_prefix_space": False, "use_regex": False}


def _pre_tokenizer(name: str) -> PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    match name:
        case "gpt-2" | "default":
            return gpt2
        case "smollm" | "starcoder" | "refact" | "command-r" | "codeshell":
            digits = pre_tokenizers.Digits(individual_digits=True)
            return pre_tokenizers.Sequence([digits, gpt2])
        case "llama-bpe" | "llama3":
            split = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
        case "qwen2" | "deepseek-r1-qwen":
            split = pre_tokenizers.Split(Regex(_QWEN2), "isolated")
        case _:
            raise ModelUnavailable(f"the file's tokenizer splits text in an unknown way: {name!r}")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(**_BYTES_ONLY)])


def tokenizer_files(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json. Raises ModelUnavailable for an unknown kind."""
    kind = metadata.get("tokenizer.ggml.model")
    match kind:
        case "gpt2":
            tokenizer = _byte_level(metadata)
        case "llama":
            tokenizer = _sentence_piece(metadata)
        case _:
            raise ModelUnavailable(f"tokenizers of kind {kind!r} are not read from GGUF")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    _add_special(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", []))
    named = {
        name: tokens[token_id]
        for name in ("bos", "eos", "unknown", "padding")
        if (token_id := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None
    }
    _add_post_processor(tokenizer, metadata, named)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named.get("bos"),
        "eos_token": named.get("eos"),
        "unk_token": named.get("unknown"),
        "pad_token": named.get("padding"),
        "chat_template": metadata.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}


def _byte_level(metadata: dict[str, Any]) -> Tokenizer:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    name = metadata.get("tokenizer.ggml.pre", "default")
    tokenizer = Tokenizer(
        BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=name in ("llama-bpe", "llama3"),
        )
    )
    if name in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(name)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: dict[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: always merge the pair whose result has the highest score."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    scores: list[float] = metadata["tokenizer.ggml.scores"]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=list(_merges(vocab, scores)),
            unk_token=tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Normalizer] = [normalizers.Replace(" ", "▁")]
    strip = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        strip = [decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float]) -> Iterator[tuple[str, str]]:
    """Every way to make a token of two others, best token first."""
    by_score = sorted(vocab, key=lambda token: -scores[vocab[token]])
    for token in by_score:
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        yield from sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


def _add_special(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in text before anything else is done with it."""
    marked = [
        (token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (2, 3, 4)
    ]
    special = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in marked
        if kind in (_UNKNOWN, _CONTROL)
    ]
    plain = [AddedToken(token, normalized=False) for token, kind in marked if kind == _USER_DEFINED]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_post_processor(
    tokenizer: Tokenizer, metadata: dict[str, Any], named: dict[str, str]
) -> None:
    kind = metadata.get("tokenizer.ggml.model")
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    before = [named["bos"]] if add_bos and "bos" in named else []
    after = [named["eos"]] if add_eos and "eos" in named else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*before, "$A", *after]),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in before + after],
        )
