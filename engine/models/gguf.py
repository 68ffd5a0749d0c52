"""GGUF files, converted once to a Hugging Face folder that everything else can read.

Reading a GGUF's metadata takes seconds (its vocabulary is one array of strings), and so does
turning its quantised blocks into numbers; the folder loads in one. Weights become float32: a block
of Q4_1, say, holds products of a 16-bit scale and offset that no 16-bit number holds.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tqdm import tqdm

from engine.errors import ModelUnavailable
from engine.models.gguf_tokenizer import tokenizer_files
from engine.models.weights import GROUPS_FILE

_FORMAT = 2  # raise it when conversions made before must not be used any more
_SHARD_BYTES = 2 << 30

Metadata = dict[str, Any]
Array = NDArray[np.float32]


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


def convert(path: Path, cache: Path) -> Path:
    """The Hugging Face folder of a GGUF file, made in `cache` the first time.

    Raises ModelUnavailable if the file is broken or holds something that cannot be served.
    """
    stat = path.stat()
    key = f"{_FORMAT}:{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    folder = cache / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache))
    try:
        _convert(path, scratch)
        scratch.rename(folder)
    except OSError:
        if not folder.exists():  # else another process has just made the same
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path) -> None:
    try:
        reader = gguf.GGUFReader(path)
        metadata: Metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelUnavailable(f"{path.name} is not a readable GGUF file: {error}") from error
    prefix = metadata.get("general.architecture", "")
    architecture = ARCHITECTURES.get(prefix)
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
    _save_weights(tensors, config, architecture, folder)
    _save_groups(tensors, config, architecture, folder)
    files = {"config.json": config, "generation_config.json": generation}
    for name, content in (files | tokenizer).items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


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


def _llama3_scaling(divisors: Array, theta: float, head_dim: int) -> dict[str, Any]:
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


def _save_weights(
    tensors: dict[str, Any], config: dict[str, Any], architecture: Architecture, folder: Path
) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(tensors, config, architecture)):
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(
    tensors: dict[str, Any], config: dict[str, Any], architecture: Architecture
) -> Iterator[dict[str, Array]]:
    shard: dict[str, Array] = {}
    size = 0
    for name, tensor in tqdm(
        tensors.items(), unit="tensor", desc="converting", leave=False, disable=None
    ):
        if name == "rope_freqs.weight":  # in the config by now
            continue
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelUnavailable(
                f"tensors of type {tensor.tensor_type.name} are not read from GGUF"
            ) from error
        weight = weight.astype(np.float32, copy=False)
        ours = _name(name, architecture)
        weight = _in_order(weight, name, config, architecture)
        if ours.endswith("norm.weight"):
            weight = weight - np.float32(architecture.norm_offset)
        if size and size + weight.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[ours] = np.ascontiguousarray(weight)
        size += weight.nbytes
    yield shard


def _save_groups(
    tensors: dict[str, Any], config: dict[str, Any], architecture: Architecture, folder: Path
) -> None:
    """The codes of weights in groups of 32, as they are, for kernels that multiply by them."""
    parts: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors.items():
        if (groups := _groups(tensor)) is not None:
            for part, values in groups.items():
                in_order = _in_order(values, name, config, architecture)
                parts[f"{_name(name, architecture)}.{part}"] = np.ascontiguousarray(in_order)
    if parts:
        save_file(parts, folder / GROUPS_FILE)


def _groups(tensor: Any) -> dict[str, NDArray[Any]] | None:
    """Codes and scales of a tensor [N, K]; None if it is of another kind.

    A weight is d·code + m. Two codes of 4 bits share a byte: entries i and i + 16 of a group.
    """
    kinds = gguf.GGMLQuantizationType
    kind = tensor.tensor_type
    if kind not in (kinds.Q4_0, kinds.Q4_1, kinds.Q8_0) or len(tensor.shape) != 2:
        return None
    num_rows = int(tensor.shape[1])
    blocks = tensor.data.reshape(num_rows, -1, gguf.GGML_QUANT_SIZES[kind][1])
    d = blocks[..., :2].copy().view(np.float16)[..., 0]
    if kind is kinds.Q8_0:
        return {"codes": (blocks[..., 2:] ^ 0x80).reshape(num_rows, -1), "d": d}
    if kind is kinds.Q4_1:
        m = blocks[..., 2:4].copy().view(np.float16)[..., 0]
    else:
        m = (-8 * d.astype(np.float32)).astype(np.float16)
    return {"codes": blocks[..., -16:].reshape(num_rows, -1), "d": d, "m": m}


def _in_order(
    rows: NDArray[Any], name: str, config: dict[str, Any], architecture: Architecture
) -> NDArray[Any]:
    """A tensor's rows in Hugging Face's order."""
    if not architecture.permuted or not (".attn_q." in name or ".attn_k." in name):
        return rows
    return _unpermuted(rows, config[_HEADS[".attn_q." in name]])


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


def _unpermuted(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """From llama.cpp's row order, where pairs that turn together are neighbours, to halves."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
