"""A Hugging Face folder as a model that runs."""

from pathlib import Path
from typing import Any

import torch

from engine.errors import ModelUnavailable
from engine.kernels import native
from engine.models import llama
from engine.models.base import Model
from engine.models.invariance import is_batch_invariant
from engine.models.weights import Weights, four_bit_names, num_elements, old_files

# What a config counts, of which none can be more than there are weights.
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def load_config(folder: Path) -> Any:
    """The folder's Hugging Face config. Raises ModelUnavailable."""
    if (plain := llama.read_plain(folder / "config.json")) is not None:
        return plain
    from transformers import AutoConfig  # only now: it takes a second

    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelUnavailable(f"no usable config.json in {folder}: {reason}") from error


def choose_dtype(name: str, config: Any, device: str) -> torch.dtype:
    """The type to run in. "auto": the checkpoint's on CUDA; on CPU bfloat16 where the processor
    multiplies it (AMX, AVX512-BF16), else float32.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device == "cpu":
        cpu: Any = torch.cpu
        native = cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return getattr(config, "dtype", None) or torch.bfloat16


def memory_needed(
    folder: Path, config: Any, dtype: torch.dtype, device: str, quantize: bool
) -> int:
    """About how many bytes a model takes while `load_model` loads it, by the sizes of its tensors.

    Raises ModelUnavailable if they cannot be read, or are not those of any such config.
    """
    sizes = num_elements(folder)
    if not old_files(folder):
        _check_numbers(config, sizes)
    largest = max(sizes.values(), default=0)
    if _library(dtype, device, quantize) is None or not llama.fits(config):
        # What is read is converted; on the CPU, logits are computed in float32 (see `Head`).
        head = 4 * largest if device == "cpu" and dtype.itemsize < 4 else 0
        return sum(sizes.values()) * dtype.itemsize + head + 4 * largest
    # A panel has a byte a weight, or half, and two scales of 32 or 16 bits for 32 of them.
    halved = four_bit_names(folder)
    total = sum(size * (5 if name in halved else 9) // 8 for name, size in sizes.items())
    return total + largest * (2 if halved else 8)  # unpacked codes, or floats that are rounded


def _check_numbers(config: Any, sizes: dict[str, int]) -> None:
    """Refuse numbers that no such weights can have, before anything is made by them."""
    total = sum(sizes.values())
    for name in _COUNTS:
        value = getattr(config.get_text_config(decoder=True), name, None)
        if isinstance(value, int) and value > total:
            raise ModelUnavailable(f"config.json has {name} {value}, and there are {total} weights")


@torch.inference_mode()
def load_model(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    device: str,
    *,
    quantize: bool = False,
    batch_invariant: bool = False,
) -> Model:
    """Load weights and everything else that runs. Raises ModelUnavailable with the reason.

    With `quantize`, a Llama-shaped decoder on a CPU with our kernels multiplies by weights of 8
    bits, or of 4 where the checkpoint has them; `dtype` is then the cache's alone. With
    `batch_invariant` a token has the same bits in every batch, or the model is refused.
    """
    library = _library(dtype, device, quantize)
    if llama.fits(config):
        between = dtype if library is None else torch.float32
        weights = Weights(folder, between, device)
        model: Model = llama.load(config, weights, dtype, library, batch_invariant)
    else:
        from engine.models.transformers import TransformersModel

        model = TransformersModel(folder, config, dtype, device, batch_invariant)
    if batch_invariant and not is_batch_invariant(model, device):
        raise ModelUnavailable(
            f"--batch-invariant: {config.model_type} computes a token differently among others, "
            "so it cannot be served with it"
        )
    return model


def _library(dtype: torch.dtype, device: str, quantize: bool) -> native.Library | None:
    """The kernels for quantised weights, if they are wanted and there are any."""
    kernels_can = device == "cpu" and dtype in (torch.float32, torch.bfloat16)
    return native.LIBRARY if quantize and kernels_can else None
