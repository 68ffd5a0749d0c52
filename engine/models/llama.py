"""Llama, SmolLM2, Mistral, Qwen2 and Qwen3: Hugging Face's configs and names to ours."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.linear import Linear
from engine.kernels.quantized import QuantizedLinear, stacked
from engine.models import cpu_decoder
from engine.models.base import Head, head_dtype
from engine.models.cpu_decoder import CpuDecoder
from engine.models.decoder import Decoder, DecoderConfig, DecoderLayer, Product, paired
from engine.models.weights import Weights

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Angles that depend on nothing but the position. Dynamic scaling does so too, up to the context
# length the server allows; "longrope" changes with the length of the sequence.
_ROPES = ("default", "linear", "dynamic", "llama3", "yarn")

# What a config.json must say itself to be read without `transformers`, which knows the defaults.
_NUMBERS: dict[str, type] = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "max_position_embeddings": int,
    "rms_norm_eps": float,
    "tie_word_embeddings": bool,
}


class PlainConfig(SimpleNamespace):
    """What is used of a Hugging Face config, read from a config.json that leaves nothing open."""

    def get_text_config(self, **_: bool) -> Self:
        return self


def read_plain(file: Path) -> PlainConfig | None:
    """A Llama's config.json that names all its numbers and asks for nothing special.

    None for any other: `transformers` reads those, and importing it takes a second.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
        is_plain = (
            config["model_type"] == "llama"
            and config.get("hidden_act", "silu") == "silu"
            and all(type(config[name]) is kind for name, kind in _NUMBERS.items())
            and config["hidden_size"] % config["num_attention_heads"] == 0
            and "eos_token_id" in config
            and config.get("rope_scaling") is None
            and rope.keys() <= {"rope_theta", "rope_type"}
            and rope.get("rope_type", "default") == "default"
            and isinstance(rope["rope_theta"], int | float)
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError):
        return None
    if not is_plain:
        return None
    rope["rope_type"] = "default"
    return PlainConfig(**{"hidden_act": "silu"} | config | {"rope_parameters": rope})


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


def load(
    config: Any,
    weights: Weights,
    cache_dtype: torch.dtype,
    library: native.Library | None = None,
    batch_invariant: bool = False,
) -> Decoder | CpuDecoder:
    """Build the decoder, taking every weight of the checkpoint.

    With `library`, weights are quantised and its kernels run the layers, if they can. Their results
    never depend on the batch; others' do not if it is to be `batch_invariant`.
    """
    ours = _decoder_config(config, weights.device)
    if library is not None and cpu_decoder.can_run(ours, config.intermediate_size):
        with _one_thread() if weights.has_groups else nullcontext():
            return _load_quantized(config, ours, weights, cache_dtype, library)
    embed_name, head_name = "model.embed_tokens.weight", "lm_head.weight"
    tied = bool(config.tie_word_embeddings)
    wide = head_dtype(weights.dtype, weights.device)
    table = (ours.vocab_size, ours.hidden_size)
    embedding = weights.take(embed_name, table, wide if tied else None)
    if tied:
        weights.maybe(head_name, table)  # some checkpoints store the tied tensor twice
    head_weight = embedding if tied else weights.take(head_name, table, wide)
    head = Head(head_weight, tied=tied, batch_invariant=batch_invariant)
    layers = _layers(config, ours, weights, None, batch_invariant)
    norm = weights.take("model.norm.weight", (ours.hidden_size,))
    weights.check_all_used()
    return Decoder(ours, embedding, layers, norm, head, batch_invariant)


def _load_quantized(
    config: Any,
    ours: DecoderConfig,
    weights: Weights,
    cache_dtype: torch.dtype,
    library: native.Library,
) -> CpuDecoder:
    table = (ours.vocab_size, ours.hidden_size)
    embed_name, head_name = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_word_embeddings:
        weights.maybe(head_name, table)
        embedding, head_name = None, embed_name
    else:
        embedding = weights.take(embed_name, table, torch.bfloat16)
    head = QuantizedLinear(library, weights.groups(head_name, table))
    layers = _layers(config, ours, weights, library)
    norm = weights.take("model.norm.weight", (ours.hidden_size,))
    weights.check_all_used()
    return CpuDecoder(library, ours, layers, norm, head, embedding, cache_dtype)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Bringing codes into another order is a thousand short steps, in which threads would mostly
    wait for one another: for seconds, if others want the cores too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _decoder_config(config: Any, device: str) -> DecoderConfig:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    inv_freq, rope_scale = _angles(config, head_dim)
    windows = [
        config.sliding_window if kind == "sliding_attention" else None
        for kind in _layer_types(config)
    ]
    return DecoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        norm_eps=config.rms_norm_eps,
        context_len=config.max_position_embeddings,
        windows=tuple(windows),
        inv_freq=inv_freq.to(device=device, dtype=torch.float32),
        rope_scale=rope_scale,
    )


def _angles(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """The angle that each pair turns per position, and the factor on the rotated vectors."""
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    return inv_freq, float(scale)


def _layer_types(config: Any) -> list[str]:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return list(types)
    slides = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers


def _layers(
    config: Any,
    ours: DecoderConfig,
    weights: Weights,
    library: native.Library | None,
    batch_invariant: bool = False,
) -> list[DecoderLayer]:
    inner = config.intermediate_size
    return [
        _layer(weights, f"model.layers.{index}.", ours, inner, library, batch_invariant)
        for index in range(config.num_hidden_layers)
    ]


def _layer(
    weights: Weights,
    prefix: str,
    config: DecoderConfig,
    inner: int,
    library: native.Library | None,
    batch_invariant: bool,
) -> DecoderLayer:
    """One layer's weights; `inner` is the width of its feed-forward."""
    width, head_dim = config.hidden_size, config.head_dim
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim

    def product(columns: int, parts: dict[str, int], turned: Sequence[str] = ()) -> Product:
        """One linear of several of the checkpoint's; the rows of those `turned` are paired."""
        orders = {
            part: paired(torch.arange(rows), head_dim)
            for part, rows in parts.items()
            if part in turned
        }

        def tensors(suffix: str, *shape: int) -> Tensor:
            each = []
            for part, rows in parts.items():
                tensor = weights.take(f"{prefix}{part}_proj.{suffix}", (rows, *shape))
                each.append(tensor[orders[part]] if part in orders else tensor)
            return torch.cat(each)

        has_bias = f"{prefix}{next(iter(parts))}_proj.bias" in weights
        bias = tensors("bias") if has_bias else None
        if library is None:
            return Linear(tensors("weight", columns), bias, batch_invariant=batch_invariant)
        groups = []
        for part, rows in parts.items():
            one = weights.groups(f"{prefix}{part}_proj.weight", (rows, columns))
            groups.append(one.reordered(orders[part]) if part in orders else one)
        return QuantizedLinear(library, stacked(groups), bias)

    def head_norm(name: str) -> Tensor | None:
        norm = weights.maybe(f"{prefix}self_attn.{name}.weight", (head_dim,))
        return None if norm is None else paired(norm, head_dim)

    return DecoderLayer(
        attention_norm=weights.take(f"{prefix}input_layernorm.weight", (width,)),
        qkv=product(
            width,
            {"self_attn.q": q, "self_attn.k": kv, "self_attn.v": kv},
            # Queries and keys are turned by position, values are not.
            turned=("self_attn.q", "self_attn.k"),
        ),
        out=product(q, {"self_attn.o": width}),
        mlp_norm=weights.take(f"{prefix}post_attention_layernorm.weight", (width,)),
        gate_up=product(width, {"mlp.gate": inner, "mlp.up": inner}),
        down=product(inner, {"mlp.down": width}),
        query_norm=head_norm("q_norm"),
        key_norm=head_norm("k_norm"),
    )
