"""From a folder and a configuration to an engine, and what the front end is told of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelUnavailable
from tests.support import tiny
from tests.support.engines import request, run, tiny_core


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def test_the_front_end_learns_what_the_engine_can_do(tiny_folder: Path) -> None:
    core, info = tiny_core(tiny_folder, max_num_seqs=3)
    assert (info.vocab_size, info.context_len, info.num_lanes) == (tiny.VOCAB, 256, 3)
    assert (info.block_size, info.num_blocks) == (4, 3 * 64)
    assert (info.dtype, info.device, info.model_type) == ("float32", "cpu", "llama")
    assert info.eos_token_ids == {2}
    assert info.blocks_for(9) == 3
    assert core.lanes.tokens.shape == (3, 256)
    assert len(run(core, request(core, [5, 6, 7], ignore_eos=True)).ids()) == 8


def test_the_context_is_what_is_asked_for_and_what_the_cache_holds(tiny_folder: Path) -> None:
    assert tiny_core(tiny_folder, max_model_len=100)[1].context_len == 100
    small = tiny_core(tiny_folder, kv_cache_memory=10 * 4 * 2 * 2 * 2 * 16 * 4)[1]
    assert (small.num_blocks, small.context_len) == (10, 40)
    with pytest.raises(ModelUnavailable, match="--max-model-len 257"):
        tiny_core(tiny_folder, max_model_len=257)


def test_every_end_token_counts_wherever_it_is_named(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[7, 9])
    edit(folder / "config.json", eos_token_id=11)
    assert tiny_core(folder)[1].eos_token_ids == {2, 7, 9, 11}


def test_the_authors_sampling_parameters_become_defaults(folder: Path) -> None:
    edit(
        folder / "generation_config.json",
        temperature=0.6,
        top_k=20,
        top_p=None,
        num_beams=4,
        do_sample=True,
        max_length=20,
    )
    assert tiny_core(folder)[1].sampling_defaults == {"temperature": 0.6, "top_k": 20}
    (folder / "generation_config.json").unlink()
    assert tiny_core(folder)[1].sampling_defaults == {}


def test_the_identity_changes_with_the_weights_and_their_type(folder: Path) -> None:
    first = tiny_core(folder)[1].identity
    assert tiny_core(folder)[1].identity == first
    assert tiny_core(folder, dtype="bfloat16")[1].identity != first
    tiny.save(tiny.hf_model("llama", seed=1), folder)
    assert tiny_core(folder)[1].identity != first


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def _bad_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")


@pytest.mark.parametrize("spoil", [_no_config, _no_weights, _no_tokenizer, _bad_generation_config])
def test_a_folder_with_something_missing_is_refused_in_one_line(folder: Path, spoil: Any) -> None:
    spoil(folder)
    with pytest.raises(ModelUnavailable) as raised:
        tiny_core(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
