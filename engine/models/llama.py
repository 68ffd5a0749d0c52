"""Llama, SmolLM2, Mistral, Qwen2 and Qwen3: Hugging Face's configs and names to ours."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.kernels.linear import Linear
from engine.models.base import Head, head_dtype
from engine.models.decoder import Decoder, DecoderConfig, DecoderLayer, paired
from engine.models.weights import Weights

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Angles that depend on nothing but the position. Dynamic scaling does so too, up to the context
# length the server allows; "longrope" changes with the length of the sequence.
_ROPES = ("default", "linear", "dynamic", "llama3", "yarn")


def fits(config: Any) -> bool:
    """Can this Hugging Face config be run by the Llama-shaped decoder?"""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FAMILIES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _ROPES
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and set(_layer_types(config)) <= {"full_attention", "sliding_attention"}
    )


def load(config: Any, weights: Weights) -> Decoder:
    """Build the decoder, taking every weight of the checkpoint."""
    ours = _decoder_config(config, weights.device)
    embed_name, head_name = "model.embed_tokens.weight", "lm_head.weight"
    tied = bool(config.tie_word_embeddings)
    wide = head_dtype(weights.dtype, weights.device)
    embedding = weights.take(embed_name, wide if tied else None)
    if tied and head_name in weights:
        weights.take(head_name)  # some checkpoints store the tied tensor twice
    head = Head(embedding if tied else weights.take(head_name, wide), tied=tied)
    layers = [
        _layer(weights, f"model.layers.{index}.", ours.head_dim)
        for index in range(config.num_hidden_layers)
    ]
    norm = weights.take("model.norm.weight")
    weights.check_all_used()
    return Decoder(ours, embedding, layers, norm, head)


def _decoder_config(config: Any, device: str) -> DecoderConfig:
    heads = config.num_attention_heads
    rotary = LlamaRotaryEmbedding(config=config)
    windows = [
        config.sliding_window if kind == "sliding_attention" else None
        for kind in _layer_types(config)
    ]
    return DecoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        norm_eps=config.rms_norm_eps,
        context_len=config.max_position_embeddings,
        windows=tuple(windows),
        inv_freq=rotary.inv_freq.to(device=device, dtype=torch.float32),
        rope_scale=float(rotary.attention_scaling),
    )


def _layer_types(config: Any) -> list[str]:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return list(types)
    slides = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers


def _layer(weights: Weights, prefix: str, head_dim: int) -> DecoderLayer:
    def stacked(module: str, parts: tuple[str, ...], suffix: str) -> Tensor:
        tensors = [weights.take(f"{prefix}{module}.{part}_proj.{suffix}") for part in parts]
        if module == "self_attn":  # queries and keys are turned by position, values are not
            tensors[:2] = [paired(tensor, head_dim) for tensor in tensors[:2]]
        return torch.cat(tensors)

    def fused(module: str, parts: tuple[str, ...]) -> Linear:
        biased = f"{prefix}{module}.{parts[0]}_proj.bias" in weights
        bias = stacked(module, parts, "bias") if biased else None
        return Linear(stacked(module, parts, "weight"), bias)

    def single(name: str) -> Linear:
        return Linear(weights.take(f"{prefix}{name}.weight"), weights.maybe(f"{prefix}{name}.bias"))

    def head_norm(name: str) -> Tensor | None:
        norm = weights.maybe(f"{prefix}self_attn.{name}.weight")
        return None if norm is None else paired(norm, head_dim)

    return DecoderLayer(
        attention_norm=weights.take(f"{prefix}input_layernorm.weight"),
        qkv=fused("self_attn", ("q", "k", "v")),
        out=single("self_attn.o_proj"),
        mlp_norm=weights.take(f"{prefix}post_attention_layernorm.weight"),
        gate_up=fused("mlp", ("gate", "up")),
        down=single("mlp.down_proj"),
        query_norm=head_norm("q_norm"),
        key_norm=head_norm("k_norm"),
    )
