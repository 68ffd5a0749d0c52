"""From a folder and a configuration to an engine, and what the front end is told of it."""

import json
import logging
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from engine import load as load_module
from engine import machine
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


@pytest.mark.parametrize(
    ("given", "kept", "says"),
    [
        ({"temperature": "hot", "top_k": 5}, {"top_k": 5}, "temperature is left out: .* got 'hot'"),
        ({"top_p": 7.0}, {}, "top_p is left out: .*less than or equal to 1, got 7.0"),
        ({"min_p": [0.1]}, {}, r"min_p is left out: .* got \[0.1\]"),
    ],
)
def test_a_default_that_no_request_may_have_is_left_out_with_a_line(
    folder: Path,
    given: dict[str, Any],
    kept: dict[str, Any],
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    edit(folder / "generation_config.json", **given)
    assert tiny_core(folder)[1].sampling_defaults == kept
    (record,) = caplog.records
    assert re.search(f"{folder}/generation_config.json: {says}", record.getMessage())


@pytest.mark.parametrize("ends", ["</s>", 2.0, [2, "</s>"], {"a": 1}, True])
def test_an_end_that_is_no_token_is_refused(folder: Path, ends: Any) -> None:
    edit(folder / "generation_config.json", eos_token_id=ends)
    with pytest.raises(ModelUnavailable, match="eos_token_id must be ids of tokens, got "):
        tiny_core(folder)


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def _bad_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")


def _generation_config_is_a_list(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[1]")


@pytest.mark.parametrize(
    "spoil",
    [
        *(_no_config, _no_weights, _no_tokenizer),
        *(_bad_generation_config, _generation_config_is_a_list),
    ],
)
def test_a_folder_with_something_missing_is_refused_in_one_line(folder: Path, spoil: Any) -> None:
    spoil(folder)
    with pytest.raises(ModelUnavailable) as raised:
        tiny_core(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


# -- files that were altered


def refused_in_a_line_or_served(folder: Path, capfd: pytest.CaptureFixture[str]) -> bool:
    reason = ""
    try:
        tiny_core(folder)
    except ModelUnavailable as error:
        reason = str(error)
    assert "\n" not in reason
    # Nor do libraries of other languages leave a word of theirs.
    assert not re.search("Traceback|panicked|MISMATCH|MISSING", capfd.readouterr().err)
    return not reason


FILES = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
)


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("name", FILES)
def test_files_cut_anywhere_are_refused_in_one_line(
    family: str, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tiny.save(tiny.hf_model(family), tmp_path) / name
    content = file.read_bytes()
    capfd.readouterr()
    for length in {
        0,
        1,
        2,
        7,
        8,
        9,
        *range(10, len(content), len(content) // 12),
        len(content) - 1,
    }:
        file.write_bytes(content[:length])
        # Of a JSON text the last line's end may be missing.
        assert not refused_in_a_line_or_served(tmp_path, capfd) or length == len(content) - 1


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_files_with_other_bytes_are_refused_in_one_line_or_served(
    family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = tiny.save(tiny.hf_model(family), tmp_path / "good")
    random = Random(0)
    capfd.readouterr()
    served = 0
    for _ in range(80):
        folder = Path(shutil.copytree(good, tmp_path / "bad", dirs_exist_ok=True))
        file = folder / random.choice(FILES)
        content = bytearray(file.read_bytes())
        content[random.randrange(min(len(content), 9000))] ^= 1 << random.randrange(8)
        file.write_bytes(content)
        served += refused_in_a_line_or_served(folder, capfd)
    assert 0 < served < 80


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "hidden_size"),
        ("llama", "head_dim"),
        ("llama", "num_hidden_layers"),
        ("qwen3", "head_dim"),
        ("phi", "vocab_size"),
    ],
)
def test_numbers_that_nothing_can_hold_are_refused_before_they_are_used(
    family: str, name: str, tmp_path: Path
) -> None:
    folder = tiny.save(tiny.hf_model(family), tmp_path)
    edit(folder / "config.json", **{name: 10**9})
    with pytest.raises(ModelUnavailable, match=f"config.json has {name} 1000000000, and there"):
        tiny_core(folder)


def test_a_file_that_changes_while_it_is_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "model.safetensors"
    load = load_module.load_model

    def late(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        file.write_bytes(file.read_bytes())
        (folder / "server.log").write_text("which is none of the model's")
        return model

    monkeypatch.setattr(load_module, "load_model", late)
    with pytest.raises(ModelUnavailable, match=f"{file} changed while it was read"):
        tiny_core(folder)


# -- memory and processors


@pytest.mark.parametrize(
    ("free", "says"),
    [
        (
            1000,
            r"reading .*/tokenizer.json takes [\d.]+ KiB of memory, and the box leaves 1000 bytes",
        ),
        (1 << 18, r"loading model takes [\d.]+ KiB of memory, and the box leaves 256.0 KiB"),
        (
            1 << 20,
            r"the KV cache \(--kv-cache-memory\) takes 2.0 MiB of memory, "
            r"and the box leaves 1.0 MiB",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(
    folder: Path, free: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: machine.Room(free, "the box"))
    with pytest.raises(ModelUnavailable) as caught:
        tiny_core(folder, block_size=16, kv_cache_memory=4 << 20)
    assert re.fullmatch(says, str(caught.value))


def test_memory_that_runs_out_all_the_same_is_told_with_what_there_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: Any, **__: Any) -> Any:
        return torch.empty(1 << 58)

    monkeypatch.setattr(load_module, "load_model", greedy)
    with pytest.raises(ModelUnavailable) as caught:
        tiny_core(folder)
    assert re.match(f"{folder} cannot be loaded .RuntimeError: ", str(caught.value))
    assert machine.free_memory().bound in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_log_says_what_bounds_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(machine, "free_memory", lambda: machine.Room(20 << 20, "the box"))
    tiny_core(folder, max_num_seqs=256, kv_cache_memory=None)
    tiny_core(folder, max_num_seqs=256)
    tiny_core(folder, max_num_seqs=2)
    logged = [
        re.findall(r"of cache \((.*)\), in", record.getMessage()) for record in caplog.records
    ]
    assert logged == [
        ["30% of the 20.0 MiB that the box leaves"],
        ["--kv-cache-memory"],
        ["all that --max-num-seqs 2 can use"],
    ]


@pytest.mark.parametrize(
    ("asked", "torchs", "granted", "threads"),
    [(None, 64, 3, 3), (None, 2, 64, 2), (None, 64, 64, 64), (5, 2, 3, 5)],
)
def test_threads_are_as_many_as_can_be_kept_busy(
    folder: Path,
    asked: int | None,
    torchs: int,
    granted: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(load_module, "processors", lambda: granted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    tiny_core(folder, threads=asked)
    assert counts[0] == threads
