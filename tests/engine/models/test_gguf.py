"""GGUF files as Hugging Face folders: weights, configs, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file

from engine.errors import ModelUnavailable
from engine.models import gguf as conversion
from engine.models.load import load_config
from engine.models.weights import Weights
from tests.engine.models import gguf_files
from tests.engine.models.gguf_files import Kind, converted
from tests.support.engines import tiny_core
from tests.support.packed import packed_logits

PROMPTS = [[5, 9, 33, 12, 77, 8, 61, 90, 14, 3, 27], [64, 7]]
LAYER = "blk.0"
# The parts of a quantised block that hold its 16-bit scales, in bytes.
K_SCALES = {
    Kind.Q2_K: (80, 84),
    Kind.Q3_K: (108, 110),
    Kind.Q4_K: (0, 4),
    Kind.Q5_K: (0, 4),
    Kind.Q6_K: (208, 210),
}
KINDS = [
    *(Kind.F32, Kind.F16, Kind.BF16),
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *K_SCALES,
]


def quantised(weight: NDArray[np.float32], kind: Any) -> NDArray[Any]:
    """A weight in blocks of a kind; for K-quants, which nothing here writes, random blocks."""
    if kind not in K_SCALES:
        blocks: NDArray[Any] = gguf.quantize(weight, kind)
        return blocks
    values, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (len(weight), weight.shape[1] // values, size)
    random = np.random.default_rng(weight.size)
    blocks = random.integers(0, 256, shape, dtype=np.uint8)
    low, high = K_SCALES[kind]
    scales = random.uniform(0.01, 0.1, (*shape[:2], (high - low) // 2)).astype(np.float16)
    blocks[..., low:high] = scales.view(np.uint8)
    return blocks.reshape(len(weight), -1)


def hf_model(architecture: str, **more: Any) -> Any:
    """A random model, norms and biases included."""
    torch.manual_seed(0)
    config = gguf_files.CONFIGS[architecture](**more)
    hf = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in hf.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return hf


def write(path: Path, architecture: str, hf: Any, **more: Any) -> Path:
    metadata = gguf_files.metadata_of(architecture, hf.config) | gguf_files.tokenizer_metadata()
    return gguf_files.write(
        path, architecture, metadata | more, gguf_files.tensors_of(architecture, hf)
    )


def converted_config(path: Path, tmp_path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(
        (converted(path, tmp_path / "cache") / "config.json").read_text()
    )
    return config


# -- weights


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_kind_of_block_becomes_the_numbers_that_the_format_defines(
    kind: Any, tmp_path: Path
) -> None:
    hf = hf_model("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    config = hf.config
    tensors: dict[str, NDArray[Any]] = {}
    kinds = {}
    for name, weight in gguf_files.tensors_of("llama", hf).items():
        tensors[name] = weight if weight.ndim == 1 else quantised(weight, kind)
        kinds[name] = Kind.F32 if weight.ndim == 1 else kind
    metadata = gguf_files.metadata_of("llama", config) | gguf_files.tokenizer_metadata()
    path = gguf_files.write(tmp_path / "m.gguf", "llama", metadata, tensors, kinds)
    folder = converted(path, tmp_path / "cache")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    got = {name: load_file(folder / file)[name] for name, file in index.items()}
    want = {name: gguf.dequantize(values, kinds[name]) for name, values in tensors.items()}
    assert len(got) == len(want)
    assert all(values.dtype == np.float32 for values in got.values())
    attention = "model.layers.0.self_attn"
    for projection, ours, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        # Permuting what came out must give what the file holds.
        back = gguf_files.permuted(got[f"{attention}.{ours}.weight"], heads)
        assert np.array_equal(back, want[f"{LAYER}.{projection}.weight"])
    for name, ours in (
        ("token_embd", "model.embed_tokens"),
        ("output", "lm_head"),
        ("output_norm", "model.norm"),
        (f"{LAYER}.attn_v", f"{attention}.v_proj"),
        (f"{LAYER}.attn_output", f"{attention}.o_proj"),
        (f"{LAYER}.attn_norm", "model.layers.0.input_layernorm"),
        (f"{LAYER}.ffn_norm", "model.layers.0.post_attention_layernorm"),
        (f"{LAYER}.ffn_gate", "model.layers.0.mlp.gate_proj"),
        (f"{LAYER}.ffn_up", "model.layers.0.mlp.up_proj"),
        (f"{LAYER}.ffn_down", "model.layers.0.mlp.down_proj"),
    ):
        assert np.array_equal(got[f"{ours}.weight"], want[f"{name}.weight"]), name


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("gemma3", {}),
    ],
    ids=str,
)
@torch.inference_mode()
def test_a_model_that_went_through_a_file_gives_the_same_logits(
    architecture: str, more: dict[str, Any], tmp_path: Path
) -> None:
    hf = hf_model(architecture, **more)
    folder = converted(write(tmp_path / "m.gguf", architecture, hf), tmp_path / "cache")
    core, info = tiny_core(folder)
    assert info.model_type == hf.config.model_type
    for ids, logits in zip(PROMPTS, packed_logits(core.model, PROMPTS), strict=True):
        want = hf(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits, want, rtol=0, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q4_1, 4), (Kind.Q8_0, 8), (Kind.Q5_1, 8)], ids=str
)
def test_codes_in_groups_are_kept_beside_the_numbers_they_stand_for(
    kind: Any, bits: int, tmp_path: Path
) -> None:
    hf = hf_model("llama", hidden_size=128, num_hidden_layers=1)
    tensors: dict[str, NDArray[Any]] = {}
    kinds = {}
    for name, weight in gguf_files.tensors_of("llama", hf).items():
        tensors[name] = weight if weight.ndim == 1 else quantised(weight, kind)
        kinds[name] = Kind.F32 if weight.ndim == 1 else kind
    metadata = gguf_files.metadata_of("llama", hf.config) | gguf_files.tokenizer_metadata()
    path = gguf_files.write(tmp_path / "m.gguf", "llama", metadata, tensors, kinds)
    folder = converted(path, tmp_path / "cache")
    grouped, plain = (Weights(folder, torch.float32, "cpu") for _ in range(2))
    for name, rows in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64), ("o_proj", 128)):
        name, shape = f"model.layers.0.self_attn.{name}.weight", (rows, 128)
        groups, want = grouped.groups(name, shape), plain.take(name, shape)
        assert groups.bits == bits
        # What has no such codes in the file is rounded to 8 bits.
        step = 1 / 127 if kind is Kind.Q5_1 else 1e-6
        torch.testing.assert_close(groups.floats(), want, rtol=0, atol=step * float(want.max()))
        assert name not in grouped


def test_large_weights_are_spread_over_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_SHARD_BYTES", 40_000)
    hf = hf_model("llama")
    folder = converted(write(tmp_path / "m.gguf", "llama", hf), tmp_path / "cache")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    core, _ = tiny_core(folder)
    with torch.inference_mode():
        want = hf(torch.tensor(PROMPTS[:1])).logits[0]
    got = packed_logits(core.model, PROMPTS[:1])[0]
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


# -- the config


def test_the_config_holds_the_numbers_of_the_metadata(tmp_path: Path) -> None:
    hf = hf_model("qwen3", rope_theta=500_000.0)
    more = {"tokenizer.ggml.eot_token_id": 7}
    path = write(tmp_path / "m.gguf", "qwen3", hf, **more)
    folder = converted(path, tmp_path / "cache")
    config = load_config(folder)
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
        *("tie_word_embeddings", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id"),
    ):
        assert getattr(config, name) == getattr(hf.config, name), name
    assert config.rms_norm_eps == pytest.approx(hf.config.rms_norm_eps)
    assert config.rope_parameters["rope_theta"] == 500_000.0
    # Either of the two ends a text.
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 7]}


def test_a_file_without_an_output_matrix_ties_it_to_the_embedding(tmp_path: Path) -> None:
    tied = write(tmp_path / "a.gguf", "llama", hf_model("llama", tie_word_embeddings=True))
    assert converted_config(tied, tmp_path)["tie_word_embeddings"] is True
    assert (
        converted_config(gguf_files.write_llama(tmp_path / "b.gguf"), tmp_path)[
            "tie_word_embeddings"
        ]
        is False
    )


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_named_rope_scalings_are_taken_over(kind: str, tmp_path: Path) -> None:
    scaling = {"type": kind, "factor": 4.0, "original_context_length": 64}
    more = {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
    path = gguf_files.write_llama(tmp_path / "m.gguf", **more)
    config = load_config(converted(path, tmp_path / "cache"))
    assert config.rope_parameters["rope_type"] == kind
    assert config.rope_parameters["factor"] == 4.0
    assert config.rope_parameters["original_max_position_embeddings"] == 64


def test_gemma_scales_the_angles_of_its_global_layers_only(tmp_path: Path) -> None:
    hf = hf_model("gemma3", rope_theta=1e6)
    more = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    path = write(tmp_path / "m.gguf", "gemma3", hf, **more)
    ropes = load_config(converted(path, tmp_path / "cache")).rope_parameters
    assert (ropes["full_attention"]["rope_type"], ropes["full_attention"]["factor"]) == (
        "linear",
        8.0,
    )
    assert ropes["full_attention"]["rope_theta"] == 1e6
    assert ropes["sliding_attention"]["rope_type"] == "default"
    assert ropes["sliding_attention"]["rope_theta"] == 10_000.0


def llama3_divisors(factor: float, theta: float, head_dim: int) -> NDArray[np.float32]:
    """Published with Llama 3.1: long waves are slowed down, short ones left, between is smooth."""
    divisors = []
    for pair in range(head_dim // 2):
        wave = 2 * np.pi * theta ** (2 * pair / head_dim)
        if wave < 8192 / 4:
            divisors.append(1.0)
        elif wave > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def write_with_divisors(path: Path, divisors: NDArray[np.float32]) -> Path:
    hf = hf_model("llama", num_attention_heads=2, num_key_value_heads=1, rope_theta=500_000.0)
    metadata = gguf_files.metadata_of("llama", hf.config) | gguf_files.tokenizer_metadata()
    tensors = gguf_files.tensors_of("llama", hf) | {"rope_freqs.weight": divisors}
    return gguf_files.write(path, "llama", metadata, tensors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_divisors_of_the_angles_are_recognised_as_llama_3s(factor: float, tmp_path: Path) -> None:
    divisors = llama3_divisors(factor, 500_000.0, 32)
    folder = converted(write_with_divisors(tmp_path / "m.gguf", divisors), tmp_path / "cache")
    core, _ = tiny_core(folder)
    plain = 500_000.0 ** -(np.arange(0, 32, 2) / 32)
    assert torch.allclose(
        core.model.config.inv_freq, torch.tensor(plain / divisors, dtype=torch.float32), rtol=1e-5
    )


# -- what is refused


def refusal(path: Path, tmp_path: Path) -> str:
    cache = tmp_path / "cache"
    with pytest.raises(ModelUnavailable) as caught:
        converted(path, cache)
    assert not [path for path in cache.rglob("*") if path.is_file()]  # nothing half done is left
    message = str(caught.value)
    assert "\n" not in message
    return message


def lacking(name: str) -> Callable[[Path], Path]:
    def write_file(path: Path) -> Path:
        hf = hf_model("llama")
        metadata = gguf_files.metadata_of("llama", hf.config) | gguf_files.tokenizer_metadata()
        del metadata[name]
        return gguf_files.write(path, "llama", metadata, gguf_files.tensors_of("llama", hf))

    return write_file


def renamed(old: str, new: str) -> Callable[[Path], Path]:
    def write_file(path: Path) -> Path:
        hf = hf_model("llama")
        metadata = gguf_files.metadata_of("llama", hf.config) | gguf_files.tokenizer_metadata()
        tensors = gguf_files.tensors_of("llama", hf)
        tensors[new] = tensors.pop(old)
        return gguf_files.write(path, "llama", metadata, tensors)

    return write_file


def with_kind(kind: Any) -> Callable[[Path], Path]:
    def write_file(path: Path) -> Path:
        hf = hf_model("llama")
        metadata = gguf_files.metadata_of("llama", hf.config) | gguf_files.tokenizer_metadata()
        tensors = gguf_files.tensors_of("llama", hf)
        return gguf_files.write(path, "llama", metadata, tensors, dict.fromkeys(tensors, kind))

    return write_file


def with_metadata(**more: Any) -> Callable[[Path], Path]:
    return lambda path: gguf_files.write_llama(path, **more)


def cut(fraction: float) -> Callable[[Path], Path]:
    def write_file(path: Path) -> Path:
        content = gguf_files.write_llama(path).read_bytes()
        path.write_bytes(content[: int(len(content) * fraction)])
        return path

    return write_file


def unknown_architecture(path: Path) -> Path:
    return gguf_files.write(path, "falcon", {"falcon.block_count": 1}, {})


def nonsense(path: Path) -> Path:
    path.write_bytes(b"this is no model at all, whatever its name says" * 10)
    return path


@pytest.mark.parametrize(
    ("write_file", "reason"),
    [
        (unknown_architecture, "m.gguf holds a falcon model; of GGUF files, only llama, qwen2"),
        (nonsense, "m.gguf is not a readable GGUF file"),
        (lambda path: (path.touch(), path)[1], "m.gguf is not a readable GGUF file"),
        (cut(0.001), "m.gguf is not a readable GGUF file"),
        (cut(0.05), "m.gguf is not a readable GGUF file"),
        (cut(0.5), "m.gguf is not a readable GGUF file"),
        (cut(0.999), "m.gguf is not a readable GGUF file"),
        (lacking("llama.block_count"), "m.gguf lacks 'llama.block_count'"),
        (
            lacking("tokenizer.ggml.tokens"),
            "m.gguf lacks 'tokenizer.ggml.tokens'",
        ),
        (with_kind(Kind.I32), "tensors of type I32 are not read"),
        (
            renamed("blk.0.ffn_up.weight", "blk.0.ffn_up_exps.weight"),
            "a tensor 'blk.0.ffn_up_exps.weight' that has no place",
        ),
        (renamed("token_embd.weight", "embd.weight"), "m.gguf lacks 'token_embd.weight'"),
        (
            with_metadata(**{"tokenizer.ggml.pre": "poet"}),
            "splits text in an unknown way: 'poet'",
        ),
        (with_metadata(**{"tokenizer.ggml.model": "rwkv"}), "tokenizers of kind 'rwkv'"),
        (with_metadata(**{"llama.rope.scaling.type": "longrope"}), "rope scaling of type longrope"),
        (with_metadata(**{"llama.rope.dimension_count": 8}), "over part of a head"),
        (
            lambda path: write_with_divisors(path, np.full(16, 3.0, dtype=np.float32)),
            "scales rotary angles in an unknown way",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_served_says_why_in_a_line(
    write_file: Callable[[Path], Path], reason: str, tmp_path: Path
) -> None:
    assert reason in refusal(write_file(tmp_path / "m.gguf"), tmp_path)
