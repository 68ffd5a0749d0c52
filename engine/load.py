"""From a configuration to an engine that runs."""

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from engine import machine
from engine.config import EngineConfig, shown_size
from engine.core import EngineCore
from engine.errors import EngineError, ModelUnavailable
from engine.machine import processors
from engine.memory import keep_freed_memory
from engine.models.base import Model
from engine.models.load import choose_dtype, load_config, load_model, memory_needed
from engine.models.manifest import Manifest
from engine.params import SamplingParams
from engine.prepare import ModelInfo
from engine.runner import choose_device, count_blocks, free_memory
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

# Suffixes and names of what is read of a folder, which may hold anything besides.
_READ = (".json", ".safetensors", ".bin", ".model", ".jinja", "merges.txt", "vocab.txt")

_TOKENIZER_BYTES = 40  # that reading a tokenizer.json takes for each of its own

log = logging.getLogger(__name__)


def load_engine(
    config: EngineConfig, folder: Path, amateur: tuple[str, Path] | None = None
) -> tuple[EngineCore, ModelInfo]:
    """Load a model's folder and put an engine around it. Raises ModelUnavailable.

    `amateur` is the name and folder of a smaller model for contrastive decoding.
    """
    folders = [folder] if amateur is None else [folder, amateur[1]]
    before = _stamps(folders)
    device = choose_device(config.device)
    try:
        loaded = _load_engine(config, folder, amateur, device)
    except EngineError:
        raise
    except Exception as error:  # of any kind: the folder's numbers may be any
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if isinstance(error, MemoryError) or "allocate" in reason or "out of memory" in reason:
            room = free_memory(device)
            reason += f"; {room.bound} leaves {shown_size(room.free)}"
        log.debug("while loading", exc_info=error)
        raise ModelUnavailable(f"{folder} cannot be loaded ({reason})") from error
    after = _stamps(folders)
    for file, stamp in before.items():
        if after.get(file) != stamp:
            raise ModelUnavailable(f"{file} changed while it was read")
    return loaded


def _stamps(folders: list[Path]) -> dict[Path, tuple[int, ...]]:
    """What changes with the content of the files that models are read from."""
    stamps: dict[Path, tuple[int, ...]] = {}
    for file in [file for folder in folders for file in folder.iterdir()]:
        if file.suffix in _READ or file.name in _READ:
            with suppress(OSError):  # a broken link, which whoever needs it will name
                stat = file.stat()
                stamps[file] = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return stamps


def _load_engine(
    config: EngineConfig, folder: Path, amateur: tuple[str, Path] | None, device: str
) -> tuple[EngineCore, ModelInfo]:
    started = time.monotonic()
    keep_freed_memory()
    # What torch would take may already be fewer, by a variable or by the cores' own number.
    torch.set_num_threads(config.threads or min(processors(), torch.get_num_threads()))
    hf_config = load_config(folder)
    dtype = choose_dtype(config.dtype, hf_config, device)
    tokenizer = _load_tokenizer(folder)
    model = _load_model(config, folder, hf_config, dtype, device)
    models = [model]
    if amateur is not None:
        models.append(_load_amateur(config, amateur, tokenizer, dtype, device))
        if models[1].vocab_size < min(model.vocab_size, tokenizer.size):
            raise ModelUnavailable(
                f"--amateur-model {amateur[0]} has logits for {models[1].vocab_size} tokens, and "
                f"the model for {model.vocab_size}"
            )
    context_len = config.max_model_len or model.context_len
    if context_len > model.context_len:
        raise ModelUnavailable(
            f"--max-model-len {context_len} is beyond the model's own {model.context_len}"
        )
    cache = count_blocks(models, config, device)
    context_len = min(context_len, cache.num_blocks * config.block_size)
    core = EngineCore(
        model,
        tokenizer,
        config,
        num_blocks=cache.num_blocks,
        context_len=context_len,
        device=device,
        amateur=models[1] if amateur is not None else None,
    )
    generation = _generation_config(folder)
    info = ModelInfo(
        vocab_size=core.vocab_size,
        context_len=context_len,
        num_lanes=config.max_num_seqs,
        num_blocks=cache.num_blocks,
        block_size=config.block_size,
        eos_token_ids=frozenset(
            token_id
            for token_id in _eos_token_ids(hf_config, generation, tokenizer)
            if token_id < core.vocab_size  # one without a row of logits is never generated
        ),
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
        sampling_defaults=_sampling_defaults(folder, generation),
    )
    log.info(
        "loaded %s (%s, %s on %s): %d tokens of context, %d of cache (%s), in %.1f s",
        folder.name,
        info.model_type,
        info.dtype,
        device,
        context_len,
        cache.num_blocks * config.block_size,
        cache.bound,
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
    if _load_tokenizer(folder).vocabulary != tokenizer.vocabulary:
        raise ModelUnavailable(
            f"--amateur-model {name} has another vocabulary than the model it is to be compared "
            "with"
        )
    return _load_model(config, folder, load_config(folder), dtype, device)


def _load_tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    size = file.stat().st_size if file.exists() else 0
    machine.free_memory().require(_TOKENIZER_BYTES * size, f"reading {file}")
    return Tokenizer(folder)


def _load_model(
    config: EngineConfig, folder: Path, hf_config: Any, dtype: torch.dtype, device: str
) -> Model:
    needed = memory_needed(folder, hf_config, dtype, device, config.quantize)
    free_memory(device).require(needed, f"loading {folder.name}")
    return load_model(
        folder,
        hf_config,
        dtype,
        device,
        quantize=config.quantize,
        batch_invariant=config.batch_invariant,
    )


def _identity(folder: Path, dtype: torch.dtype, device: str) -> str:
    """Names the weights, by their files' sizes and times unless by content, and what computes."""
    machine = torch.backends.cpu.get_cpu_capability() if device == "cpu" else device
    try:
        weights = str(Manifest.read(folder).files)
    except ModelUnavailable:
        files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
        weights = str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    return f"{weights}|{dtype}|{machine}|{torch.__version__}"


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if not isinstance(content, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnavailable(f"{file} cannot be read: {error}") from error
    return content


def _sampling_defaults(folder: Path, generation: dict[str, Any]) -> dict[str, Any]:
    """What the model's authors recommend; numbers meant for beam search or greedy are left out."""
    defaults = {name: generation[name] for name in _SAMPLING if generation.get(name) is not None}
    for name, value in list(defaults.items()):
        try:
            SamplingParams.model_validate({name: value})
        except ValidationError as error:
            log.warning(
                "%s: %s is left out: %s, got %r",
                folder / "generation_config.json",
                name,
                error.errors()[0]["msg"],
                value,
            )
            del defaults[name]
    return defaults


def _eos_token_ids(config: Any, generation: dict[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    ids: set[int] = set()
    text = config.get_text_config(decoder=True)
    for ends in (generation.get("eos_token_id"), text.eos_token_id, tokenizer.eos_id):
        some = ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]
        if not all(type(end) is int for end in some):
            raise ModelUnavailable(f"eos_token_id must be ids of tokens, got {ends!r}")
        ids |= set(some)
    return frozenset(ids)
