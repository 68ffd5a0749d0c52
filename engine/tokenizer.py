"""The model's tokenizer, and what each token is in bytes."""

import copy
import inspect
import json
import math
import os
import re
import threading
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.models

from engine.errors import InvalidRequest, ModelUnavailable

# One text's pieces are not worth threads of their own, which would stand in the engine's way.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# What a tokenizer_config.json may hold besides and leave tokenizer.json as it is.
_WITHOUT_EFFECT = {
    *("tokenizer_class", "backend", "chat_template"),
    *("model_max_length", "clean_up_tokenization_spaces"),
}

_SHOWN_ERROR = 500  # characters of what a template says

# Characters that Unicode's composition makes one of, at most.
_LONGEST_COMPOSITION = 4

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text to ids and back. Thread-safe, but for what is `remembering`. Pickles."""

    def __init__(self, folder: Path) -> None:
        """Load from a Hugging Face folder. Raises ModelUnavailable."""
        self._folder = folder
        self._lock = threading.Lock()
        self._hf: Any = None
        self._remembered: dict[tuple[tuple[str, ...], bool], list[list[int]]] | None = None
        self._plain = _read_plain(folder)
        if self._plain is not None:
            self._backend = self._plain.backend
            self.bos_id, self.eos_id = (self._plain.id_of(role) for role in _ROLES[:2])
        else:
            if not self.hf.is_fast:
                raise ModelUnavailable(f"the tokenizer in {folder} has no `tokenizers` form")
            self._backend = self.hf.backend_tokenizer
            self.bos_id, self.eos_id = self.hf.bos_token_id, self.hf.eos_token_id
        if not self._backend.get_vocab(with_added_tokens=False):
            # What `transformers` makes up for some families where there are no files.
            raise ModelUnavailable(f"the tokenizer in {folder} has no vocabulary")
        # A tokenizer.json may ask for padding or truncation, as in training; a server must not.
        self._backend.no_padding()
        self._backend.no_truncation()
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocabulary: dict[str, int] = vocab
        self.size = max(vocab.values()) + 1
        added = self._backend.get_added_tokens_decoder()
        self._added_tokens: dict[int, Any] = added
        self.special = {i: str(token.content) for i, token in added.items() if token.special}
        self._added = {i: str(token.content) for i, token in added.items()}
        self._bytes: dict[int, bytes] = {}
        decoder = self._backend.decoder
        kinds = _decoder_kinds(json.loads(decoder.__getstate__())) if decoder else set()
        self._byte_level = _byte_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds

    def __getstate__(self) -> dict[str, Any]:
        # What is found anew where it is wanted, and the lock.
        return self.__dict__ | {"_lock": None, "_bytes": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_lock": threading.Lock()})

    @property
    def hf(self) -> Any:
        """What `transformers` makes of the folder: the roles of tokens, and the chat template.

        Raises ModelUnavailable. Importing `transformers` takes a second, so it waits until then,
        if it can.
        """
        with self._lock:
            if self._hf is None:
                self._hf = _load_hf(self._folder) if self._plain is None else self._plain.hf()
        return self._hf

    @property
    def has_hf(self) -> bool:
        """Is `hf` there at once?"""
        return self._hf is not None

    def warm_up(self) -> None:
        """Find now whatever is otherwise found when it is first asked for."""
        with suppress(ModelUnavailable):  # whoever asks is told
            _ = self.hf, self._template_arguments
        _ = self.adds_bos, self._coarsest

    @cached_property
    def adds_bos(self) -> bool:
        """Does encoding text put a beginning-of-sequence token first?"""
        return self.encode("")[:1] == [self.bos_id]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.encode_all([text], add_special_tokens)[0]

    def encode_all(self, texts: Seq[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Each text by itself. Other threads run meanwhile, as they do not beside `encode` of
        `tokenizers`.
        """
        key = (tuple(texts), add_special_tokens)
        if self._remembered is not None and key in self._remembered:
            return [ids.copy() for ids in self._remembered[key]]
        encoded = self._backend.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        all_ids = [one.ids for one in encoded]
        if self._remembered is not None:
            self._remembered[key] = [ids.copy() for ids in all_ids]
        return all_ids

    def remembering(self) -> "Tokenizer":
        """The same tokenizer, which encodes no text twice: for what the prompts of a request share.

        It keeps all it has encoded, so it should not outlive that request.
        """
        other = copy.copy(self)
        other._remembered = {}
        return other

    def least_tokens(self, text: str) -> int:
        """No encoding of this text has fewer tokens: found in no time, however long it is."""
        if self._coarsest is None:
            return 0
        longest, vanishing = self._coarsest
        return (len(text) - sum(map(text.count, vanishing))) // longest

    @cached_property
    def _coarsest(self) -> tuple[int, list[str]] | None:
        """How many characters a token can stand for at most, and those that have none.

        None if that is not known: only of byte-level BPE, and of BPE that falls back to bytes,
        where nothing else of a text is left out on the way.
        """
        model = self._backend.model
        if not isinstance(model, tokenizers.models.BPE):
            return None
        bytes_of = {byte: symbol for symbol, byte in _byte_alphabet().items()}
        if model.byte_fallback:
            bytes_of = {byte: f"<0x{byte:02X}>" for byte in range(256)}
        missing = {byte for byte, symbol in bytes_of.items() if symbol not in self.vocabulary}
        # Every character of several bytes has one of these.
        if missing.intersection(range(0x80, 0xC0)):
            return None
        if any(token.lstrip or token.rstrip for token in self._added_tokens.values()):
            return None  # takes any number of spaces along
        if not _keeps_all(_state_of(self._backend.pre_tokenizer)):
            return None
        composed = _composed(_state_of(self._backend.normalizer))
        if composed is None:
            return None
        vanishing = [chr(byte) for byte in missing if byte < 0x80]
        return composed * max(map(len, self.vocabulary)), vanishing

    def decode(self, token_ids: Seq[int], skip_special_tokens: bool = False) -> str:
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Messages as one prompt, through the chat template, which also sees `variables`.

        Raises InvalidRequest.
        """
        if not options.get("chat_template") and not self.hf.chat_template:
            raise InvalidRequest("this model has no chat template; use /v1/completions", "messages")
        variables = variables or {}
        if taken := sorted(variables.keys() & self._template_arguments):
            raise InvalidRequest(
                f"chat_template_kwargs must not hold {taken[0]}",
                f"chat_template_kwargs.{taken[0]}",
            )
        try:
            text: str = self.hf.apply_chat_template(
                messages, tokenize=False, **options, **variables
            )
        except Exception as error:
            own = options.get("chat_template")
            reason = "it takes too much memory" if isinstance(error, MemoryError) else str(error)
            raise InvalidRequest(
                "the chat template refuses these messages: "
                f"{reason[:_SHOWN_ERROR] or type(error).__name__}",
                "chat_template" if own else "messages",
            ) from error
        return text

    @cached_property
    def _template_arguments(self) -> set[str]:
        return set(inspect.signature(self.hf.apply_chat_template).parameters)

    def text_of(self, token_id: int) -> str:
        """A token on its own, as shown to people; U+FFFD for a partial character."""
        return self.bytes_of(token_id).decode(errors="replace")

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes a token adds in the middle of a text; a special token's own string."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._find_bytes(token_id)
        return self._bytes[token_id]

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:  # a padding row of the embedding
            return b""
        if self._byte_level is not None:
            mapped = [self._byte_level.get(character) for character in token]
            return b"".join(
                character.encode() if byte is None else bytes((byte,))
                for byte, character in zip(mapped, token, strict=True)
            )
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes((int(match[1], 16),))
        # Whatever else the decoder does: see what the token adds behind another one.
        before = self._backend.decode([self._anchor], skip_special_tokens=False)
        both = self._backend.decode([self._anchor, token_id], skip_special_tokens=False)
        return str(both[len(before) :]).encode()

    @cached_property
    def _anchor(self) -> int:
        return self.encode("a", add_special_tokens=False)[-1]

    @cached_property
    def strips_first_space(self) -> bool:
        """Does decoding drop the space that its first token begins with?"""
        spaced = self.encode(" a a", add_special_tokens=False)[-1]
        return self.bytes_of(spaced).startswith(b" ") and not self.decode([spaced]).startswith(" ")


@dataclass(frozen=True, slots=True)
class _Plain:
    """A tokenizer.json that `transformers` would take as it is, and what else it would know."""

    backend: Any
    roles: dict[str, str]
    chat_template: str | None

    def id_of(self, role: str) -> int | None:
        token = self.roles.get(role)
        found: int | None = None if token is None else self.backend.token_to_id(token)
        return found

    def hf(self) -> Any:
        import transformers

        # Without a vocabulary: reading it again would hold up everything else, as `tokenizers` does
        # not let other threads run.
        empty = tokenizers.Tokenizer(tokenizers.models.BPE())
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=empty, chat_template=self.chat_template, **self.roles
        )


def _read_plain(folder: Path) -> _Plain | None:
    """A Llama's tokenizer, if the files say all about it. Other families' classes change it."""
    more = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
    if any((folder / name).exists() for name in more):
        return None
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = config.get("chat_template")
        if (file := folder / "chat_template.jinja").exists():
            template = file.read_text(encoding="utf-8")
        if (
            model_type != "llama"
            or config.get("tokenizer_class") not in ("PreTrainedTokenizerFast", "TokenizersBackend")
            or not config.keys() <= _WITHOUT_EFFECT.union(_ROLES)
            or not isinstance(template, str | None)
        ):
            return None
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # noqa: BLE001 - all that `tokenizers` raises; `transformers` will say why
        return None
    roles = {name: config[name] for name in _ROLES if config.get(name) is not None}
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    if not all(isinstance(token, str) and token in added for token in roles.values()):
        return None
    return _Plain(backend, roles, template)


def _load_hf(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ModelUnavailable(f"no usable tokenizer in {folder}: {reason}") from error


def _state_of(part: Any) -> dict[str, Any]:
    """What a part of a tokenizer would be in tokenizer.json; {} if there is none."""
    state: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return state


def _keeps_all(pre_tokenizer: dict[str, Any]) -> bool:
    """Does a pre-tokenizer leave out nothing of a text?"""
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return all(map(_keeps_all, pre_tokenizer["pretokenizers"]))
    if kind == "Split":
        return bool(pre_tokenizer["behavior"] != "Removed")
    return kind in (None, "ByteLevel", "Digits", "Metaspace", "Punctuation")


def _composed(normalizer: dict[str, Any]) -> int | None:
    """How many characters a normalizer makes one of, at most; None if that is not known."""
    kind = normalizer.get("type")
    if kind == "Sequence":
        parts = [_composed(part) for part in normalizer["normalizers"]]
        return None if None in parts else math.prod(part for part in parts if part is not None)
    if kind == "Replace":
        pattern = normalizer["pattern"].get("String")
        return 1 if pattern is not None and len(normalizer["content"]) >= len(pattern) else None
    return {None: 1, "Prepend": 1, "NFC": _LONGEST_COMPOSITION}.get(kind)


def _decoder_kinds(decoder: dict[str, Any]) -> set[str]:
    parts = decoder.get("decoders", [])
    return {decoder["type"]}.union(*(_decoder_kinds(part) for part in parts))


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(others)}
