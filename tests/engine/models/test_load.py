"""What type a model runs in, where nobody says, and which code runs it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from engine.models.llama import PlainConfig, fits, read_plain
from engine.models.load import choose_dtype, load_config
from tests.support import tiny

_SERVE = """
import sys
from pathlib import Path
import server.run
from engine.config import EngineConfig
from engine.load import load_engine
from engine.params import SamplingParams
from engine.prepare import Output, prepare

settings = {"kv_cache_memory": 1 << 22}
core, info = load_engine(EngineConfig.model_validate(settings), Path(sys.argv[1]))
ids = core.tokenizer.encode("in the end")
core.submit(
    prepare(ids, SamplingParams(max_tokens=3), Output(), info, core.tokenizer, request_id="r")
)
while core.has_work:
    core.step()
print(*sys.modules)
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_type_is_taken(name: str, device: str) -> None:
    assert choose_dtype(name, SimpleNamespace(dtype=None), device) == getattr(torch, name)


@pytest.mark.parametrize(
    ("amx", "avx512", "dtype"),
    [
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ],
)
def test_on_cpu_the_processor_decides(
    amx: bool, avx512: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert choose_dtype("auto", SimpleNamespace(dtype=torch.float16), "cpu") == dtype


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (SimpleNamespace(dtype=torch.float16), torch.float16),
        (SimpleNamespace(dtype=None), torch.bfloat16),
        (SimpleNamespace(), torch.bfloat16),
    ],
)
def test_on_cuda_the_checkpoint_decides(config: Any, dtype: torch.dtype) -> None:
    assert choose_dtype("auto", config, "cuda:0") == dtype


def test_a_llama_is_served_without_transformers(tmp_path: Path) -> None:
    """Importing it takes as long as everything else that happens at the start."""
    tiny.save(tiny.hf_model("llama"), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _SERVE, str(tmp_path)], check=True, stdout=subprocess.PIPE, text=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert {"torch", "fastapi", "tokenizers"} <= loaded
    assert "transformers" not in loaded


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-biased"])
def test_a_plain_config_says_what_transformers_reads_in_it(family: str, tmp_path: Path) -> None:
    tiny.save(tiny.hf_model(family), tmp_path)
    config, want = load_config(tmp_path), transformers.AutoConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, PlainConfig)
    assert fits(config)
    for name in (
        *("model_type", "hidden_act", "vocab_size", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    ):
        assert getattr(config, name) == getattr(want, name), name
    text, want = config.get_text_config(decoder=True), want.get_text_config(decoder=True)
    assert (text.eos_token_id, text.tie_word_embeddings) == (
        want.eos_token_id,
        want.tie_word_embeddings,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"hidden_act": "gelu"},
        {"head_dim": None},
        {"num_key_value_heads": None},
        {"rms_norm_eps": 1},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "yarn"}},
    ],
    ids=str,
)
def test_a_config_that_leaves_something_open_is_left_to_transformers(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    file = tiny.save(tiny.hf_model("llama"), tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert read_plain(file) is None


def test_the_older_way_to_write_the_angle_is_read_too(tmp_path: Path) -> None:
    file = tiny.save(tiny.hf_model("llama"), tmp_path) / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    file.write_text(json.dumps(config | {"rope_theta": 5e5, "rope_scaling": None}))
    read = read_plain(file)
    assert read is not None
    assert read.rope_parameters == {"rope_theta": 5e5, "rope_type": "default"}
