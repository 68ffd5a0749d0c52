"""From a configuration to an engine that runs."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ModelUnavailable
from engine.memory import keep_freed_memory
from engine.models.base import Model
from engine.models.load import choose_dtype, load_config, load_model
from engine.prepare import ModelInfo
from engine.runner import choose_device, count_blocks
from engine.tokenizer import Tokenizer

_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "epsilon_cutoff",
    "eta_cutoff",
)

log = logging.getLogger(__name__)


def load_engine(
    config: EngineConfig, folder: Path, amateur: tuple[str, Path] | None = None
) -> tuple[EngineCore, ModelInfo]:
    """Load a model's folder and put an engine around it. Raises ModelUnavailable.

    `amateur` is the name and folder of a smaller model for contrastive decoding.
    """
    started = time.monotonic()
    keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    hf_config = load_config(folder)
    dtype = choose_dtype(config.dtype, hf_config, device)
    tokenizer = Tokenizer(folder)
    model = load_model(
        folder,
        hf_config,
        dtype,
        device,
        quantize=config.quantize,
        batch_invariant=config.batch_invariant,
    )
    models = [model]
    if amateur is not None:
        models.append(_load_amateur(config, amateur, tokenizer, dtype, device))
    context_len = config.max_model_len or model.context_len
    if context_len > model.context_len:
        raise ModelUnavailable(
            f"--max-model-len {context_len} is beyond the model's own {model.context_len}"
        )
    num_blocks = count_blocks(models, config, device)
    context_len = min(context_len, num_blocks * config.block_size)
    core = EngineCore(
        model,
        tokenizer,
        config,
        num_blocks=num_blocks,
        context_len=context_len,
        device=device,
        amateur=models[1] if amateur is not None else None,
    )
    generation = _generation_config(folder)
    info = ModelInfo(
        vocab_size=core.vocab_size,
        context_len=context_len,
        num_lanes=config.max_num_seqs,
        num_blocks=num_blocks,
        block_size=config.block_size,
        eos_token_ids=_eos_token_ids(hf_config, generation, tokenizer),
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        model_type=hf_config.model_type,
        identity=_identity(folder, dtype, device),
        num_layers=len(model.kv_shapes),
        batch_tokens=config.batch_tokens(device),
        tied=bool(hf_config.get_text_config(decoder=True).tie_word_embeddings),
        amateur=None if amateur is None else amateur[0],
        amateur_context_len=models[-1].context_len,
        max_beam_width=config.max_beam_width,
        has_lens=model.has_lens,
        sampling_defaults=_sampling_defaults(generation),
    )
    log.info(
        "loaded %s (%s, %s on %s): %d tokens of context, %d of cache, in %.1f s",
        folder.name,
        info.model_type,
        info.dtype,
        device,
        context_len,
        num_blocks * config.block_size,
        time.monotonic() - started,
    )
    return core, info


def _load_amateur(
    config: EngineConfig,
    amateur: tuple[str, Path],
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    device: str,
) -> Model:
    name, folder = amateur
    if Tokenizer(folder).vocabulary != tokenizer.vocabulary:
        raise ModelUnavailable(
            f"--amateur-model {name} has another vocabulary than the model it is to be compared "
            "with"
        )
    return load_model(
        folder,
        load_config(folder),
        dtype,
        device,
        quantize=config.quantize,
        batch_invariant=config.batch_invariant,
    )


def _identity(folder: Path, dtype: torch.dtype, device: str) -> str:
    """Names the weights by their files' sizes and times, and what computes with them."""
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    machine = torch.backends.cpu.get_cpu_capability() if device == "cpu" else device
    return f"{stats}|{dtype}|{machine}|{torch.__version__}"


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{file} cannot be read: {error}") from error
    return content


def _sampling_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """What the model's authors recommend; numbers meant for beam search or greedy are left out."""
    return {name: generation[name] for name in _SAMPLING if generation.get(name) is not None}


def _eos_token_ids(config: Any, generation: dict[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    ids: set[int] = set()
    text = config.get_text_config(decoder=True)
    for ends in (generation.get("eos_token_id"), text.eos_token_id, tokenizer.eos_id):
        ids |= {ends} if isinstance(ends, int) else set(ends or ())
    return frozenset(ids)
