"""GGUF files of tiny random models, written with the format's own library."""

import json
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers
from numpy.typing import NDArray

from engine.models import conversions
from tests.support import tiny

Kind = gguf.GGMLQuantizationType
Metadata = dict[str, Any]

KEY_DIM = 16
_SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# By GGUF architecture, the Hugging Face config of a tiny model.
CONFIGS: dict[str, Any] = {
    "llama": lambda **more: transformers.LlamaConfig(**_SIZES | more),
    "qwen2": lambda **more: transformers.Qwen2Config(**_SIZES | more),
    "qwen3": lambda **more: transformers.Qwen3Config(**_SIZES | {"head_dim": 32} | more),
    "gemma3": lambda **more: transformers.Gemma3TextConfig(
        **_SIZES
        | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 7}
        | {"tie_word_embeddings": True}
        | more
    ),
}


def metadata_of(architecture: str, config: Any) -> Metadata:
    """What llama.cpp's converter writes of a config."""
    theta = config.rope_parameters
    theta = theta.get("full_attention", theta)["rope_theta"]
    heads = config.num_attention_heads
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(theta),
    }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_dim * heads != config.hidden_size:
        values["attention.key_length"] = values["attention.value_length"] = head_dim
    if architecture == "gemma3":
        values["attention.sliding_window"] = config.sliding_window
    if architecture == "llama":
        values["rope.dimension_count"] = head_dim
    return {f"{architecture}.{name}": value for name, value in values.items()}


def tokenizer_metadata() -> Metadata:
    """The tiny models' tokenizer, as llama.cpp would write it."""
    hf = tiny.tokenizer()
    model = json.loads(hf.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if index < 3 else 1 for index in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def write(
    path: Path,
    architecture: str,
    metadata: Metadata,
    tensors: dict[str, NDArray[Any]],
    kinds: dict[str, Any] | None = None,
) -> Path:
    """Write a file. Tensors are float32, or already quantised as `kinds` says of them."""
    writer = gguf.GGUFWriter(path, architecture)
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in metadata.items():
        adders[type(value)](name, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(architecture: str, hf: Any) -> dict[str, NDArray[np.float32]]:
    """A model's weights by their GGUF names, in the order of rows that llama.cpp wants."""
    config = hf.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for name, parameter in hf.named_parameters():  # tied ones once
        values = parameter.detach().float().numpy()
        if architecture == "llama" and "q_proj" in name:
            values = permuted(values, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            values = permuted(values, config.num_key_value_heads)
        if architecture == "gemma3" and "norm" in name:
            values = values + 1
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    return tensors


def permuted(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Row i of a head's first half to 2i, of its second half to 2i + 1."""
    out = weight.copy()
    size = len(weight) // heads
    for row in range(len(weight)):
        head, inside = divmod(row, size)
        half, rank = divmod(inside, size // 2)
        out[head * size + 2 * rank + half] = weight[row]
    return out


def write_llama(path: Path, **more: Any) -> Path:
    """A tiny random Llama in float32; more metadata as keywords."""
    hf = transformers.LlamaForCausalLM(CONFIGS["llama"]())
    metadata = metadata_of("llama", hf.config) | tokenizer_metadata() | more
    return write(path, "llama", metadata, tensors_of("llama", hf))


def converted(path: Path, home: Path) -> Path:
    """The folder of a file, in a cache of one's own."""
    return conversions.fetch(conversions.of_file(path), home, threading.Event())
