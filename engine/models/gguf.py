"""GGUF files, converted once to a Hugging Face folder that everything else can read.

Reading a GGUF's metadata takes seconds (its vocabulary is one array of strings), and so does
turning its quantised blocks into numbers; the folder loads in one. Weights become float32: a block
of Q4_1, say, holds products of a 16-bit scale and offset that no 16-bit number holds.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelUnavailable
from engine.models.gguf_tokenizer import tokenizer_files
from engine.models.scratch import Scratch
from engine.models.tensor_file import GROUPS_FILE, INDEX_FILE, Planned, write

_SHARD_BYTES = 2 << 30
_PIECE_BYTES = 4 << 20

Metadata = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one GGUF architecture maps to a Hugging Face one."""

    model_type: str
    class_name: str
    extra: Callable[[Metadata, str], dict[str, Any]] = lambda _metadata, _prefix: {}
    names: tuple[tuple[str, str], ...] = ()  # per-layer names that differ from Llama's
    permuted: bool = False  # are query and key rows interleaved?
    norm_offset: float = 0.0  # what the file has added to the norms' weights


def _gemma3(metadata: Metadata, prefix: str) -> dict[str, Any]:
    heads, width = (
        metadata[f"{prefix}.attention.head_count"],
        metadata[f"{prefix}.embedding_length"],
    )
    key_dim = metadata[f"{prefix}.attention.key_length"]
    is_27b = metadata[f"{prefix}.block_count"] == 62
    return {
        "sliding_window": metadata[f"{prefix}.attention.sliding_window"],
        "query_pre_attn_scalar": width // heads if is_27b else key_dim,
        "hidden_activation": "gelu_pytorch_tanh",
    }


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        extra=_gemma3,
        names=(
            ("post_attention_norm", "post_attention_layernorm"),
            ("ffn_norm", "pre_feedforward_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        ),
        norm_offset=1.0,
    ),
}

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


_HEADS = ("num_key_value_heads", "num_attention_heads")  # of keys, of queries

_KINDS = gguf.GGMLQuantizationType
_GROUP = 32
_CODE_BYTES = {_KINDS.Q4_0: 16, _KINDS.Q4_1: 16, _KINDS.Q8_0: 32}  # of a group


def convert(path: Path, folder: Path, scratch: Scratch) -> None:
    """Write a GGUF file's Hugging Face folder, which exists and is empty.

    The file is mapped meanwhile, so nobody else may have it. Raises ModelUnavailable if it is
    broken, holds something that cannot be served, or finds no room on the disk; OSError.
    """
    try:
        reader = gguf.GGUFReader(path)
        metadata: Metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
    except OSError:
        raise
    except Exception as error:  # of any kind: lengths and types are whatever the file says
        raise ModelUnavailable(f"{path.name} is not a readable GGUF file: {error}") from error
    prefix = metadata.get("general.architecture", "")
    architecture = ARCHITECTURES.get(prefix) if isinstance(prefix, str) else None
    if architecture is None:
        raise ModelUnavailable(
            f"{path.name} holds a {prefix or 'nameless'} model; of GGUF files, only "
            f"{', '.join(ARCHITECTURES)} are read"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(metadata, prefix, architecture, tensors)
        tokenizer = tokenizer_files(metadata)
    except KeyError as error:
        raise ModelUnavailable(f"{path.name} lacks {error}") from error
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    generation = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({end for end in ends if end is not None}),
    }
    files = {"config.json": config, "generation_config.json": generation} | tokenizer
    shards, groups = _planned(tensors, config, architecture)
    files[INDEX_FILE] = {
        "metadata": {},
        "weight_map": {tensor.name: file for file, shard in shards.items() for tensor in shard},
    }
    texts = {
        name: content if isinstance(content, str) else json.dumps(content)
        for name, content in files.items()
    }
    if groups:
        shards[GROUPS_FILE] = groups
    _write(texts, shards, folder, path.name, scratch)


def _write(
    texts: dict[str, str],
    tensors: dict[str, list[Planned]],
    folder: Path,
    name: str,
    scratch: Scratch,
) -> None:
    weights = sum(tensor.nbytes for planned in tensors.values() for tensor in planned)
    size = weights + sum(len(text.encode()) for text in texts.values())
    with (
        scratch.room(size, f"{name}, converted,"),
        scratch.progress(weights, "converting") as go_on,
    ):
        for file, planned in tensors.items():
            write(folder / file, planned, go_on)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")


def _config(
    metadata: Metadata, prefix: str, architecture: Architecture, tensors: dict[str, Any]
) -> dict[str, Any]:
    heads = metadata[f"{prefix}.attention.head_count"]
    width = metadata[f"{prefix}.embedding_length"]
    head_dim = metadata.get(f"{prefix}.attention.key_length", width // heads)
    if metadata.get(f"{prefix}.rope.dimension_count", head_dim) != head_dim:
        raise ModelUnavailable("rotary positions over part of a head are not read from GGUF")
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "intermediate_size": metadata[f"{prefix}.feed_forward_length"],
        "num_hidden_layers": metadata[f"{prefix}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{prefix}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata[f"{prefix}.context_length"],
        "rms_norm_eps": metadata[f"{prefix}.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata.get(f"{prefix}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata, prefix, head_dim, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
        **architecture.extra(metadata, prefix),
    }


def _rope_scaling(
    metadata: Metadata, prefix: str, head_dim: int, tensors: dict[str, Any]
) -> dict[str, Any] | None:
    kind = metadata.get(f"{prefix}.rope.scaling.type", "none")
    original = metadata.get(f"{prefix}.rope.scaling.original_context_length")
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": metadata[f"{prefix}.rope.scaling.factor"]}
        return scaling | ({"original_max_position_embeddings": original} if original else {})
    if kind != "none":
        raise ModelUnavailable(f"rope scaling of type {kind} is not read from GGUF")
    if "rope_freqs.weight" in tensors:
        theta = metadata.get(f"{prefix}.rope.freq_base", 10000.0)
        return _llama3_scaling(np.asarray(tensors["rope_freqs.weight"].data), theta, head_dim)
    return None


def _llama3_scaling(divisors: NDArray[np.float32], theta: float, head_dim: int) -> dict[str, Any]:
    """The Llama 3 scaling whose divisors of the angles a file holds in place of its name."""
    angles = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    wavelengths = 2 * np.pi / angles
    low, high, original = 1.0, 4.0, 8192
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    for factor in (8.0, 32.0):
        expected = 1 / ((1 - smooth) / factor + smooth)
        if np.allclose(divisors, expected, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ModelUnavailable("the file scales rotary angles in an unknown way")


# -- weights


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor of the file, with its rows in Hugging Face's order."""

    name: str  # Hugging Face's
    kind: Any
    shape: tuple[int, ...]
    rows: NDArray[Any]  # as the file holds them
    order: NDArray[np.int64] | None  # None: as they are
    offset: float  # what the file has added

    def pieces(self) -> Iterator[NDArray[Any]]:
        """Some rows after the other, so that memory for a few megabytes of numbers is enough."""
        step = max(1, _PIECE_BYTES // (4 * math.prod(self.shape[1:])))
        for start in range(0, len(self.rows), step):
            part = slice(start, start + step)
            yield self.rows[part] if self.order is None else self.rows[self.order[part]]

    def floats(self) -> Iterator[NDArray[np.float32]]:
        for rows in self.pieces():
            try:
                values = gguf.dequantize(rows, self.kind).astype(np.float32, copy=False)
            except NotImplementedError as error:
                raise ModelUnavailable(
                    f"tensors of type {self.kind.name} are not read from GGUF"
                ) from error
            yield values - np.float32(self.offset) if self.offset else values

    def group_parts(self) -> list[Planned]:
        """Its codes as they are, for kernels that multiply by them; none if it has no such codes.

        A weight is d·code + m. Two codes of 4 bits share a byte: entries i and i + 16 of a group.
        """
        if self.kind not in _CODE_BYTES or len(self.shape) != 2:
            return []
        num_rows, columns = self.shape
        num_groups = columns // _GROUP
        shapes = {"codes": num_groups * _CODE_BYTES[self.kind], "d": num_groups, "m": num_groups}
        if self.kind is _KINDS.Q8_0:
            del shapes["m"]

        def pieces(part: str) -> Callable[[], Iterator[NDArray[Any]]]:
            return lambda: (self._group_part(part, rows) for rows in self.pieces())

        return [
            Planned(
                f"{self.name}.{part}",
                "uint8" if part == "codes" else "float16",
                (num_rows, width),
                pieces(part),
            )
            for part, width in shapes.items()
        ]

    def _group_part(self, part: str, rows: NDArray[Any]) -> NDArray[Any]:
        blocks = rows.reshape(len(rows), -1, gguf.GGML_QUANT_SIZES[self.kind][1])
        if part == "codes":
            codes = blocks[..., -_CODE_BYTES[self.kind] :].reshape(len(rows), -1)
            return codes ^ 0x80 if self.kind is _KINDS.Q8_0 else codes
        at = 2 if part == "m" and self.kind is _KINDS.Q4_1 else 0
        scales = blocks[..., at : at + 2].copy().view(np.float16)[..., 0]
        if part == "m" and self.kind is _KINDS.Q4_0:
            return (-8 * scales.astype(np.float32)).astype(np.float16)
        return scales


def _planned(
    tensors: dict[str, Any], config: dict[str, Any], architecture: Architecture
) -> tuple[dict[str, list[Planned]], list[Planned]]:
    """The tensors of each file of weights, and those of the file of codes."""
    shards: list[list[Planned]] = [[]]
    groups: list[Planned] = []
    size = 0
    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":  # in the config by now
            continue
        weight = _weight(tensor, config, architecture)
        floats = Planned(weight.name, "float32", weight.shape, weight.floats)
        if size and size + floats.nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(floats)
        size += floats.nbytes
        groups += weight.group_parts()
    return {f"model-{at:05}.safetensors": shard for at, shard in enumerate(shards)}, groups


def _weight(tensor: Any, config: dict[str, Any], architecture: Architecture) -> _Weight:
    name = str(tensor.name)
    ours, order = _name(name, architecture), None
    if architecture.permuted and (".attn_q." in name or ".attn_k." in name):
        order = _unpermuted(np.arange(len(tensor.data)), config[_HEADS[".attn_q." in name]])
    return _Weight(
        name=ours,
        kind=tensor.tensor_type,
        shape=tuple(int(size) for size in reversed(tensor.shape)),
        rows=tensor.data,
        order=order,
        offset=architecture.norm_offset if ours.endswith("norm.weight") else 0.0,
    )


def _name(name: str, architecture: Architecture) -> str:
    """blk.3.attn_q.weight as model.layers.3.self_attn.q_proj.weight."""
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{suffix}"
    block, _, rest = stem.removeprefix("blk.").partition(".")
    known = _LAYER_NAMES | dict(architecture.names)
    if not stem.startswith("blk.") or rest not in known:
        raise ModelUnavailable(f"the file holds a tensor {name!r} that has no place in the model")
    return f"model.layers.{block}.{known[rest]}.{suffix}"


def _unpermuted(rows: NDArray[np.int64], heads: int) -> NDArray[np.int64]:
    """From llama.cpp's row order, where pairs that turn together are neighbours, to halves."""
    return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
