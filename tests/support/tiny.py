"""Tiny random models of many families, saved as Hugging Face folders."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 128

# With the usual 0.02 the logits are nearly flat, and parity tests fail by rounding.
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2, "intermediate_size": 96}

LLAMA_SHAPED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "llama-tied": ("Llama", _GROUPED | {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear-rope": (
        "Llama",
        _GROUPED | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "llama-dynamic-rope": (
        "Llama",
        _GROUPED | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama3-rope": (
        "Llama",
        _GROUPED
        | {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-yarn": (
        "Llama",
        _GROUPED
        | {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("Mistral", _GROUPED | {"sliding_window": None}),
    "mistral-sliding": ("Mistral", _GROUPED | {"sliding_window": 7}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen2-sliding": (
        "Qwen2",
        _GROUPED | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", _GROUPED | {"head_dim": 32}),
}

GENERIC: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gelu": ("Llama", _GROUPED | {"hidden_act": "gelu"}),
    "mixtral": (
        "Mixtral",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "gemma2": (
        "Gemma2",
        _GROUPED | {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        "Gemma3",
        _GROUPED | {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16},
    ),
    "phi": ("Phi", _COMMON | {"intermediate_size": 96}),
    "phi3": ("Phi3", _GROUPED | {"sliding_window": None}),
    "phi3-sliding": ("Phi3", _GROUPED | {"sliding_window": 7}),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gptj": (
        "GPTJ",
        {
            "vocab_size": VOCAB,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "rotary_dim": 8,
            "initializer_range": 0.5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt-neox": ("GPTNeoX", _COMMON | {"intermediate_size": 96}),
    "opt": (
        "OPT",
        _COMMON
        | {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.5, "do_layer_norm_before": True},
    ),
    "opt-projected": (
        "OPT",
        _COMMON
        | {
            "ffn_dim": 96,
            "word_embed_proj_dim": 32,
            "init_std": 0.5,
            "do_layer_norm_before": False,
        },
    ),
    "olmo2": ("Olmo2", _GROUPED),
    "stablelm": ("StableLm", _GROUPED),
    "starcoder2": ("Starcoder2", _GROUPED | {"sliding_window": 7}),
    "cohere": ("Cohere", _GROUPED | {"logit_scale": 0.5}),
    "granite": ("Granite", _GROUPED | {"logits_scaling": 4.0}),
    # Keys and values of different widths.
    "deepseek-v3": (
        "DeepseekV3",
        _COMMON
        | {
            "intermediate_size": 96,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
}

# Served by nobody here; each with a pattern of the reason that the error names.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon": ("Falcon", _COMMON, "not through transformers' attention interface"),
    "bloom": (
        "Bloom",
        {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        "not through transformers' attention interface",
    ),
    # Which of the two it is called depends on the version of `transformers`.
    "mamba": (
        "Mamba",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4},
        "keeps a state|layers that are not served: linear_attention",
    ),
    "rwkv": (
        "Rwkv",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "attention_hidden_size": 64,
        },
        "keeps a state",
    ),
    "lfm2": (
        "Lfm2",
        _GROUPED | {"layer_types": ["conv", "full_attention"]},
        "layers that are not served: conv",
    ),
    "gpt-oss": (
        "GptOss",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        "computes attention with s_aux",
    ),
    "bert": ("Bert", _GROUPED, "other logits with paged attention"),  # sees what comes after
    "t5": (
        "T5",
        {"vocab_size": VOCAB, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 96},
        "encoder-decoder",
    ),
}

FAMILIES = LLAMA_SHAPED | GENERIC


def hf_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random Hugging Face model of a family, float32; `changes` are to its config."""
    name, values = (FAMILIES | {name: row[:2] for name, row in REFUSED.items()})[family]
    config_name = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**values | changes)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
    torch.manual_seed(seed)
    return kinds[config.is_encoder_decoder].from_config(config).float().eval()


def save(model: Any, folder: Path) -> Path:
    """Save a model with the tiny tokenizer, as a folder to be served."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """The Hugging Face model of a folder, float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return model.eval()


def tokenizer() -> Any:
    """A byte-level tokenizer of 128 tokens: 3 special ones and the first 125 bytes.

    Its chat template puts each message on a line of its own.
    """
    alphabet = [
        *range(0x20, 0x7F),
        0x0A,
        0x09,
        0xC3,
        0xA9,
        0xF0,
        0x9F,
        0x98,
        0x80,
        0xE2,
        0x82,
        0xAC,
    ]
    symbols = {byte: character for character, byte in _byte_characters().items()}
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for byte in alphabet:
        vocab[symbols[byte]] = len(vocab)
    for pair in ("th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or"):
        vocab[pair] = len(vocab)
    merges = [(pair[0], pair[1]) for pair in vocab if len(pair) == 2 and pair.isalpha()]
    while len(vocab) < VOCAB:
        vocab[f"<unused{len(vocab)}>"] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    wrapped.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return wrapped


def _byte_characters() -> dict[str, int]:
    from engine.tokenizer import _byte_alphabet

    return _byte_alphabet()
